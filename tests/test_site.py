"""The site in a browser, 1280 and 390 pixels wide: formulas, figures, heat maps, verdicts, search, and no other host.

Looked at are a few pages made here, of what the references hold, and the whole site where `make docs` has built it.
"""
import json, queue, shutil, subprocess, sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from uat_repro.heatmaps import heatmap_html

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"]
OWN = "default-src 'self' 'unsafe-inline' data:; report-uri /refused"
PAGES = dict(claims="figures/claims.html", figure="figures/fig1.html", formula="api/08_objective.html",
             tokens="api/15_heatmaps.html")
LOOK = """<!doctype html><iframe width={width} height=900></iframe><script>
const frame = document.querySelector("iframe"), found = {};
const open = page => new Promise(done => { frame.onload = () => done(frame.contentDocument); frame.src = page; });
const seen = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.left >= 0 && r.right <= {width}; };
const look = async page => {
  const doc = await open(page), all = query => [...doc.querySelectorAll(`main ${query}`)];
  const verdicts = all("table:has(th:nth-child(6):last-child) td:nth-child(6)");
  return {formulas: all("math mi").filter(seen).length, raw: all(".math").filter(e => !e.firstElementChild).length,
          pictures: all("img").filter(e => e.naturalWidth && seen(e)).length,
          lost: all("img").filter(e => !e.naturalWidth).length,
          tokens: all(".uat span[style*=background]").filter(seen).length,
          verdicts: verdicts.length, beyond: verdicts.filter(e => !seen(e)).length,
          wider: Math.max(0, doc.documentElement.scrollWidth - frame.clientWidth)};
};
const search = async text => {
  const doc = await open("index.html"), input = doc.querySelector(".smalldocs-search input");
  doc.querySelector(".navbar-toggler").click();  // shown where the menu is folded
  input.value = text; input.dispatchEvent(new Event("input"));
  const results = () => [...doc.querySelectorAll(".search-result")].filter(seen).length;
  for (let i = 0; i < 100 && !results(); i++) await new Promise(done => setTimeout(done, 50));
  return results();
};
(async () => {
  for (const [name, page] of Object.entries({pages})) found[name] = await look(page);
  found.search = await search("epistemic");
  fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A few pages, by the steps of `make docs` but for the notebooks that it runs."
    for package in ("nbdev", "smalldocs", "latex2mathml", "ziamath"):
        pytest.importorskip(package, reason=f"the site needs {package}: pip install -e '.[dev]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        import build_docs as docs
        patch.setattr(docs, "STAGE", stage := tmp_path_factory.mktemp("site"))
        for page in ("index", "figures/claims", "figures/fig1"):
            docs.stage(Path(f"{page}.ipynb"), docs.executed(Path(f"{page}.ipynb"), stage))
        tokens = pd.DataFrame(dict(token=["A", " word"], loss=[1., 2.], selected=[False, True]))
        output = docs.nbformat.v4.new_output("display_data", {"text/html": heatmap_html(tokens, "loss")})
        shown = docs.nbformat.v4.new_code_cell("", outputs=[output])
        title, formula = map(docs.nbformat.v4.new_markdown_cell, ("# Page\n\n> Of two cells", "$E_t < U_t$ in $$A_t$$"))
        for page in ("api/08_objective.ipynb", "api/15_heatmaps.ipynb"):
            docs.stage(Path(page), docs.nbformat.v4.new_notebook(cells=[title, formula, shown]))
        shutil.copytree(ROOT / "reference", stage / "measured")
        shutil.copy(ROOT / "tools/site.css", stage)
        (stage / "_quarto.yml").write_text(docs.site_configuration(), encoding="utf-8")
        smalldocs = Path(sys.executable).with_name("smalldocs")
        subprocess.run([smalldocs, "render", stage], check=True, capture_output=True)
        docs.without_network(stage / "_docs")
    return stage / "_docs"


@pytest.fixture(params=["made", "built"])
def site(request):
    if not CHROMIUM: pytest.skip("looking at the site needs chromium")
    if request.param == "made": return request.getfixturevalue("made")
    if not (ROOT / "_docs/index.html").exists(): pytest.skip("the whole site is not built: make docs")
    return ROOT / "_docs"


class Handler(SimpleHTTPRequestHandler):
    "Serves a site that may load nothing from elsewhere, and hears what was found and what was refused."
    def end_headers(self):
        self.send_header("Content-Security-Policy", OWN)
        super().end_headers()

    def do_GET(self):
        if self.path != "/look": return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.look.encode())

    def do_POST(self):
        self.server.heard.put((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args): pass


def looked(site, width, profile):
    "What a browser of this width finds on `PAGES`, and the addresses on other hosts that it was asked to load."
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site)) as server:
        server.heard = queue.Queue()
        server.look = LOOK.replace("{width}", str(width)).replace("{pages}", json.dumps(PAGES))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/look"
        browser = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width + 100},1000",
                                    address], stderr=subprocess.DEVNULL)
        try:
            refused = []
            while (message := server.heard.get(timeout=60))[0] == "/refused":
                refused.append(message[1]["csp-report"]["blocked-uri"])
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    return message[1], refused


@pytest.mark.parametrize("width", [1280, 390])
def test_a_reader_sees_everything(site, width, tmp_path):
    found, refused = looked(site, width, tmp_path)
    assert not refused, "loaded from other hosts"
    assert found["formula"]["formulas"] > 3 and found["figure"]["pictures"] and found["tokens"]["tokens"]
    assert found["claims"]["verdicts"] >= 10 and found["search"]
    for name in PAGES:
        assert all(found[name][trouble] == 0 for trouble in ("raw", "lost", "beyond", "wider")), (name, found[name])
