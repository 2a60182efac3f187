"""What is generated agrees with what it is generated from."""
import ast, re, shutil, subprocess, sys, tomllib
from configparser import ConfigParser
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXPORT = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"


def modules(package: Path) -> dict[str, str]:
    "Text of each module, by its path in the package."
    return {str(p.relative_to(package)): p.read_text(encoding="utf-8") for p in package.rglob("*.py")}


def test_modules_are_what_the_notebooks_export(tmp_path):
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "uat_repro").mkdir()
    shutil.copy(ROOT / "uat_repro" / "__init__.py", tmp_path / "uat_repro")
    subprocess.run([sys.executable, "-c", EXPORT], cwd=tmp_path, check=True)
    fresh, kept = modules(tmp_path / "uat_repro"), modules(ROOT / "uat_repro")
    assert set(kept) == set(fresh), "a module without a notebook, or a notebook that was never exported: run nbdev-export"
    assert not [name for name in fresh if fresh[name] != kept[name]], "edit the notebooks, not the modules, and run nbdev-export"


def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def test_settings_and_pyproject_agree():
    ours, theirs = settings(), tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    nbdev = theirs["tool"]["nbdev"]
    assert ours["tst_flags"] == nbdev["tst_flags"]
    assert ours["allowed_cell_metadata_keys"].split() == nbdev["allowed_cell_metadata_keys"]
    assert theirs["project"]["requires-python"] == f">={ours['min_python']}"


def test_the_version_is_the_same_everywhere():
    version, dynamic = settings()["version"], tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dynamic"]
    said = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md", "uat_repro/__init__.py")}
    assert "version" in dynamic, "pyproject.toml takes it from settings.ini"
    assert yaml.safe_load(said["CITATION.cff"])["version"] == version
    assert re.search(r"^## (\S+)", said["CHANGELOG.md"], re.M)[1] == version, "the newest entry is that of another version"
    assert f'__version__ = "{version}"' in said["uat_repro/__init__.py"]


def test_the_readme_cites_what_the_citation_file_does():
    said, readme = (yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")),
                    (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= {*said}, "what the format requires"
    paper, entry = said["references"][0], re.search(r"```bibtex\n(.*?)```", readme, re.S)[1]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for part in f"{{{paper['title']}}}", f"{{{authors}}}", f"{{{paper['year']}}}", f"{{{paper['url'].rpartition('/')[2]}}}":
        assert part in entry


def test_extras_that_are_named_exist():
    ours = {k.removesuffix("_requirements") for k in settings() if k.endswith("_requirements")}
    for name in ("README.md", "Dockerfile"):
        named = re.findall(r"pip install[^\n]*-e '\.\[([\w,]+)\]'", (ROOT / name).read_text(encoding="utf-8"))
        assert named and {extra for extras in named for extra in extras.split(",")} <= ours


def test_workflows_test_supported_versions():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    ours, tested = settings(), jobs["test"]["strategy"]["matrix"]["python"]
    assert tested == ours["pythons"].split() and tested[0] == ours["min_python"]


def test_every_requirement_is_locked():
    locked = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").split()}
    wanted = " ".join(v for k, v in settings().items() if k == "requirements" or k.endswith("_requirements")).split()
    assert not {w.split(">")[0].lower().replace("_", "-") for w in wanted} - locked


def test_extras_and_transformers_have_lower_bounds_that_the_lock_meets():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").split()
    locked = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lock)}
    extras = " ".join(v for k, v in settings().items() if k.endswith("_requirements")).split()
    for needed in map(Requirement, [*extras, *re.findall(r"(?:torch|transformers)\S+", settings()["requirements"])]):
        assert [bound.operator for bound in needed.specifier] == [">="], needed
        assert needed.specifier.contains(locked[needed.name.lower().replace("_", "-")]), needed


def test_what_is_required_is_imported():
    texts = [p.read_text(encoding="utf-8") for folder in ("uat_repro", "nbs") for p in (ROOT / folder).rglob("*")
             if p.suffix in (".py", ".ipynb") or p.name == "Snakefile"]
    lists = [settings()[name] for name in ("requirements", "reproduce_requirements", "offline_requirements")]
    needed = [Requirement(r).name for r in " ".join(lists).split()]
    modules = {name: dict(pyyaml="yaml").get(name, name.replace("-", "_")) for name in needed if name != "ipykernel"}
    for name, module in modules.items():  # (ipykernel is the kernel that papermill starts)
        found = re.compile(rf"\b(import|from)\b[^#\n]*\b{module}\b")
        assert any(map(found.search, texts)), f"{name} is required but imported nowhere"


def test_the_pages_have_the_verdicts_and_effects_of_the_references():
    code = "import sys; sys.path.insert(0, 'tools'); from readme import PAGES, with_tables as w; " \
           "texts = [page.read_text(encoding='utf-8') for page in PAGES]; " \
           "sys.exit([w(text) for text in texts] != texts or ['C10' in text for text in texts] != [True, True])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "run make readme"


def test_readme_is_the_landing_page():
    code = "import sys; sys.path.insert(0, 'tools'); from readme import readme; sys.stdout.buffer.write(readme().encode())"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    assert made == (ROOT / "README.md").read_text(encoding="utf-8"), "run make readme"


def test_data_folder_does_not_hide_the_module():
    "`uat_repro/workflow/` holds data beside `uat_repro/workflow.py`; with an `__init__.py` in it Python would import the folder instead."
    assert not list((ROOT / "uat_repro" / "workflow").rglob("*.py"))


def test_files_of_the_workflow_are_packaged():
    patterns = re.findall(r'"(workflow/[^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    packaged = {p for pattern in patterns for p in (ROOT / "uat_repro").glob(pattern)}
    assert {p for p in (ROOT / "uat_repro" / "workflow").rglob("*") if p.is_file()} == packaged


def test_exported_code_imports_no_test_tools():
    for path in (ROOT / "uat_repro").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
        imports |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
        assert not imports & {"fastcore", "nbdev", "execnb", "pytest"}, path.name
