"""Snakemake, papermill and the command line, for real: on stand-in notebooks where only the order matters, and on the real ones at smoke size."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pandas as pd, pytest
from nbformat.v4 import new_code_cell, new_notebook
from papermill import inspect_notebook

from uat_repro import cli
from uat_repro.workflow import FOLDERS, WHY, claim_folder, code_digest, figures, grid, load_profile, plan, reproduce, result_files, snakemake_command

ROOT = Path(__file__).resolve().parents[1]
TRAIN_FILES = ["curve.parquet", "records.parquet", "log.parquet", "tokens.parquet", "search.parquet", "result.json"]
FILES = {"00_prepare": ["result.json"], "10_uncertainty": ["tokens.parquet", "result.json"], "11_train": TRAIN_FILES, "29_claims": ["claims.md", "claims.json"],
         **{f"{stem}": [f"{stem.partition('_')[2]}.parquet", "result.json"] for stem in ("12_posteriors", "13_subsets")}, **{stem: [f"{stem}.parquet", "result.json"] for stem in WHY}}
PYTHON = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))


@pytest.fixture
def nbs(tmp_path):
    "Notebooks with the parameters of the real ones that only write their files."
    for real in [*(ROOT / "nbs").glob("experiments/*.ipynb"), *(ROOT / "nbs").glob("figures/*.ipynb")]:
        files = FILES.get(real.stem, ["{name}." + suffix for suffix in ("png", "csv", "html", "md")])
        defaults = "\n".join(f"{k}: {p['inferred_type_name'] or 'object'} = {p['default']}" for k, p in inspect_notebook(str(real)).items())
        body = f"from pathlib import Path\nPath(out).mkdir(parents=True, exist_ok=True)\nfor f in {files}: Path(out, f.format(**{{'name': '{real.stem.partition('_')[2]}'}} | globals())).write_text('[]')"
        node = new_notebook(cells=[new_code_cell(defaults, metadata=dict(tags=["parameters"])), new_code_cell(body)], metadata=PYTHON)
        path = tmp_path / "nbs" / real.parent.name / real.name
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(node, path)
    return tmp_path / "nbs"


@pytest.fixture
def profile(tmp_path):
    "The smallest grid: one model, one data set, one objective."
    import yaml
    from uat_repro.workflow import FLOW
    p = yaml.safe_load((FLOW / "smoke.yaml").read_text())
    p.update(models={"tiny-llama": p["models"]["tiny-llama"]}, datasets=["sharegpt"], objectives={"mle": {}}, seeds=[0], figures={},
             grid=[dict(regimes=["repeated"])], tracked=dict(regimes=["repeated"], objectives=["mle"], track=2))
    def write(**changes):
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({**p, **changes}))
        return str(tmp_path / "small.yaml")
    return write


def edit(notebook: Path, old: str, new: str) -> None:
    text = notebook.read_text()
    assert old in text
    notebook.write_text(text.replace(old, new))


def test_fails_mends_and_reruns_only_what_changed(nbs, profile, tmp_path, capfd, monkeypatch):
    work, train = tmp_path / "results", nbs / "experiments" / "11_train.ipynb"
    def go(**kw): status = reproduce(profile(**kw.pop("changes", {})), workdir=work, notebooks=nbs, **kw); return status, capfd.readouterr()
    def todo(): return {r.rule for r in plan(snakemake_command(work, nbs))}

    edit(train, "from pathlib import Path", "raise ValueError('too wet')\\nfrom pathlib import Path")
    status, said = go()
    assert status == 1 and "FAILED train sharegpt" not in said.out and "FAILED train tiny-llama sharegpt repeated mle;" in said.out
    assert said.err.rstrip().splitlines()[-3] == "ValueError: too wet"  # the traceback, then a line on what to do
    assert (work / "figures/fig2b.png").exists(), "what does not need the failed run goes on"

    edit(train, "raise ValueError('too wet')\\n", "")
    status, said = go()
    assert status == 0 and re.search(r"\[ ?1/\d+\] train tiny-llama sharegpt repeated mle +\d+ s   about \d+ s left", said.out)
    assert "prepare" not in said.out and json.loads((work / "manifest.json").read_text())["peak_gb"] > 0

    start = time.monotonic()
    assert "nothing to do" in go()[1].out and time.monotonic() - start < 20

    node = nbformat.read(train, 4)
    node.cells.insert(0, nbformat.v4.new_markdown_cell("# Words"))
    nbformat.write(node, train)
    assert todo() == set(), "prose reruns nothing"
    edit(train, "write_text('[]')", "write_text('[1]')")
    assert todo() == {"train", *(name for name, f in figures(load_profile(profile())).items() if any(r.startswith("train/") for r in f.results))}
    monkeypatch.setattr(cli, "notebooks_folder", lambda: nbs)
    with pytest.raises(ValueError, match="results are older than the code .* the first of them train tiny-llama"): cli.claims(work)
    edit(train, "write_text('[1]')", "write_text('[]')")
    assert todo() == set()
    cli.claims(work)

    with pytest.raises(ValueError, match=r"configuration \(seeds is \[0\] there and \[0, 1\] here\)"): go(changes=dict(seeds=[0, 1]))
    claim_folder(work, load_profile(profile(seeds=[0, 1])), update=True)
    assert {r.rule for r in plan(snakemake_command(work, nbs))} >= {"train", "claims"} and "uncertainty" not in todo(), "a new seed trains"
    with pytest.raises(ValueError, match="11_train.ipynb has no parameter 'bach_size', which the profile sets: did you mean 'batch_size'"):
        go(changes=dict(train=dict(bach_size=1)), update=True)


def test_goes_on_after_a_kill(nbs, profile, tmp_path, capfd):
    work = tmp_path / "results"
    edit(nbs / "experiments" / "11_train.ipynb", "from pathlib import Path", "import time; time.sleep(60)\\nfrom pathlib import Path")
    code = f"from uat_repro.workflow import reproduce; reproduce({profile()!r}, workdir={str(work)!r}, notebooks={str(nbs)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker = work / "notebooks" / "train" / "tiny-llama-sharegpt-repeated-mle.ipynb"
    deadline = time.monotonic() + 120
    while not marker.exists() and time.monotonic() < deadline: time.sleep(.2)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert any((work / ".snakemake" / "locks").iterdir()), "Snakemake's lock is left behind"
    edit(nbs / "experiments" / "11_train.ipynb", "time.sleep(60)", "time.sleep(0)")
    assert reproduce(profile(), workdir=work, notebooks=nbs) == 0
    said = capfd.readouterr().out
    assert "train" in said and "prepare" not in said, "finished runs are kept"


def test_slurm_gives_every_experiment_a_gpu():
    import yaml
    asked = yaml.safe_load((ROOT / "uat_repro" / "workflow" / "profiles" / "slurm" / "config.yaml").read_text())["set-resources"]
    assert set(asked) == set(FOLDERS) and all(r["gpu"] == 1 for r in asked.values())


def test_slurm_profile_parses(nbs, profile, tmp_path):
    work = tmp_path / "results"
    claim_folder(work, load_profile(profile()))
    assert {r.rule for r in plan(snakemake_command(work, nbs, ["fig2b"], cluster="slurm"))} == {"prepare", "uncertainty", "fig2b"}


@pytest.mark.parametrize("name", ["cpu", "cpu-full", "smoke", "paper"])
def test_profiles_fit_the_notebooks(name, tmp_path):
    p = load_profile(name)
    claim_folder(tmp_path / "results", p)
    runs = plan(snakemake_command(tmp_path / "results", ROOT / "nbs"))
    assert len(runs) == len(result_files(p)) + len(figures(p))
    assert all(p["posteriors"][k] == p["uncertainty"][k] for k in ("candidates", "samples")), "E9 shows what the rule chose from"
    assert {f"figures/{n.stem}" for n in (ROOT / "nbs" / "figures").glob("[0-9]*.ipynb")} == {f.notebook for f in figures(p).values()}, "every figure is drawn"


def test_figures_come_as_soon_as_they_can():
    "Figures 1, 2A and 2B wait for no training run, and have priority over all of them."
    text = (ROOT / "uat_repro" / "workflow" / "Snakefile").read_text()
    rules = {m[1]: int(m[2]) for m in re.finditer(r"\n *rule (\w+):(?:(?!\n *rule ).)*?priority: (\d+)", text, re.S)}
    estimates = {m[1]: int(m[2]) for m in re.finditer(r'"(\w+)": \("experiments.*, (\d+)\)', text)}
    figure = int(re.findall(r"priority: (\d+)", text)[-1])
    assert figure > estimates["uncertainty"] > rules["prepare"] > max(estimates["posteriors"], estimates["subsets"], *(estimates[why] for why in WHY)) > rules["train"]


def test_digest_of_real_notebooks_follows_the_library():
    a, b = (code_digest(ROOT / "nbs" / "experiments" / f"{n}.ipynb") for n in ("10_uncertainty", "11_train"))
    assert a != b and re.fullmatch(r"[0-9a-f]{16}", a)


def test_smoke_profile_draws_everything(tmp_path):
    "The real notebooks, under the real papermill and Snakemake, through the command line."
    work = tmp_path / "results-smoke"
    environment = {k: v for k, v in os.environ.items() if k != "UAT_REPRO_DATA_DIR"} | dict(HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", "import sys; from uat_repro.cli import main; sys.exit(main())"]
    asked = ["reproduce", "--profile", "smoke", "--workdir", str(work)]
    p = subprocess.run([*command, *asked], env=environment, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]
    assert not [f for f in result_files(load_profile("smoke")) if not (work / f).exists()]
    drawn = figures(load_profile("smoke"))
    assert set(drawn) == {"fig1", "fig2a", "fig2b", "fig2c", "fig3", "fig4", "fig5", *(f"e{n}" for n in range(6, 13)), "t1", "claims"}
    for name in set(drawn) - {"claims", "t1"}:
        assert (work / f"figures/{name}.png").stat().st_size > 5000 and len(pd.read_csv(work / f"figures/{name}.csv"))
    assert "| tiny-gemma2 |" in (work / "figures/t1.md").read_text()
    for run in grid(load_profile("smoke")):
        result = json.loads((work / FOLDERS["train"].format(**run) / "result.json").read_text())
        assert result["objective"] == run["objective"] and result["manifest"]["versions"]["torch"]
    assert str(ROOT.parent) not in "".join(f.read_text() for f in work.rglob("result.json"))
    assert {row["id"] for row in json.loads((work / "claims.json").read_text())} >= {f"C{i}" for i in range(1, 9)}
    p = subprocess.run([*command, "claims", str(work)], capture_output=True, text=True)
    assert p.returncode == 0 and "C8" in p.stdout


def test_the_same_run_leaves_the_same_files_bit_for_bit(tmp_path):
    "Every experiment twice, in two processes; only what it cost may differ."
    import papermill
    def go(name, out, **parameters):
        for k in "ab": papermill.execute_notebook(ROOT / "nbs" / "experiments" / f"{name}.ipynb", None, dict(parameters, out=str(tmp_path / k / out)), kernel_name="python3", progress_bar=False, cwd=ROOT)
        files = sorted(p for p in (tmp_path / "a" / out).rglob("*") if p.is_file() and p.name != "cost.json")
        assert any(p.name == "result.json" for p in files)
        for p in files: assert p.read_bytes() == (tmp_path / "b" / p.relative_to(tmp_path / "a")).read_bytes(), p.name
    go("00_prepare", "prepared", counts=dict(train=24, validation=4, test=4), max_length=448)
    prepared = str(tmp_path / "a" / "prepared")
    go("10_uncertainty", "uncertainty", prepared=prepared)
    go("11_train", "train", prepared={"gsm_symbolic": prepared}, uncertainty=str(tmp_path / "a" / "uncertainty"), objective="random_masked_mle", seeds=[0, 1])
    go("12_posteriors", "posteriors", prepared=prepared, more=[])
    go("13_subsets", "subsets", prepared=prepared, uncertainty=str(tmp_path / "a" / "uncertainty"), seeds=[0])
    go("00_prepare", "other", dataset="sharegpt", counts=dict(train=4, validation=4, test=4), max_length=448)
    about = dict(why_curriculum=dict(uncertainty=str(tmp_path / "a" / "uncertainty")), why_combined=dict(others={"gsm_symbolic": prepared, "sharegpt": str(tmp_path / "a" / "other")}))
    for why in WHY: go(why, why, prepared=prepared, seeds=[0, 1], **about.get(why, {}))
