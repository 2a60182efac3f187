"""Each objective against the initial model and against MLE, on each data set alone, with intervals of 95% that are not
corrected: what the claims take together, and what they do not compare. Nobody planned these contrasts.

    python tools/by_dataset.py reference/cpu-full
"""
import sys
from pathlib import Path

import pandas as pd

from uat_repro.effects import gains
from uat_repro.plots import label
from uat_repro.results import markdown_table, write_whole

OBJECTIVES = ("mle", "masked_mle", "random_masked_mle", "document_masked_mle", "combined", "mle_kl", "mle_slow")
HEAD = ("model", "trained on", "regime", "checkpoint", "judged on", "objective", "over the initial model", "over MLE")


def by_dataset(reference: Path) -> str:
    "The contrasts as a markdown table."
    records = pd.read_parquet(reference / "records.parquet").query("role != 'validation'")
    found = {}  # setting, data set and objective -> effects over both
    pairs = [(objective, over) for objective in OBJECTIVES for over in ("initial", "mle") if objective != over]
    for (dataset, _), of in records.groupby(["dataset", "role"]):
        for objective, over in pairs:
            for setting, effect in gains(of, objective, over).items():
                found.setdefault((*setting[:-1], dataset, objective), {})[over] = effect
    return markdown_table(HEAD, ([*map(label, key), pair["initial"], pair.get("mle", "")]
                                 for key, pair in sorted(found.items())))


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]): write_whole(folder / "by_dataset.md", by_dataset(folder) + "\n")
