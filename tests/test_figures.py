"""Notebooks of figures on small tables of odd shape."""
import json
from itertools import product
from pathlib import Path

import numpy as np, pandas as pd, papermill

ROOT = Path(__file__).resolve().parents[1]


def leave(folder: Path, table: str, rows: list[dict], **about) -> None:
    "A finished run."
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / f"{table}.parquet")
    (folder / "result.json").write_text(json.dumps(about))


def draw(figure: str, home: Path) -> Path:
    "Run the notebook of a figure; the folder of its files."
    papermill.execute_notebook(ROOT / f"nbs/figures/{figure}.ipynb", home / f"{figure}.ipynb", kernel_name="python3", cwd=ROOT,
                               parameters=dict(results=str(home), out=str(home / "figures")), progress_bar=False)
    return home / "figures"


def test_figure_1_is_of_one_model_where_several_have_read_the_same_records(tmp_path):
    for model in "small", "large":
        rows = [dict(record="r", position=i, token=f" {model}{i}", loss=float(i % 7)) for i in range(50)]
        leave(tmp_path / "uncertainty" / f"{model}-gsm8k", "tokens", rows, identity=dict(model=model, dataset="gsm8k"))
    shown = pd.read_csv(draw("fig1", tmp_path) / "fig1.csv")
    assert shown.token.tolist() == [f" large{i}" for i in range(40)] and shown.selected.sum() == 10


def test_figure_5_says_so_where_nothing_is_out_of_distribution(tmp_path):
    rng = np.random.default_rng(0)
    for objective in "mle", "combined":
        rows = [dict(record=f"r{k}", cluster=f"r{k}", dataset="gsm8k", role="id", checkpoint=c, seed=s, step=0, accuracy=.5,
                     nll=2 + rng.normal(0, .1) - .2 * (c == "last"), kl=.1)
                for k, c, s in product(range(8), ("initial", "last"), range(3))]
        leave(tmp_path / "train" / objective, "records", rows, learning_rate=1e-3, documents=4,
              identity=dict(model="small", trained_on="gsm8k", regime="one_pass", objective=objective))
    drawn = draw("fig5", tmp_path)
    assert {p.name for p in drawn.iterdir()} == {f"fig5{x}.{kind}" for x in ("", "_tradeoff") for kind in ("png", "csv")}
    assert (pd.read_csv(drawn / "fig5.csv").role == "id").all()
