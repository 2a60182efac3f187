"""Keep a run as one that the README quotes: its claims, its figures, the tables that these are made from, and what each
result was made with and took. Of a run that was stopped, what is finished is kept.

    python tools/reference.py results reference/cpu
"""
import shutil, sys
from pathlib import Path

import pandas as pd

from uat_repro.claims import TABLES, gather, judge_folder, write_claims
from uat_repro.plots import label
from uat_repro.results import catalogue, read_about, read_json, read_table, result_files, write_json

FURTHER = {table: e for figure in catalogue()["figures"].values() for e in figure["reads"] if e not in TABLES.values()
           for table in catalogue()["experiments"][e]["tables"]}  # drawn, and not judged; by whom each is left


def keep_table(table: pd.DataFrame, name: str, reference: Path) -> None:
    "Put a table into the reference, of all runs, one below the other."
    numbers = [column for column in table if table[column].dtype.kind == "f"]
    table.to_parquet(reference / f"{name}.parquet", index=False, compression="zstd", use_byte_stream_split=numbers,
                     use_dictionary=[column for column in table if column not in numbers])


def keep_further(results: Path, reference: Path) -> None:
    "Put the tables that only figures read into the reference, without what models have written."
    for name, experiment in FURTHER.items():
        runs = [f"{experiment}/{done.parent.name}" for done in sorted(results.glob(f"{experiment}/*/result.json"))]
        if not runs: continue
        keep_table(read_table(results, experiment, name, runs).drop(columns="response", errors="ignore"), name, reference)


def keep(results: Path, reference: Path) -> None:
    "Put what is small of `results` in the place of `reference`."
    shutil.rmtree(reference, ignore_errors=True)
    reference.mkdir(parents=True)
    if (results / "figures").exists(): shutil.copytree(results / "figures", reference / "figures")
    for file in (f for name in ("profile.json", "manifest.json", "gpu_check.*") for f in results.glob(name)):
        shutil.copy(file, reference)
    if judged := judge_folder(results): write_claims(judged, reference, label)  # a run without trainings has none
    for name, table in gather(results).items(): keep_table(table, name, reference)
    keep_further(results, reference)
    for file in (results / f for f in result_files(read_json(results / "profile.json"))):
        if not file.exists(): continue
        folder = file.parent
        about = read_about(folder) | dict(cost=read_json(folder / "cost.json"))
        write_json(reference / "runs" / f"{folder.parent.name}-{folder.name}.json", about)


if __name__ == "__main__": keep(*map(Path, sys.argv[1:]))
