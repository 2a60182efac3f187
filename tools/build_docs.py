"""Render the site: library notebooks executed now, experiment and figure notebooks as the last run left them.

    python tools/build_docs.py [--results results] [--renderer smalldocs|quarto]
"""
import argparse, html, os, re, shutil, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from pathlib import Path

import nbformat, yaml
from fastcore.nbio import read_nb, write_nb
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbdev.config import get_config, nbpath2html
from nbdev.processors import FilterDefaults, exec_show_docs

from uat_repro.results import catalogue, folder_of, read_json, runs_of

ROOT = Path(__file__).resolve().parents[1]
NBS, STAGE = ROOT / "nbs", ROOT / "_proc"


def notebooks() -> list[Path]:
    "The notebooks of the site, relative to `nbs/`."
    found = (p.relative_to(NBS) for p in NBS.rglob("*.ipynb"))
    return sorted(p for p in found if not any(part.startswith((".", "_")) for part in p.parts))


def logs(results: Path) -> dict[str, list[str]]:
    "Notebook -> the executed notebooks of it in a folder of results, the one to show first."
    profile, found = read_json(results / "profile.json"), {}
    for name, entry in catalogue()["experiments"].items():
        example = entry.get("example", {})
        runs = sorted(runs_of(profile, name), key=lambda run: any(run[axis] != value for axis, value in example.items()))
        found[entry["notebook"]] = [f"notebooks/{folder_of(name, run)}.ipynb" for run in runs]
    for name, entry in catalogue()["figures"].items(): found.setdefault(entry["notebook"], []).append(f"notebooks/figures/{name}.ipynb")
    return found


def referred(page: Path, profile: str) -> list[nbformat.NotebookNode]:
    "What the reference runs left of a figure or of the claims, that of the profile before others, as a cell each."
    cells, own = [], ROOT / "reference" / profile
    for folder in sorted((ROOT / "reference").iterdir(), key=lambda f: (f != own, f.name)):
        shown = []
        for entry in catalogue()["figures"].values():
            files = [f for f in entry["files"] if entry["notebook"] == str(page.with_suffix("")) and (folder / f).exists()]
            shown += [f"![{entry['title']}](../measured/{folder.name}/{f})" for f in files if f.endswith(".png")]
            shown += [re.sub(r"^# .*\n", "", (folder / f).read_text(encoding="utf-8")) for f in files if f.endswith(".md")]
        told = f"## In the reference run of profile {folder.name}\n\nThis page has not been run here. " \
               f"`reference/{folder.name}` has its results; the [first page](../index.ipynb) sums them up."
        if shown: cells.append(nbformat.v4.new_markdown_cell("\n\n".join([told, *shown])))
    return cells


def executed(page: Path, results: Path) -> nbformat.NotebookNode:
    "The notebook as the last run left it; where there was none, as it is in the repository, with the reference's results."
    profile = read_json(results / "profile.json")["profile"] if (results / "profile.json").exists() else None
    known = logs(results) if profile else {}
    found = [results / log for log in known.get(str(page.with_suffix("")), []) if (results / log).exists()]
    node = nbformat.read(found[0] if found else NBS / page, 4)
    if not found: node.cells[1:1] = referred(page, profile or "cpu")  # below the title
    return node


def sections() -> list[dict]:
    "The sections of the sidebar that hold experiments and figures, as the catalogue names them; the claims first."
    made, figures = {}, sorted(catalogue()["figures"].items(), key=lambda item: item[0] != "claims")
    for entry in (*(entry for _, entry in figures), *catalogue()["experiments"].values()):
        page = f"{entry['notebook']}.ipynb"
        if page in (shown := made.setdefault("", [])): continue  # a notebook that draws two figures
        shown.append(page)
        made.setdefault(entry["section"], []).append(dict(text=entry["title"], href=page) if "title" in entry else page)
    return [dict(section=section, contents=pages) for section, pages in made.items() if section]


def site_configuration() -> str:
    "`_quarto.yml` with the sections of the catalogue after the first page."
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    contents = site["website"]["sidebar"]["contents"]
    contents[1:1] = sections()
    return yaml.safe_dump(site, sort_keys=False, allow_unicode=True)


def run(page: Path) -> nbformat.NotebookNode:
    "A library notebook with its outputs; cells that tests skip are left out."
    node, skip = nbformat.read(NBS / page, 4), "|".join([*get_config().tst_flags.split(), "eval: *false"])
    node.cells = [c for c in node.cells if c.cell_type != "code" or not re.search(rf"^#\s*\|\s*({skip})\b", c.source, re.M)]
    where = dict(metadata=dict(path=str((NBS / page).parent)))
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, where ipywidgets are not installed
    NotebookClient(node, timeout=600, kernel_name="python3", resources=where, extra_arguments=["--log-level=ERROR"]).execute()
    return node


