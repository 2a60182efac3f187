"""The frontier's figure, on tables whose answer is known."""
import json
from itertools import product
from pathlib import Path

import numpy as np, pandas as pd, papermill

ROOT = Path(__file__).resolve().parents[1]
RATES = [1e-4, 3e-4, 9e-4, 2.7e-3]
SPEED = dict(mle=1, masked_mle=1 / 3, combined=1)  # masked MLE is MLE at a third of the rate
BONUS = dict(mle=0, masked_mle=0, combined=.1)  # the combined objective gains more in distribution at the same cost


def write_frontier(folder: Path, seeds: int = 4, records: int = 40) -> None:
    "Curves of one shape, with noise of seeds and records that all objectives share."
    rng, rows = np.random.default_rng(0), []
    base = {role: 2 + rng.normal(0, .3, records) for role in ("validation", "id", "ood")}
    for (objective, speed), rate, seed in product(SPEED.items(), [0, *RATES], range(seeds)):
        if rate == 0 and objective != "mle": continue
        x = np.log1p(rate * speed / 3e-4 * 2)  # the way that training goes
        change = dict(id=-.4 * x + .15 * x**2 - BONUS[objective] * (rate > 0), ood=.1 * x)
        for role in base:
            moved = change["id" if role == "validation" else role]
            for k in range(records):
                rows.append(dict(seed=seed, objective=objective if rate else "initial", learning_rate=rate, role=role,
                                 dataset=role, record=f"{role}/{k}", cluster=f"{role}/{k}", accuracy=.5, kl=.3 * x,
                                 nll=base[role][k] + moved * (1 + .02 * seed) + rng.normal(0, .005)))
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "frontier.parquet")
    about = dict(identity=dict(model="tiny", trained_on="gsm_symbolic"), documents=8, steps=2, seeds=list(range(seeds)),
                 learning_rate=9e-4, best_rates=dict(mle=3e-4, masked_mle=9e-4, combined=3e-4), at_edge=["masked_mle"])
    (folder / "result.json").write_text(json.dumps(about))


def test_a_gain_that_a_smaller_rate_gives_as_well_is_seen_as_such(tmp_path):
    write_frontier(tmp_path / "results" / "frontier" / "tiny-gsm_symbolic")
    papermill.execute_notebook(ROOT / "nbs/figures/e13.ipynb", tmp_path / "e13.ipynb", kernel_name="python3", cwd=ROOT,
                               parameters=dict(results=str(tmp_path / "results"), out=str(tmp_path)),
                               progress_bar=False)
    found = pd.read_csv(tmp_path / "e13_matched.csv").set_index(["objective", "comparison"])
    estimate, said = found["estimate"].unstack(), found["verdict"].unstack()
    slow, better = estimate.loc["masked_mle"], estimate.loc["combined"]
    assert said.loc["masked_mle", "same rate"] == "supported" and slow["same rate"] > .02
    for same in ("no more OOD loss", "no more KL"):
        assert abs(slow[same]) < .01 and not said.loc["masked_mle", same] == "supported"
        assert abs(better[same] - .05) < .015 and said.loc["combined", same] == "supported"
    assert abs(better["best rates"] - .1) < .01 and abs(slow["best rates"]) < .01
    curves = pd.read_csv(tmp_path / "e13.csv")
    assert (curves.loc[curves.objective == "initial", ["id", "ood", "kl"]] == 0).all(axis=None)
    assert "at an edge of the grid is the best rate of masked MLE" in (tmp_path / "e13.ipynb").read_text()
