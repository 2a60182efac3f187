"""What the package tells a type checker: complete signatures, and the public names as they are."""
import ast, inspect, re, subprocess, sys
from pathlib import Path

import pytest

import uat_repro

ROOT = Path(__file__).resolve().parents[1]
WRONG = """
from uat_repro import HiddenCache, Objective, encode_all
Objective(keep="a quarter")
Objective(kep=.25)
encode_all([], None, too_long=True)
HiddenCache.buidl
"""


def functions():
    "The public functions and what public classes are called with; the hooks of callbacks are those of transformers."
    for name in uat_repro.__all__:
        found = getattr(uat_repro, name)
        if inspect.isfunction(found): yield name, found
        if not inspect.isclass(found): continue
        for method, function in (dict(vars(found)) | {"__init__": found.__init__}).items():
            called = method in ("__init__", "__call__") or not method.startswith(("_", "on_"))
            own = inspect.isfunction(function) and function.__module__.startswith("uat_repro.")
            if own and called: yield f"{name}.{method}", function


@pytest.mark.parametrize(("name", "function"), list(functions()), ids=lambda value: value if type(value) is str else "")
def test_a_signature_says_every_type_but_that_of_a_tokenizer(name, function):
    signature = inspect.signature(function)
    empty = {p.name for p in signature.parameters.values() if p.annotation is p.empty and p.kind is not p.VAR_KEYWORD}
    assert empty <= {"self", "cls", "tokenizer"}
    assert signature.return_annotation is not signature.empty or name.endswith("__init__")
    for p in signature.parameters.values():
        assert p.default is not None or re.search("None|Optional", str(p.annotation)), f"{p} may be None"


def test_the_stub_names_what_the_package_has():
    imports = [node for node in ast.parse((ROOT / "uat_repro/__init__.pyi").read_text(encoding="utf-8")).body
               if isinstance(node, ast.ImportFrom)]
    assert {name.asname: node.module for node in imports for name in node.names} == uat_repro._HOME


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    "What mypy says of the library, of the examples of the README, and of a program that is wrong."
    pytest.importorskip("mypy", reason="checking types needs mypy: pip install mypy")
    folder = tmp_path_factory.mktemp("types")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    for number, text in enumerate([*examples, WRONG]): (folder / f"program{number}.py").write_text(text)
    (folder / f"program{number}.py").rename(folder / "wrong.py")
    (folder / "uat_repro").symlink_to(ROOT / "uat_repro")
    programs = sorted(path.name for path in folder.glob("*.py"))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "uat_repro", *programs]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert len(programs) > 5 and "checked" in said.stdout, said.stdout + said.stderr
    return said.stdout


def test_the_library_has_no_fault(checked): assert re.findall(r"^uat_repro/.* error: .*", checked, re.M) == []


def test_the_examples_of_the_readme_have_no_fault(checked): assert "program" not in checked


def test_faults_are_found_where_they_are_made(checked):
    assert re.findall(r"wrong.py:(\d): error", checked) == ["3", "4", "5", "6"]