def link(text: str) -> str:
    "Links of nbdev (`https://host/base/api/data.html`) as links to the notebooks that hold the page; none in another."
    text, cfg = re.sub(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(", r"[\1](", text), get_config()
    base = f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/") + "/"
    pages = {re.sub(r"(^|/)\d+[a-z]?_", r"\1", str(p.with_suffix(""))): f"/{p}" for p in notebooks()}
    return re.sub(re.escape(base) + r"([\w/]+)\.html", lambda m: pages.get(m[1], m[0]), text)


class SignaturesFromModule(exec_show_docs):
    "Show what a notebook exports from the exported module: the notebook itself has run already."
    def begin(self):
        super().begin()
        names = [c.directives_["default_exp"] for c in self.nb.cells if "default_exp" in c.directives_]
        for name in names: self.k.run_cell(f"from uat_repro.{name} import *")

    def __call__(self, cell):
        if cell.source.startswith("show_doc("): super().__call__(cell)


class Page(FilterDefaults):
    "nbdev's processors, but for the one that would run the notebook again."
    def base_procs(self): return [SignaturesFromModule if proc is exec_show_docs else proc for proc in super().base_procs()]


def apart(node: nbformat.NotebookNode) -> None:
    "Put what follows a title and its quoted line into a cell of its own: nbdev keeps nothing else of the title's cell."
    for i, cell in enumerate(node.cells):
        if cell.cell_type == "markdown" and (found := re.match(r"# .*\n+>.*\n+(?=.)", cell.source)):
            node.cells.insert(i + 1, nbformat.v4.new_markdown_cell(cell.source[found.end():]))
            cell.source = found[0].strip()
            return


def stage(page: Path, node: nbformat.NotebookNode) -> None:
    "Put one page into the stage: outputs, nbdev's documentation of what it exports, links."
    apart(node)
    out = STAGE / page
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(node, out)
    nb = read_nb(out)
    nb.path_ = NBS / page
    Page()(nb)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]  # progress bars
        if cell.cell_type == "raw": cell.source = re.sub(r"output-file: .*\n", "", cell.source)
        cell.source = link(cell.source).replace("](../reference/", "](measured/")
    write_nb(nb, out)


FORMULA = re.compile(r'(<span class="math (?:inline|display)">)\\([(\[])(.*?)\\[)\]]</span>', re.S)
FOREIGN = re.compile(r'<link rel="stylesheet" href="https?:[^>]*>|<script src="https?:[^>]*></script>')


def mathml(formula: re.Match) -> str:
    "A formula that a script would typeset, as MathML, which browsers typeset themselves."
    display, tex = "block" if formula[2] == "[" else "inline", html.unescape(formula[3])
    if display == "block": tex = re.sub(r"\\sum(?![a-z])", r"\\sum\\limits", tex)  # inside of braces too
    return f"{formula[1]}{convert(tex, display=display)}</span>"


def without_network(site: Path) -> None:
    "Leave nothing in the pages that is loaded from another host: scripts for formulas, and fonts of the theme."
    shutil.copy(files("ziamath") / "fonts/STIXTwoMath-Regular.ttf", site)  # where a machine has no font for formulas
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".css": text = re.sub(r"@import url\(https?:[^)]*\);?", "", text)
        else: text = FOREIGN.sub("", FORMULA.sub(mathml, text))
        path.write_text(text, encoding="utf-8")


def addresses(site: Path) -> None:
    "Where docstrings and nbdev's index say that a page is, `api/tokens.html` for `01_tokens`: its text, and a way on."
    for page in notebooks():
        named = site / nbpath2html(page)
        shutil.copy(site / page.with_suffix(".llms.md"), f"{named}.md")
        if named.exists(): continue
        target = page.with_suffix(".html").name
        named.write_text(f'<!doctype html><meta charset="utf-8"><meta name="robots" content="noindex">'
                         f'<script>location.replace("{target}" + location.hash)</script>'
                         f'<a href="{target}">{target}</a>', encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of results")
    parser.add_argument("--renderer", default="smalldocs", choices=["smalldocs", "quarto"])
    args = parser.parse_args()
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    STAGE.mkdir()
    results = args.results.resolve()
    with ProcessPoolExecutor(2) as pool:
        now = ("api", "benchmarks.ipynb", "contributing.ipynb", "howto.ipynb")
        library = {page: pool.submit(run, page) for page in notebooks() if page.parts[0] in now}
    for page in notebooks(): stage(page, library[page].result() if page in library else executed(page, results))
    if (ROOT / "reference").exists(): shutil.copytree(ROOT / "reference", STAGE / "measured")
    for file in ("tools/site.css", "nbs/colab.svg"): shutil.copy(ROOT / file, STAGE)
    (STAGE / "_quarto.yml").write_text(site_configuration(), encoding="utf-8")
    smalldocs = str(Path(sys.executable).with_name("smalldocs"))
    steps = dict(smalldocs=[[smalldocs, *step] for step in (["api", "build", "--dir", STAGE], ["render", STAGE, "--strict"], ["check", STAGE])],
                 quarto=[["quarto", "render", STAGE, "--no-execute"]])
    for step in steps[args.renderer]:
        if status := subprocess.run(step).returncode: return status
    without_network(STAGE / "_docs")
    addresses(STAGE / "_docs")
    shutil.move(STAGE / "_docs", ROOT / "_docs")
    print("the site is in _docs/index.html")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
