"""Write README.md from nbs/index.ipynb: its prose as it is, its code as fenced blocks, links and pictures relative to the
repository. The tables of claims in nbs/index.ipynb and nbs/findings.ipynb are made first, from the references.

    python tools/readme.py
"""
import json, posixpath, re
from functools import cache
from pathlib import Path

from uat_repro.claims import Judged, read_judged
from uat_repro.results import markdown_table

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "nbs" / "index.ipynb"
PAGES = (INDEX, ROOT / "nbs" / "findings.ipynb")
COLUMNS = {  # reference, model, training data; regime, if not one pass
    "GSM-Symbolic": ("cpu", "smollm2-135m", "gsm_symbolic"),
    "GSM8K": ("cpu-full", "smollm2-135m", "gsm8k"),
    "Alpaca": ("cpu-full", "smollm2-135m", "alpaca"),
    "ShareGPT": ("cpu-chat", "smollm2-135m", "sharegpt"),
    "Gemma, GSM8K": ("cpu-families", "gemma-3-270m", "gsm8k"),
    "Qwen, GSM8K": ("cpu-families", "qwen2.5-coder-0.5b", "gsm8k"),
    "all layers, GSM8K": ("gpu", "smollm2-135m", "gsm8k"),
    "Gemma, all layers, GSM8K": ("gpu", "gemma-3-270m", "gsm8k"),
    "GSM8K, repeated": ("cpu-repeated", "smollm2-135m", "gsm8k", "repeated"),
    "Alpaca, repeated": ("cpu-chat", "smollm2-135m", "alpaca", "repeated"),
    "ShareGPT, repeated": ("cpu-chat", "smollm2-135m", "sharegpt", "repeated"),
    "GSM-Symbolic, too long": ("cpu-repeated", "smollm2-135m", "gsm_symbolic", "too_long")}
ROWS = {  # claim or control, and which of its measures
    ("C1", 0): "epistemic uncertainty follows the loss",
    ("C1", 1): "more than aleatoric uncertainty does",
    ("C2", 0): "aleatoric uncertainty follows the entropy (by construction)",
    ("C2", 1): "more than epistemic uncertainty does",
    ("C3", 0): "held out, masked MLE beats MLE",
    ("C3a", 0): "a random quarter beats MLE",
    ("C3b", 0): "masked MLE beats a random quarter",
    ("C4", 0): "chosen tokens beat chosen documents",
    ("C5", 0): "the mask moves (under MLE as well)",
    ("C5", 1): "the epistemic share of the tokens chosen first falls",
    ("C6", 0): "OOD, masked MLE loses to the initial model",
    ("C6a", 0): "OOD, masked MLE loses to MLE",
    ("C7", 0): "combined restores a share of what masked MLE loses OOD",
    ("C7a", 0): "MLE + KL restores a share of it",
    ("C8", 0): "held out, combined beats MLE",
    ("C8", 1): "OOD, combined beats MLE",
    ("C8a", 0): "held out, combined beats MLE + KL",
    ("C8a", 1): "OOD, combined beats MLE + KL",
    ("C8b", 0): "held out, combined beats MLE at a third of the rate",
    ("C8b", 1): "OOD, combined beats MLE at a third of the rate",
    ("C9", 0): "epistemic uncertainty falls faster where aleatoric is low",
    ("C10", 0): "epistemic uncertainty (of an ensemble) predicts what training removes"}
SIGNS = {"supported": "✓", "contradicted": "✗", "no effect": "=", "undecided": "?"}


def found(judged: Judged, measure: int, model: str, data: str, regime: str = "one_pass") -> tuple[str, str]:
    "The sign and the effect of one run for a measure, in one regime where a checkpoint is judged; empty where it has none."
    for f in judged.findings:
        s = f.setting
        if f.measure != judged.claim.measures[measure] or s["model"] != model: continue
        if data not in (s.get("trained_on"), s.get("dataset")) or "checkpoint" in s and s["regime"] != regime: continue
        return SIGNS[f.verdict.split(",")[0]], f"{f.effect}"
    return "", ""


@cache
def tables() -> dict[str, str]:
    "The main claims and controls in the main settings: their signs, and their effects."
    kept = {name: {j.claim.id: j for j in read_judged(ROOT / "reference" / name / "claims.json")}
            for name in dict.fromkeys(name for name, *_ in COLUMNS.values())}
    rows = {said: (claim, [found(kept[name][claim], n, *of) for name, *of in COLUMNS.values()])
            for (claim, n), said in ROWS.items()}
    def table(show): return markdown_table(["", "claim", *COLUMNS], [[claim, said, *map(show, cells)] for said, (claim, cells) in rows.items()])
    return dict(signs=table(lambda cell: cell[0]), effects=table(lambda cell: " ".join(cell).strip()))


def with_tables(text: str) -> str:
    "A notebook's JSON, its tables made anew."
    for name, table in tables().items():
        lines = [json.dumps(f"{line}\n", ensure_ascii=False) for line in ("", *table.splitlines(), "")]
        between = rf'("<!-- {name} -->\\n",\n).*?( *"<!-- end of {name} -->)'
        text = re.sub(between, lambda m: m[1] + "".join(f"    {line},\n" for line in lines) + m[2], text, flags=re.S)
    return text


def from_top(match: re.Match) -> str:
    "A link relative to `nbs/` as one relative to the repository."
    target = match[1]
    return match[0] if re.match(r"[a-z]+:|#|/", target) else f"]({posixpath.normpath(posixpath.join('nbs', target))})"


def text_of(cell: dict) -> str | None:
    "A cell as markdown; None for hidden code."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return re.sub(r"\]\(([^)\s]+)\)", from_top, source)
    return None if cell["cell_type"] != "code" or source.startswith("#|") else f"```python\n{source}\n```"


def readme() -> str:
    "The README, as the landing page has it."
    cells = json.loads(with_tables(INDEX.read_text(encoding="utf-8")))["cells"]
    return "\n\n".join(t.strip() for c in cells if (t := text_of(c))) + "\n"


if __name__ == "__main__":
    for page in PAGES: page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
