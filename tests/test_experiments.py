"""The experiment notebooks, run whole."""
import json, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def start(name: str, **parameters) -> subprocess.Popen:
    "Execute an experiment notebook in a process of its own, and keep its files only."
    notebook = ROOT / "nbs" / "experiments" / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", "--kernel", "python3", "--no-progress-bar", str(notebook), "-"]
    return subprocess.Popen([*command, "-y", json.dumps(parameters)], cwd=ROOT, stdout=subprocess.DEVNULL)


def test_the_same_run_leaves_the_same_files_bit_for_bit(tmp_path):
    "Every experiment twice, in two processes at once; only its cost may differ."
    first, second = tmp_path / "a", tmp_path / "b"

    def go(name, out, **parameters):
        both = [start(name, **parameters, out=str(folder / out)) for folder in (first, second)]
        assert [process.wait() for process in both] == [0, 0], name
        files = sorted(p for p in (first / out).rglob("*") if p.is_file() and p.name != "cost.json")
        assert any(p.name == "result.json" for p in files)
        for p in files: assert p.read_bytes() == (second / p.relative_to(first)).read_bytes(), p.name

    go("prepare", "prepared", counts=dict(train=24, validation=4, test=4), max_length=448)
    go("prepare", "other", dataset="sharegpt", counts=dict(train=4, validation=4, test=4), max_length=448)
    prepared = str(first / "prepared")
    others = dict(gsm_symbolic=prepared, sharegpt=str(first / "other"))
    go("uncertainty", "uncertainty", prepared=prepared)
    uncertainty = str(first / "uncertainty")
    go("train", "train", prepared={"gsm_symbolic": prepared}, uncertainty=uncertainty, objective="random_masked_mle",
       seeds=[0, 1])
    go("train", "mle", prepared={"gsm_symbolic": prepared}, uncertainty=uncertainty, objective="mle", regime="one_pass",
       keep_states=True, track=0, seeds=[0, 1, 2])
    go("learnability", "learnability", prepared=prepared, uncertainty=uncertainty, trained=str(first / "mle"))
    go("posteriors", "posteriors", prepared=prepared, more=[])
    go("subsets", "subsets", prepared=prepared, uncertainty=uncertainty, seeds=[0])
    go("frontier", "frontier", prepared=others)
    go("why_masking", "why_masking", prepared=prepared)
    go("why_documents", "why_documents", prepared=prepared)
    go("why_curriculum", "why_curriculum", prepared=prepared, uncertainty=uncertainty)
    go("why_combined", "why_combined", prepared=prepared, others=others)
    go("answers", "answers", prepared=prepared, arms=dict(mle={}, combined={}), problems=3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    assert start("prepare", out=str(folder / "data"), counts=dict(train=16, validation=4, test=4), max_length=448).wait() == 0
    assert start("uncertainty", prepared=str(folder / "data"), out=str(folder / "uncertainty")).wait() == 0
    return dict(prepared=str(folder / "data"), uncertainty=str(folder / "uncertainty"))


@pytest.mark.parametrize("name, part, kept, table, value", [
    ("train", "seed-0", "records", "records", "nll"), ("subsets", "seed-0", "subsets", "subsets", "gain"),
    ("why_curriculum", "seed-0", "measured", "why_curriculum", "aleatoric"),
    ("posteriors", "dropout-0", "natural", "posteriors", "loss")])
def test_a_run_that_is_killed_goes_on_behind_its_last_whole_part(name, part, kept, table, value, prepared, tmp_path):
    given = dict(prepared=prepared["prepared"]) if name == "posteriors" else dict(prepared, seeds=[0, 1])
    if name == "train": given |= dict(prepared={"gsm_symbolic": prepared["prepared"]}, regime="one_pass", track=0)
    def go(out): return start(name, **given, out=str(tmp_path / out))

    whole, process, first = go("straight"), go("killed"), tmp_path / "killed/parts" / part
    while not first.exists() and process.poll() is None: time.sleep(.05)
    assert process.poll() is None
    process.kill()
    (first.parent / "of").touch()  # as the workflow vouches for it
    rows = pd.read_parquet(first / f"{kept}.parquet")
    rows.assign(**{value: rows[value] + 1}).to_parquet(first / f"{kept}.parquet")  # shows that it is read
    assert whole.wait() == go("killed").wait() == 0
    straight, killed = (pd.read_parquet(tmp_path / out / f"{table}.parquet") for out in ("straight", "killed"))
    of = straight["setting" if name == "posteriors" else "seed"]
    pd.testing.assert_frame_equal(straight.assign(**{value: straight[value] + (of == 0)}), killed, check_exact=True)
    assert not first.parent.exists()
    assert [json.loads((tmp_path / out / "cost.json").read_text())["resumed"] for out in ("straight", "killed")] == [False, True]


def test_a_file_of_ones_own_is_prepared_by_its_path_with_renamed_columns(tmp_path):
    sums = [dict(ask=f"{i} + {i}?", reply=f"{2 * i}") for i in range(150)]
    records = [dict(ask="Why?", reply=""), dict(text="no format"), *sums]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, records)))
    process = start("prepare", dataset=str(tmp_path / "sums.jsonl"), out=str(tmp_path / "out"), columns=dict(prompt="ask", completion="reply"),
                    counts=dict(train=4, validation=2, test=2))
    assert process.wait() == 0
    text = (tmp_path / "out/result.json").read_text()
    made = json.loads(text)
    assert made["left_out"]["train"] == dict(unusable=2, seen=34)
    assert made["identity"]["dataset"] == "sums" and [*made["manifest"]["data"]] == ["sums"] and str(tmp_path) not in text


def test_learnability_where_all_layers_train(tmp_path):
    "The output layer is trained with them, so every seed leaves its own; a wrong one would not give the measured losses."
    def go(name, **parameters): assert start(name, **parameters, out=str(tmp_path / name)).wait() == 0, name

    prepared, uncertainty, trained = (str(tmp_path / name) for name in ("prepare", "uncertainty", "train"))
    go("prepare", layer=0, counts=dict(train=12, validation=4, test=4), max_length=448)
    go("uncertainty", prepared=prepared)
    go("train", prepared={"gsm_symbolic": prepared}, objective="mle", regime="one_pass", keep_states=True, track=0,
       learning_rate=3e-2, seeds=[0, 1, 2])
    assert {"hidden", "weight"} == load_file(f"{trained}/states/seed-0.safetensors").keys()
    go("learnability", prepared=prepared, uncertainty=uncertainty, trained=trained)
    assert (pd.read_parquet(tmp_path / "learnability/learnability.parquet")["gain"].abs() > .1).any()
