"""The notebooks as they are committed."""
import json, re
from pathlib import Path

import pytest

from uat_repro.results import catalogue

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
PAPERMILL = [p for p in NOTEBOOKS if p.parent.name in ("experiments", "figures")]
MACHINE = re.compile(r"/home/\w|/Users/\w|/root/|/work/|[A-Z]:\\\\|\.\./shared|hf_\w{20}")


def cells(path: Path) -> list[dict]: return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_clean(path):
    for cell in cells(path):
        assert cell["cell_type"] in ("code", "markdown"), f"{cell['id']} is no cell that a reader is shown"
        assert not cell.get("outputs") and cell.get("execution_count") is None, "run nbdev-clean"
        assert set(cell["metadata"]) <= {"tags"}, "run nbdev-clean"
        found = MACHINE.search(source := "".join(cell["source"]))
        assert not found or "test_fail" in source, f"names a place on some machine: {found[0]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_opens_with_a_title_and_a_line(path):
    prose = next("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
    assert re.match(r"# .+\n+> .+", prose)


@pytest.mark.parametrize("path", PAPERMILL, ids=lambda p: p.stem)
def test_has_documented_parameters_and_an_entry_in_the_catalogue(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = "".join(tagged[0]["source"]).splitlines()
    assert all(re.match(r"\w+: [\w\[\], |]+ = .+  # \S", line) for line in lines), "write `name: type = default  # what it is`"
    assert f"{path.parent.name}/{path.stem}" in {entry["notebook"] for entry in catalogue()[path.parent.name].values()}


def test_only_the_library_exports():
    exporting = [p for p in NOTEBOOKS if any(re.match(r"#\s*\|\s*default_exp", "".join(c["source"])) for c in cells(p))]
    assert {p.parent.name for p in exporting} == {"api"}


def test_links_lead_somewhere():
    for path in NOTEBOOKS:
        for cell in cells(path):
            if cell["cell_type"] != "markdown": continue
            for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", "".join(cell["source"])):
                assert re.match(r"[a-z]+:", target) or (path.parent / target).exists(), f"{path.name} links to {target}"
