"""Write README.md from nbs/index.ipynb: its prose as it is, its code as fenced blocks, links and pictures relative to the
repository. The table of effects in nbs/index.ipynb is made first, from the references.

    python tools/readme.py
"""
import json, posixpath, re
from pathlib import Path

from uat_repro.claims import Judged, read_judged
from uat_repro.results import markdown_table

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "nbs" / "index.ipynb"
COLUMNS = {  # reference, model, training data; regime, if not one pass
    "SmolLM2, upper layers, GSM-Symbolic": ("cpu", "smollm2-135m", "gsm_symbolic"),
    "SmolLM2, upper layers, GSM8K": ("cpu-full", "smollm2-135m", "gsm8k"),
    "SmolLM2, upper layers, Alpaca": ("cpu-full", "smollm2-135m", "alpaca"),
    "SmolLM2, all layers, GSM8K": ("gpu", "smollm2-135m", "gsm8k"),
    "Gemma 3 (base), all layers, GSM8K": ("gpu", "gemma-3-270m", "gsm8k"),
    "Gemma 3 (base), upper layers, GSM8K": ("cpu-families", "gemma-3-270m", "gsm8k"),
    "Qwen2.5-Coder 0.5B, upper layers, GSM8K": ("cpu-families", "qwen2.5-coder-0.5b", "gsm8k"),
    "SmolLM2, upper layers, GSM-Symbolic, trained too long": ("cpu-repeated", "smollm2-135m", "gsm_symbolic", "too_long")}
ROWS = {  # claim or control, and which of its measures
    ("C1", 0): "epistemic uncertainty and loss, rank correlation", ("C1", 1): "the same, minus that of aleatoric uncertainty and loss",
    ("C2", 0): "aleatoric uncertainty and entropy, rank correlation",
    ("C3", 0): "held out: masked MLE over MLE", ("C3a", 0): "a random quarter over MLE",
    ("C3b", 0): "masked MLE over a random quarter", ("C4", 0): "masked MLE over document-masked MLE",
    ("C5", 0): "overlap of the first and the last mask", ("C6", 0): "OOD: masked MLE over the untrained model (the claim is a loss)",
    ("C6a", 0): "OOD: masked MLE over MLE (the claim is a loss)",
    ("C7", 0): "share of the OOD loss of masked MLE that combined restores",
    ("C7a", 0): "the same, by MLE + KL",
    ("C8", 0): "held out: combined over MLE", ("C8", 1): "OOD: combined over MLE",
    ("C8a", 0): "held out: combined over MLE + KL"}
SIGNS = {"supported": "✓", "contradicted": "✗", "no effect": "=", "undecided": "?"}


def cell_of(judged: Judged, measure: int, model: str, data: str, regime: str = "one_pass") -> str:
    "What one run found for a measure, in one regime where a checkpoint is judged."
    for f in judged.findings:
        s = f.setting
        if f.measure != judged.claim.measures[measure] or s["model"] != model: continue
        if data not in (s.get("trained_on"), s.get("dataset")) or "checkpoint" in s and s["regime"] != regime: continue
        return f"{SIGNS[f.verdict.split(',')[0]]} {f.effect}"
    return ""


def effects() -> str:
    "The main effects of all runs, a column for each."
    kept = {name: {j.claim.id: j for j in read_judged(ROOT / "reference" / name / "claims.json")}
            for name in dict.fromkeys(name for name, *_ in COLUMNS.values())}
    rows = [[claim, said, *(cell_of(kept[name][claim], n, *of) for name, *of in COLUMNS.values())]
            for (claim, n), said in ROWS.items()]
    return markdown_table(["claim", "effect", *COLUMNS], rows)


def with_effects(text: str) -> str:
    "The notebook's JSON, its table of effects made anew."
    lines = [json.dumps(f"{line}\n", ensure_ascii=False) for line in ("", *effects().splitlines(), "")]
    between = r'("<!-- effects -->\\n",\n).*?( *"<!-- end of effects -->)'
    return re.sub(between, lambda m: m[1] + "".join(f"    {line},\n" for line in lines) + m[2], text, flags=re.S)


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
    cells = json.loads(with_effects(INDEX.read_text(encoding="utf-8")))["cells"]
    return "\n\n".join(t.strip() for c in cells if (t := text_of(c))) + "\n"


if __name__ == "__main__":
    INDEX.write_text(with_effects(INDEX.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
