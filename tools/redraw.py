"""Draw figures of a reference again, from the tables that it keeps: after a change of how intervals are computed, say.

    python tools/redraw.py reference/cpu fig3 fig5 t1

A reference that was made before those of `answers`, `frontier`, `subsets` and `posteriors` were kept lacks them; such a
figure needs its run.
"""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd, papermill

from uat_repro._code import known_parameters
from uat_repro.claims import TABLES, gather
from uat_repro.results import catalogue, figures, read_json, write_json
from uat_repro.workflow import parameters

from reference import FURTHER

NBS = Path(__file__).resolve().parents[1] / "nbs"


def unpack(reference: Path, results: Path) -> None:
    "The tables of a reference as folders of runs, as the experiments have written them."
    tables = gather(reference) | {n: pd.read_parquet(f) for n in FURTHER if (f := reference / f"{n}.parquet").exists()}
    for file in (reference / "runs").glob("*.json"):
        about, (experiment, run) = read_json(file), file.stem.split("-", 1)
        write_json(results / experiment / run / "result.json", about)
        for name, table in ((n, t) for n, t in tables.items() if {**TABLES, **FURTHER}[n] == experiment):
            identity = pd.Series(about["identity"])
            of = table[(table[[*identity.index]] == identity).all(axis=1)].drop(columns=[*identity.index])
            if len(of): of.to_parquet(results / experiment / run / f"{name}.parquet", index=False)


def redraw(reference: Path, name: str, out: Path) -> None:
    "One figure of a reference, drawn by today's code into the folder `out`."
    profile, notebook = read_json(reference / "profile.json"), NBS / f"{catalogue()['figures'][name]['notebook']}.ipynb"
    lost = [e for table, e in FURTHER.items() if e in catalogue()["figures"][name]["reads"]
            and not (reference / f"{table}.parquet").exists() and [*(reference / "runs").glob(f"{e}-*")]]
    if lost: raise ValueError(f"{name} also shows {lost[0]}, whose tables {reference} does not keep: draw it in its run")
    with TemporaryDirectory() as results:
        unpack(reference, Path(results))
        runs = [str(Path(f).parent) for f in figures(profile)[name] if (Path(results) / f).exists()]
        given = dict(parameters(profile, name), name=name, results=results, runs=runs, out=str(out.resolve()))
        known = known_parameters(notebook)
        papermill.execute_notebook(notebook, None, {k: v for k, v in given.items() if k in known}, kernel_name="python3")


if __name__ == "__main__":
    for figure in sys.argv[2:]: redraw(Path(sys.argv[1]), figure, Path(sys.argv[1]) / "figures")
