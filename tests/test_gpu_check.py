"""The notebook for the first minutes on a GPU runs whole, at tiny size, wherever it is."""
import json
from pathlib import Path

import pandas as pd, papermill

ROOT = Path(__file__).resolve().parents[1]


def test_every_line_is_measured_or_says_why_not(tmp_path):
    papermill.execute_notebook(ROOT / "nbs/gpu_check.ipynb", None, dict(tiny=True, out=str(tmp_path)), kernel_name="python3",
                               progress_bar=False, cwd=tmp_path)
    table, whole = pd.read_csv(tmp_path / "gpu_check.csv"), json.loads((tmp_path / "gpu_check.json").read_text())
    assert whole["failed"] == [] and len(whole["lines"]) == len(table) == len((tmp_path / "gpu_check.md").read_text().splitlines()) - 2
    assert set(table["part"]) == {"head", "slices", "precision", "training", "memory", "teachers", "scores", "prepare", "padding"}
    measured = table[["ms", "tokens_per_second", "value"]].notna().any(axis=1)
    assert table["note"][~measured].str.startswith("left out: ").all() and measured.sum() >= 22
    assert table["plan_mb"].notna().sum() == table["part"].eq("memory").sum() + 3 == 5
    losses = table[table["part"].eq("head") & table["what"].str.startswith("MLE")]["value"].dropna()
    assert losses.max() - losses.min() < .05  # the same loss, one of them from bfloat16 logits
