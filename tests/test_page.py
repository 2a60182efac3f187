"""The page of scored tokens: all text is data, nothing is loaded, and its script does what its controls say."""
import html, json, math, re, shutil, subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest

from uat_repro.page import token_page

HOSTILE = ["</script><img src=x onerror=alert()>", "<!--<script>", "\x1b[31m", "\u2028{{data}}", " the\n", "\u202e", ""]
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="running the page needs chromium")


def tokens(record="<b>a</b>", words=HOSTILE, **more):
    loss = [math.nan, *range(1, len(words))]
    frame = pd.DataFrame(dict(record=record, token=words, loss=loss, epistemic=[x / 1000 for x in loss], **more))
    return frame.assign(selected=frame.loss > 4)


class Parts(HTMLParser):
    "The tags of a page, and the text of its scripts."
    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script": self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script": self.scripts[-1] += data


def test_every_text_is_data_and_comes_back_whole():
    page = Parts(token_page(tokens(), "</title><script>x</script>"))
    data = json.loads(page.scripts[0])
    assert len(page.scripts) == 2 and not any(tag in ("img", "b") for tag, _ in page.tags)
    assert data["title"] == "</title><script>x</script>"
    (record,) = data["records"]
    assert (record["id"], record["tokens"], record["selected"]) == ("<b>a</b>", HOSTILE, [5, 6])
    assert record["values"] == dict(loss=[None, 1, 2, 3, 4, 5, 6], epistemic=[None, .001, .002, .003, .004, .005, .006])


def test_nothing_is_loaded():
    text = token_page(tokens(), "Mine")
    assert not re.search(r"https?:|//\w|@import|url\(", text.replace("// ", ""))
    page = Parts(text)
    assert not any({"src", "href"} & set(attrs) for _, attrs in page.tags)
    policy, = (attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_every_control_has_a_label_and_statuses_are_announced():
    text = token_page(tokens(), "Mine")
    controls = re.findall(r"<(?:select|input)\b", text)
    assert len(controls) == 5 == len(re.findall(r"<label\b[^>]*>(?:(?!</label>).)*<(?:select|input)\b", text, re.S))
    assert text.count('role="status"') == 2 and '<html lang="en">' in text


def run(page, script, tmp_path):
    "What `script` adds to `found` after that of the page; an error anywhere comes back as `error`."
    watch = "<script>const found = {}; onerror = (...e) => found.error = String(e);</script>"
    tell = 'document.body.append(make("pre", {id: "found"}, JSON.stringify(found)));'
    page = page.replace("<script id=", watch + "<script id=")
    page = page.replace("</body>", f"<script>{script};{tell}</script></body>")
    (tmp_path / "page.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    said = subprocess.run([CHROMIUM, *flags, "--dump-dom", (tmp_path / "page.html").as_uri()], capture_output=True,
                          text=True, timeout=120)
    answer = re.search(r'<pre id="found">(.*?)</pre>', said.stdout, re.S)
    assert answer, said.stderr
    return json.loads(html.unescape(answer[1])), said.stdout


PRESS = """
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
const open = () => [...document.querySelectorAll("section")].filter(s => !s.hidden).map(s => s.record);
const current = () => $(document.activeElement.getAttribute("aria-activedescendant"));
"""


@needs_chromium
def test_the_keyboard_moves_and_each_token_has_its_number(tmp_path):
    frame = pd.concat([tokens(), tokens("b", ["x", " yes"])])
    found, dom = run(token_page(frame, "Mine"), PRESS + """
        document.querySelector("[role=listbox]").focus();
        press("End"); press("ArrowLeft"); found.label = current().ariaLabel; found.detail = $("detail").textContent;
        press("Home"); press("ArrowLeft"); found.first = current().ariaLabel;
        press("ArrowDown"); press("ArrowRight"); found.next = current().ariaLabel;
        found.active = document.querySelectorAll("[aria-selected=true]").length""", tmp_path)
    assert found["label"].endswith("5.00 nats, selected") and "epistemic 0.00500 nats" in found["detail"]
    assert found["first"] == HOSTILE[0] + " no score" and found["next"] == " yes 1.00 nats"
    assert found["active"] == 1 and "error" not in found and "<img" not in dom and "␛[31m" in dom


@needs_chromium
def test_search_score_order_and_threshold(tmp_path):
    frame = pd.concat([tokens("a", ["x", "one"]), tokens("b", ["x", " two", " three"])])
    found, _ = run(token_page(frame, "Mine"), PRESS + """
        const ids = () => open().map(record => record.id).join();
        set("query", "TWO thr"); found.search = ids(); set("query", "");
        set("order", "mean"); found.order = ids();
        set("minimum", 150); found.count = $("count").textContent;
        const coloured = option => option.style.background !== "";
        found.coloured = [...document.querySelectorAll("[role=option]")].filter(coloured).map(o => o.textContent);
        set("score", "epistemic"); found.floor = $("floor").value; found.high = $("high").textContent""", tmp_path)
    assert found == dict(search="b", order="b,a", count="2 of 2 records, 1 of their 3 tokens in colour",
                         coloured=[" three"], floor="off", high="≥ 0.0020 nats")


@needs_chromium
def test_weights_of_the_data_have_no_unit(tmp_path):
    frame = tokens("a", ["x", "one", " two"]).assign(weight=[math.nan, 1., .5])
    found, _ = run(token_page(frame, "Weighted"), PRESS + """
        document.querySelector("[role=listbox]").focus(); press("End"); found.detail = $("detail").textContent;
        set("score", "weight"); set("minimum", 200); found.floor = $("floor").value;
        found.label = $("token-0-2").ariaLabel; found.high = $("high").textContent""", tmp_path)
    assert found.pop("detail").endswith("loss 2.00 natsepistemic 0.00200 natsweight 0.500")
    assert found == dict(floor="0.990", label=" two 0.500", high="≥ 0.99")


@needs_chromium
def test_a_record_is_headed_by_its_prompt_and_another_answer_begins_a_line(tmp_path):
    frame = tokens("a1", ["One", ".", "Two"], position=[4, 5, 9], prompt="Count <b>on</b>\nplease")
    found, _ = run(token_page(frame, "Mine"), PRESS + """
        found.heading = document.querySelector("h2 b").textContent;
        found.answers = document.querySelector("[role=listbox]").textContent;
        set("query", "count"); found.search = open().length""", tmp_path)
    assert found == dict(heading="1. Count <b>on</b>↵please", answers="One.\nTwo", search=1)


@needs_chromium
def test_a_log_has_a_slider_over_its_steps(tmp_path):
    frame = pd.concat([tokens("a", ["x", "late"], step=100), tokens("a", ["x", "early"], step=0)])
    found, _ = run(token_page(frame, "A log"), PRESS + """
        const text = () => open().map(record => record.list.textContent);
        found.shown = !$("steps").hidden; found.first = text(); set("step", 1); found.second = text();
        found.at = $("at").value""", tmp_path)
    assert found == dict(shown=True, first=["xearly"], second=["xlate"], at="100")


@needs_chromium
def test_two_thousand_records_are_drawn_as_they_come_near(tmp_path):
    frame = pd.concat([tokens(str(r), ["word "] * 50) for r in range(2000)])
    found, _ = run(token_page(frame, "Many"), """
        found.sections = document.querySelectorAll("section").length;
        found.tokens = document.querySelectorAll("[role=option]").length""", tmp_path)
    assert found["sections"] == 2000 and found["tokens"] < 5000
