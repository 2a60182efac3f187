"""What the site shows where no run has been made, and in which order."""
import re, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def docs(monkeypatch):
    for package in ("nbdev", "latex2mathml", "ziamath"):
        pytest.importorskip(package, reason=f"the site needs {package}: pip install {package}")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.delitem(sys.modules, "build_docs", raising=False)
    import build_docs
    return build_docs


def test_a_page_that_was_not_run_shows_the_reference(docs, tmp_path):
    figure, claims, other = (docs.executed(Path(page), tmp_path).cells for page in
                             ("figures/fig1.ipynb", "figures/claims.ipynb", "experiments/train.ipynb"))
    assert "](../measured/cpu/figures/fig1.png)" in figure[1].source
    assert "| C1 |" in claims[1].source and "\n# " not in claims[1].source
    assert all("measured/" not in cell.source for cell in other)


def test_a_page_that_was_run_shows_its_own_results(docs, tmp_path):
    docs.nbformat.write(ran := docs.nbformat.v4.new_notebook(), tmp_path / "ran.ipynb")
    docs.logs = lambda results: {"figures/fig1": ["ran.ipynb"]}
    (tmp_path / "profile.json").write_text('{"profile": "cpu"}')
    assert docs.executed(Path("figures/fig1.ipynb"), tmp_path).cells == ran.cells


def test_claims_come_first_and_figures_in_the_order_of_the_paper(docs):
    sections = docs.sections()
    pages = [entry["href"] for entry in sections[1]["contents"]]
    assert sections[0]["section"] == "Claims" and pages == sorted(pages) and pages[0] == "figures/fig1.ipynb"


def test_what_only_another_reference_has_is_shown_from_there(docs, tmp_path):
    page, both = (docs.executed(Path(f"figures/{name}.ipynb"), tmp_path).cells for name in ("e15", "fig2b"))
    for cell, name in zip(page[1:3], ("cpu-families", "cpu-full")): assert f"](../measured/{name}/figures/e15.png)" in cell.source
    assert [re.search(r"profile (\S+)\n", cell.source)[1] for cell in both[1:4]] == ["cpu", "cpu-full", "gpu"]


def test_what_a_docstring_calls_its_page_is_there(docs, tmp_path):
    for page in docs.notebooks():
        for path in (tmp_path / page.with_suffix(".llms.md"), tmp_path / page.with_suffix(".html")):
            path.parent.mkdir(exist_ok=True)
            path.write_text("whole")
    docs.addresses(tmp_path)
    modules = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "uat_repro").glob("*.py"))
    named = re.findall(r"^Docs: https://uat-repro.github.io/uat-repro/(\S+?)\.md", modules, re.M)
    assert len(named) > 20 and all((tmp_path / f"{page}.md").read_text() == "whole" for page in named)
    assert 'href="01_tokens.html"' in (tmp_path / "api/tokens.html").read_text()
    assert (tmp_path / "figures/fig1.html").read_text() == "whole"


def test_pages_need_no_other_host(docs, tmp_path):
    page, style = tmp_path / "a.html", tmp_path / "site_libs/theme.css"
    style.parent.mkdir()
    style.write_text("/* */@import url(https://fonts.example/css2?family=A:wght@300;400&display=swap);:root{}")
    page.write_text(r'<link rel="stylesheet" href="https://cdn.example/k.css"><script src="https://cdn.example/k.js" '
                    r'defer></script><script src="own.js"></script><span class="math inline">\(a &lt; b\)</span>'
                    r'<span class="math display">\[\underbrace{\sum_a b}_{c}\]</span>')
    docs.without_network(tmp_path)
    assert style.read_text() == "/* */:root{}"
    assert "cdn.example" not in page.read_text() and 'src="own.js"' in page.read_text()
    assert "<mi>a</mi><mo>&#x0003C;</mo><mi>b</mi>" in page.read_text() and r"\(" not in page.read_text()
    assert "<munder><mo>&#x02211;</mo><mi>a</mi></munder>" in page.read_text()
    assert (tmp_path / "STIXTwoMath-Regular.ttf").exists()


def test_the_menu_has_the_claims_before_all_but_the_first_page(docs):
    contents = docs.yaml.safe_load(docs.site_configuration())["website"]["sidebar"]["contents"]
    assert contents[0] == "index.ipynb" and contents[1]["section"] == "Claims"
    assert [part["section"] for part in contents[2:4]] == ["Figures of the paper", "Extended figures"]


def test_cells_for_the_command_line_are_not_run_and_bars_do_not_warn(docs, tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "NBS", tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "")  # as it was, afterwards
    sources = "#| export\n#| eval: false\nexit(main())", "#| notest\n1 / 0", "from tqdm.auto import tqdm"
    page = docs.nbformat.v4.new_notebook(cells=[docs.nbformat.v4.new_code_cell(source) for source in sources])
    docs.nbformat.write(page, tmp_path / "page.ipynb")
    (cell,) = docs.run(Path("page.ipynb")).cells
    assert cell.source == sources[-1] and not cell.outputs


def test_what_follows_the_title_is_kept_and_a_link_holds_no_other(docs, tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "STAGE", tmp_path)
    text = "# Page\n\n> Of one cell\n\nWhy it is there.\n\nBy [`lay_out`](01_tokens.ipynb)."
    docs.stage(Path("howto.ipynb"), docs.nbformat.v4.new_notebook(cells=[docs.nbformat.v4.new_markdown_cell(text)]))
    staged = "\n".join(cell.source for cell in docs.nbformat.read(tmp_path / "howto.ipynb", 4).cells)
    assert "Why it is there." in staged and "By [`lay_out`](01_tokens.ipynb)." in staged and staged.count("Of one") == 1
