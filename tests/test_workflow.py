"""Snakemake, papermill and the command line, for real: on stand-in notebooks where only the order matters, and on the real ones at smoke size."""
import ast, base64, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pandas as pd, pytest, yaml
from nbformat.v4 import new_code_cell, new_notebook

from uat_repro import workflow
from uat_repro._verify import sealed, state_of
from uat_repro.cli import main
from uat_repro.results import AXES, catalogue, claim_folder, figures, folder_of, result_files, runs_of, write_json
from uat_repro._code import code_digest, known_parameters
from uat_repro.workflow import FLOW, load_profile, parameters, plan, reproduce, snakemake_command

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS, FIGURES = catalogue()["experiments"], catalogue()["figures"]
PYTHON = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
WRITE = "from pathlib import Path\nPath(out).mkdir(parents=True, exist_ok=True)\nfor f in {}: Path(out, Path(f).name).write_text('[]')"


def stand_in(real: Path, files: list[str], path: Path) -> None:
    "A notebook with the parameters of a real one that only writes its files."
    tagged = next(c for c in nbformat.read(real, 4).cells if "parameters" in c.metadata.get("tags", []))
    cells = [new_code_cell(tagged.source, metadata=dict(tags=["parameters"])), new_code_cell(WRITE.format(files))]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=PYTHON), path)


@pytest.fixture
def nbs(tmp_path):
    "Stand-ins for all notebooks."
    for entry in EXPERIMENTS.values():
        files = [*(f"{table}.parquet" for table in entry.get("tables", ())), "result.json"]
        stand_in(ROOT / "nbs" / f"{entry['notebook']}.ipynb", files, tmp_path / "nbs" / f"{entry['notebook']}.ipynb")
    for entry in FIGURES.values():
        files = [f for other in FIGURES.values() if other["notebook"] == entry["notebook"] for f in other["files"]]
        stand_in(ROOT / "nbs" / f"{entry['notebook']}.ipynb", files, tmp_path / "nbs" / f"{entry['notebook']}.ipynb")
    return tmp_path / "nbs"


@pytest.fixture
def profile(tmp_path):
    "The smallest grid: one model, one data set, one objective; a function that writes it, with sections changed."
    p = yaml.safe_load((FLOW / "profiles" / "smoke.yaml").read_text())
    train = {k: v for k, v in p["train"].items() if k != "grid"} | dict(regimes=["repeated"], where=[dict(objectives=["mle"], track=2)])
    p.update(models={"tiny-llama": p["models"]["tiny-llama"]}, datasets={"sharegpt": {}}, objectives={"mle": {}}, seeds=[0], figures={}, train=train)
    for name in ("learnability", "answers"): del p[name]  # one trains one pass as well, one needs problems
    def write(**changes):
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({**p, **changes}))
        return str(tmp_path / "small.yaml")
    return write


def edit(notebook: Path, old: str, new: str) -> None:
    text = notebook.read_text()
    assert old in text
    notebook.write_text(text.replace(old, new))


def test_fails_mends_and_reruns_only_what_changed(nbs, profile, tmp_path, capfd):
    work, train = tmp_path / "results", nbs / "experiments" / "train.ipynb"
    def go(**kw): status = reproduce(profile(**kw.pop("changes", {})), workdir=work, notebooks=nbs, **kw); return status, capfd.readouterr()
    def todo(): return {r.rule for r in plan(snakemake_command(work, nbs))}

    edit(train, "from pathlib import Path", "raise ValueError('too wet')\\nfrom pathlib import Path")
    status, said = go()
    assert status == 1 and "FAILED train sharegpt" not in said.out and "FAILED train tiny-llama sharegpt repeated mle;" in said.out
    assert said.err.rstrip().splitlines()[-3] == "ValueError: too wet"  # the traceback, then a line on what to do
    assert said.out.count("FAILED") == 1, said.err
    assert (work / "figures/fig2b.png").exists(), "what does not need the failed run goes on"

    edit(train, "raise ValueError('too wet')\\n", "")
    status, said = go()
    assert status == 0 and re.search(r"\[ ?1/\d+\] train tiny-llama sharegpt repeated mle +\d+ s   about \d+ s left", said.out)
    assert "prepare" not in said.out and json.loads((work / "manifest.json").read_text())["peak_gb"] > 0

    assert "nothing to do" in go()[1].out

    node = nbformat.read(train, 4)
    node.cells.insert(0, nbformat.v4.new_markdown_cell("# Words"))
    nbformat.write(node, train)
    assert todo() == set(), "prose reruns nothing"
    edit(train, "write_text('[]')", "write_text('[1]')")
    assert todo() == {"train", *(name for name, reads in figures(load_profile(profile())).items() if any(r.startswith("train/") for r in reads))}
    assert {state_of(work, run.notebook) for run in plan(snakemake_command(work, nbs))} == {"stale"}, "figures as well"
    edit(train, "write_text('[1]')", "write_text('[]')")
    assert todo() == set()

    with pytest.raises(ValueError, match=r"configuration \(seeds is \[0\] there and \[0, 1\] here\)"): go(changes=dict(seeds=[0, 1]))
    claim_folder(work, load_profile(profile(seeds=[0, 1])), update=True)
    assert {r.rule for r in plan(snakemake_command(work, nbs))} >= {"train", "claims"} and "uncertainty" not in todo(), "a new seed trains"


def test_finished_runs_go_on_elsewhere_unless_they_were_made_from_something_else(nbs, profile, tmp_path, monkeypatch, capfd):
    "As one does it: pack the folder of results, carry it on, import it, reproduce."
    made = dict(identity=dict(model="tiny-llama", trained_on="sharegpt"), manifest=dict(data=dict(sharegpt="a"), weights={"tiny-llama": "w"}))
    for entry in EXPERIMENTS.values():
        seal = f"\\nfrom uat_repro._verify import sealed; from uat_repro.results import write_json; write_json(Path(out, 'result.json'), sealed({made}, out))"
        edit(nbs / f"{entry['notebook']}.ipynb", "write_text('[]')", "write_text('[]')" + seal)
    monkeypatch.setattr("uat_repro.results.notebooks_folder", lambda: nbs)
    work, train = tmp_path / "results", nbs / "experiments" / "train.ipynb"
    assert reproduce(profile(), workdir=work, notebooks=nbs) == 0
    def take(source, into):
        "What `uat-repro import` says, and its exit status."
        capfd.readouterr()
        status = main(["import", str(source), "--workdir", str(tmp_path / into)])
        return status, capfd.readouterr().out.replace(f"{tmp_path}/", "")
    def todo(into): return {run.rule for run in plan(snakemake_command(tmp_path / into, nbs)) if run.rule in EXPERIMENTS}
    runs = len(result_files(load_profile(profile())))
    packed = shutil.make_archive(str(tmp_path / "runs"), "gztar", tmp_path, "results")

    assert take(packed, "there") == (0, f"{runs} runs taken into there\n") and todo("there") == set()
    assert take(packed, "there") == (0, "0 runs taken into there\n")

    edit(train, "write_text('[]')", "write_text('[1]')")
    assert take(packed, "newer") == (1, f"train tiny-llama sharegpt repeated mle is stale here: its code, its data, or what it reads is another\n{runs} runs taken into newer\n")
    assert todo("newer") == {"train"}
    edit(train, "write_text('[1]')", "write_text('[]')")

    deep = tmp_path / "a" / "b" / "results"
    shutil.copytree(work, deep)
    assert plan(snakemake_command(deep, nbs)) == [], "at another depth"
    (work / "train/tiny-llama-sharegpt-repeated-mle/._log.parquet").write_text("as a Mac leaves it")
    mark = tmp_path / "late" / ".snakemake" / "incomplete" / base64.urlsafe_b64encode(b"train/tiny-llama-sharegpt-repeated-mle/result.json").decode()
    mark.parent.mkdir(parents=True)
    mark.write_text("")  # of a run that was killed here
    assert take(work, "late") == (0, f"{runs} runs taken into late\n") and todo("late") == set()

    shutil.copytree(work, tmp_path / "shown", ignore=shutil.ignore_patterns(".*"))
    status, said = take(tmp_path / "shown", "bare")
    assert status == 1 and said.count("has no records of Snakemake") == runs and said.endswith("0 runs taken into bare\n")

    prepared = tmp_path / "mine" / "prepare" / "tiny-llama-sharegpt"
    claim_folder(tmp_path / "mine", load_profile(profile()))
    prepared.mkdir(parents=True)
    write_json(prepared / "result.json", sealed(made | dict(manifest=dict(data=dict(sharegpt="b"), weights={"tiny-llama": "w"})), prepared))
    status, said = take(packed, "mine")
    assert status == 1 and said.count("was made from other records of sharegpt, or other weights, than those here") == runs - 1

    unsealed = work / "train" / "tiny-llama-sharegpt-repeated-mle" / "result.json"
    unsealed.write_text("{}")
    assert "train/tiny-llama-sharegpt-repeated-mle has no hashes of its files" in take(work, "unsealed")[1]


@pytest.mark.parametrize("changes, message", [
    (dict(train=dict(bach_size=1)), "section 'train' sets 'bach_size', which experiments/train.ipynb does not have: did you mean 'batch_size'?"),
    (dict(objectives=dict(mle={}, unused=dict(chnages={}))), "'chnages', .* did you mean 'changes'?"),
    (dict(figures=dict(fig4=dict(panel=2))), "section 'fig4' sets 'panel', .* did you mean 'panels'?"),
    (dict(train=dict(objective="mle")), "section 'train' sets 'objective', which each run has of its own: name the runs that are meant by objectives"),
    (dict(uncertainty=dict(prepared="x")), "section 'uncertainty' sets 'prepared', which each run has of its own: leave it out"),
    (dict(models={"tiny-llama": dict(spec="tiny-llama", datasets=["sharegpt"]), "tiny": dict(spec="tiny-llama", datasets=["llama-sharegpt"])}, datasets={"sharegpt": {}, "llama-sharegpt": {}}),
     "two runs of profile small would share prepare/tiny-llama-sharegpt"),
    (dict(models={"a+b": dict(spec="tiny-llama", layer=1)}), "'a.b' under 'models' of profile small names folders"),
    (dict(datasets={"sharegpt": {}, "sharegtp": {}}), "data set 'sharegtp' is not known and has no files in --data-dir: did you mean 'sharegpt'?"),
    (dict(datasets=dict(sharegpt=None)), "'sharegpt' under 'datasets' of profile small is None: make it names with values"),
])
def test_wrong_parameters_are_refused(nbs, profile, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")): reproduce(profile(**changes), workdir=tmp_path / "results", notebooks=nbs)


def test_an_experiment_that_nothing_is_there_for_is_refused(nbs, profile, tmp_path):
    Path(profile()).write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(Path(profile()).read_text()).items() if k != "uncertainty"}))
    with pytest.raises(ValueError, match="reads uncertainty, for which the profile has no section: add it"):
        reproduce(str(tmp_path / "small.yaml"), workdir=tmp_path / "results", notebooks=nbs)


def test_code_that_is_no_python_is_refused(nbs, profile, tmp_path):
    edit(nbs / "experiments" / "train.ipynb", "from pathlib import Path", "from pathlib import")
    with pytest.raises(ValueError, match="experiments/train.ipynb, or a module that it uses, is no valid Python: .*from pathlib import"):
        reproduce(profile(), workdir=tmp_path / "results", notebooks=nbs, dry_run=True)


def test_runs_without_a_record_of_what_they_were_made_of_are_not_gone_on_over(nbs, profile, tmp_path, capfd):
    "Snakemake takes them for fresh, whatever their parameters were."
    work = tmp_path / "results"
    assert reproduce(profile(), only="fig2b", workdir=work, notebooks=nbs) == 0
    shutil.copytree(work, tmp_path / "plain", ignore=shutil.ignore_patterns(".*"))
    with pytest.raises(ValueError, match="2 finished runs in .*plain have no record of what they were made of, first prepare/"):
        reproduce(profile(), only="fig2b", workdir=tmp_path / "plain", notebooks=nbs)
    assert (tmp_path / "plain/prepare/tiny-llama-sharegpt/result.json").exists()


def test_code_that_is_edited_while_runs_go_on_is_not_run(nbs, profile, tmp_path):
    "A run edits the next one's notebook."
    work, uncertainty = tmp_path / "results", nbs / "experiments" / "uncertainty.ipynb"
    edit(nbs / "experiments" / "prepare.ipynb", "from pathlib import Path",
         f"from pathlib import Path\\nnext_one = Path({str(uncertainty)!r})\\n"
         "next_one.write_text(next_one.read_text().replace('[]', '[1]'))")
    assert reproduce(profile(), only="fig2b", workdir=work, notebooks=nbs) == 1
    assert "the code has changed since this command began: run it again" in (work / "snakemake.log").read_text()
    assert not (work / "uncertainty/tiny-llama-sharegpt/result.json").exists()


def test_the_data_folder_is_found_under_any_name_and_missed_where_it_is_forgotten(nbs, profile, tmp_path, capfd):
    work, data = tmp_path / "results", tmp_path / "my 'data' #1: a"
    data.mkdir()
    (data / "sharegpt.json").write_text("[1]")
    asked = dict(only="fig2b", workdir=work, notebooks=nbs)
    assert reproduce(profile(), data_dir=data, **asked) == 0
    (data / "sharegpt.json").write_text("[2]")
    capfd.readouterr()
    assert reproduce(profile(), data_dir=data, **asked) == 0 and "prepare tiny-llama" in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"from_data_dir is \['sharegpt'\] there and None here"): reproduce(profile(), **asked)
    for command in "status", "verify", "claims":
        assert main([command, str(work)]) == 1
        assert "was made from your files of sharegpt: name their folder by --data-dir" in capfd.readouterr().err


def test_a_folder_that_is_none_of_ours_is_looked_at_and_left_alone(nbs, profile, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert reproduce(profile(), only="fig2b", workdir=tmp_path / "mine", notebooks=nbs, dry_run=True) == 0
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_linked_folder_of_results(nbs, profile, tmp_path, capfd):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert reproduce(profile(), only="fig2b", workdir=tmp_path / "link", notebooks=nbs) == 0
    assert (tmp_path / "far/away/figures/fig2b.png").exists()


def test_goes_on_after_a_kill(nbs, profile, tmp_path, capfd):
    work = tmp_path / "results"
    edit(nbs / "experiments" / "train.ipynb", "from pathlib import Path", "import time; time.sleep(60)\\nfrom pathlib import Path")
    code = f"from uat_repro.workflow import reproduce; reproduce({profile()!r}, workdir={str(work)!r}, notebooks={str(nbs)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    marker = work / "notebooks" / "train" / "tiny-llama-sharegpt-repeated-mle.ipynb"
    deadline = time.monotonic() + 120
    while not marker.exists() and time.monotonic() < deadline: time.sleep(.2)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert any((work / ".snakemake" / "locks").iterdir()), "Snakemake's lock is left behind"
    write_json(work / "train/tiny-llama-sharegpt-repeated-mle/result.json", {})  # as a notebook does that outlives it
    edit(nbs / "experiments" / "train.ipynb", "time.sleep(60)", "time.sleep(0)")
    assert reproduce(profile(), workdir=work, notebooks=nbs) == 0
    said = capfd.readouterr().out
    assert "train" in said and "prepare" not in said, "finished runs are kept, and others are made again"


def test_a_kernel_that_dies_at_its_start_is_started_once_more(nbs, profile, tmp_path, monkeypatch, capfd):
    spec, died = tmp_path / "jupyter/kernels/python3", tmp_path / "died"
    spec.mkdir(parents=True)
    once = "import pathlib, runpy, sys; died = pathlib.Path(sys.argv.pop(1)); died.exists() or sys.exit(died.write_text('')); runpy.run_module('ipykernel_launcher', run_name='__main__')"
    write_json(spec / "kernel.json", dict(argv=[sys.executable, "-c", once, str(died), "-f", "{connection_file}"], display_name="python3", language="python"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert reproduce(profile(), only="fig2b", workdir=tmp_path / "results", notebooks=nbs, cores=1) == 0, capfd.readouterr().err
    assert died.exists()


def test_a_run_keeps_its_parts_for_the_next_start_of_the_same_run_only(nbs, profile, tmp_path, capfd):
    "The first start of a run fails after its first part."
    edit(nbs / "experiments" / "train.ipynb", "from pathlib import Path", "from pathlib import Path\\npart = Path(out, 'parts', 'seed-0')\\n"
         "if not part.exists():\\n    part.mkdir()\\n    1 / 0")
    train = yaml.safe_load(Path(profile()).read_text())["train"]
    for samples, status in ((4, 1), (4, 0), (5, 1), (5, 0)):
        written = profile(train=train | dict(samples=samples))
        assert reproduce(written, workdir=tmp_path / "results", notebooks=nbs, update=True) == status, capfd.readouterr()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_it_interrupts_its_runs_and_says_so(number, nbs, profile, tmp_path):
    work, slow = tmp_path / "results", "import time; time.sleep(600)\\nfrom pathlib import Path"
    edit(nbs / "experiments" / "prepare.ipynb", "from pathlib import Path", slow)
    code = ("import sys; from uat_repro import cli, workflow; from functools import partial; "
            f"workflow.reproduce = partial(workflow.reproduce, notebooks={str(nbs)!r}); sys.exit(cli.main())")
    command = [sys.executable, "-c", code, "reproduce", "--profile", profile(), "--workdir", str(work)]
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # also where the tests themselves run under nohup
    child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             preexec_fn=heard)
    deadline = time.monotonic() + 120
    while not (work / "notebooks/prepare").exists() and time.monotonic() < deadline: time.sleep(.2)
    child.send_signal(number)
    said = child.communicate(timeout=300)[1]  # it does not wait for the run
    assert child.returncode == 128 + number and "stopped: the same command goes on from here" in said


def test_what_is_altered_or_made_of_other_data_is_made_again(nbs, profile, tmp_path, capfd):
    work, data = tmp_path / "results", tmp_path / "data"
    data.mkdir()
    (data / "sharegpt.json").write_text("[1]")
    def go():
        assert reproduce(profile(), only="fig2b", workdir=work, notebooks=nbs, data_dir=data) == 0
        return capfd.readouterr().out
    go()
    run = work / "uncertainty/tiny-llama-sharegpt"
    write_json(run / "result.json", sealed({}, run))
    (run / "tokens.parquet").write_text("[")
    os.utime(run / "tokens.parquet")  # newer than all that it was made of
    said = go()
    assert f"{run / 'tokens.parquet'} is altered: it is made again" in said and "uncertainty tiny-llama" in said and "prepare" not in said
    (work / "figures/fig2b.csv").write_text("nicer")
    (work / "figures/fig2b_mine.csv").write_text("a table of the user's own")
    assert f"{work / 'figures/fig2b.csv'} is altered: it is made again" in go() and (work / "figures/fig2b.csv").read_text() == "[]"
    assert (work / "figures/fig2b_mine.csv").exists()
    (work / "prepare/tiny-llama-sharegpt/result.json").unlink()  # below results that are there
    assert "prepare tiny-llama" in go()
    os.utime(data / "sharegpt.json")
    assert "nothing to do" in go()
    (data / "sharegpt.json").write_text("[2]")
    assert "prepare tiny-llama" in go()


def test_an_update_that_cannot_be_planned_changes_nothing(nbs, profile, tmp_path):
    work = tmp_path / "results"
    claim_folder(work, load_profile(profile()))
    with pytest.raises(ValueError, match="bach_size"): reproduce(profile(train=dict(bach_size=1)), workdir=work, notebooks=nbs, update=True)
    assert json.loads((work / "profile.json").read_text())["train"].get("bach_size") is None


def test_a_folder_with_a_leading_dash(nbs, profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce(profile(), only="fig2b", workdir="-odd", notebooks=nbs) == 0 and Path("-odd/figures/fig2b.png").exists()


def test_a_profile_that_is_no_yaml_is_named(tmp_path):
    for text, why in ("a: [", "is no valid YAML"), ("- a", "holds a list: make it sections"), ("seeds: [0]\nseeds: [1]", "is no valid YAML: line 1 and what follows name 'seeds' twice"):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"mine.yaml {why}"): load_profile(str(tmp_path / "mine.yaml"))


def test_paper_asks_for_a_gpu_for_every_experiment():
    paper = load_profile("paper")
    assert EXPERIMENTS.keys() - paper.keys() == {"answers"}  # for those it has benchmarks
    assert all(paper[e]["resources"]["gpu"] == 1 and paper[e]["seconds"] > 0 for e in EXPERIMENTS if e in paper)


@pytest.mark.parametrize("given, seen", [(None, ["0"] * 2), ("", [""] * 2), ("2", ["2"] * 2), ("3,1", ["3", "1", "3"])])
def test_runs_take_turns_on_the_gpus_that_were_given(given, seen, tmp_path):
    "Runs at the same time, and then one more, when the first has ended and its GPU is free."
    (tmp_path / ".snakemake").mkdir()
    turn, start = (ast.literal_eval(re.search(rf"{name} = (\(.*?\n\))", (FLOW / "Snakefile").read_text(), re.S)[1])
                   for name in ("TURN", "PAPERMILL"))
    shell = (turn + start.partition("{PYTHON")[0]).replace("{{", "{").replace("}}", "}") + "bash -c 'printenv CUDA_VISIBLE_DEVICES; read'"
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | ({} if given is None else dict(CUDA_VISIBLE_DEVICES=given))

    def begin():
        runs.append(subprocess.Popen(["bash", "-euc", shell], env=env, cwd=tmp_path, text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return runs[-1].stdout.readline().strip()

    runs = []
    found = [begin(), begin()]
    runs[0].communicate("\n")
    if len(seen) == 3: found.append(begin())
    for run in runs[1:]: run.communicate("\n")
    assert found == seen
    if given != "3,1": return
    (tmp_path / "bin").mkdir()  # a machine whose lock does not work ends at once, and says so
    (tmp_path / "bin/flock").write_text("#!/bin/sh\nexit 1")
    (tmp_path / "bin/flock").chmod(0o755)
    env["PATH"] = f"{tmp_path}/bin:{env['PATH']}"
    assert subprocess.run(["bash", "-euc", shell], env=env, cwd=tmp_path, timeout=20, stdin=subprocess.DEVNULL).returncode == 1


@pytest.mark.parametrize("needs, together", [(400, True), (600, False)])
def test_runs_share_a_gpu_while_their_memory_fits(nbs, profile, tmp_path, needs, together):
    "Each run waits for another one to begin, and tells how many it saw."
    count = "len([*Path(out).parent.glob('*/begun')])"
    wait = (f"began = time.time()\\nwhile {count} < 2 and time.time() - began < {100 if together else 4}: time.sleep(.1)\\n"
            f"Path(out, 'result.json').write_text(str({count}))")
    took = "Path(out, 'begun').touch()\\n" + wait
    edit(nbs / "experiments" / "prepare.ipynb", "from pathlib import Path", "import time\\nfrom pathlib import Path")
    edit(nbs / "experiments" / "prepare.ipynb", ".write_text('[]')", f".write_text('[]')\\n{took}")
    work = tmp_path / "results"
    claim_folder(work, load_profile(profile(datasets=dict(sharegpt={}, gsm_symbolic={}))))
    command = snakemake_command(work, nbs, cores=2, gpu_runs=2, gpu_mb=(1000, {"tiny-llama": needs}))
    where = [dict(model="tiny-llama", dataset=d) for d in ("sharegpt", "gsm_symbolic")]
    targets = [f"{folder_of('prepare', place)}/result.json" for place in where]
    subprocess.run([*command[:3], *targets, *command[3:]], check=True, capture_output=True)
    assert sorted((work / t).read_text() for t in targets) == (["2", "2"] if together else ["1", "2"])


SLURM = """#!/bin/sh
# A pretended Slurm: a job runs while it is submitted, and sees the GPUs that it asked for.
case $(basename "$0") in
  sbatch)
    echo "$@" >> {here}/submitted
    for option in "$@"; do case $option in --gpus=*) gpus=0;; --wrap=*) job=${{option#--wrap=}};; esac; done
    id=$(wc -l < {here}/submitted)
    SLURM_JOB_ID=$id CUDA_VISIBLE_DEVICES=${{gpus:-}} sh -c "$job" > {here}/$id.log 2>&1 && end=COMPLETED || end=FAILED
    echo "$id|$end" >> {here}/ended
    echo $id;;
  squeue) cat {here}/ended;;
  srun) while [ "${{1#-}}" != "$1" ]; do shift; done; exec "$@";;
  sacctmgr) echo my_account;;
  scontrol) echo "MinJobAge = 300 sec";;
esac
"""


def test_slurm_gives_a_run_the_gpu_that_its_section_asks_for(nbs, profile, tmp_path, monkeypatch):
    "The configuration as it is shipped, but for the seconds between questions; the job ends with its result."
    here, work = tmp_path / "slurm", tmp_path / "results"
    shutil.copytree(FLOW / "clusters/slurm", here)
    with (here / "config.yaml").open("a") as f: f.write("slurm-init-seconds-before-status-checks: 1\nseconds-between-status-checks: 1\n")
    for name in ("sbatch", "squeue", "srun", "sacctmgr", "scontrol", "sinfo"):
        (here / name).write_text(SLURM.format(here=here))
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    for notebook in ("prepare", "uncertainty"):
        edit(nbs / f"experiments/{notebook}.ipynb", "write_text('[]')", "write_text(__import__('os').environ['CUDA_VISIBLE_DEVICES'])")
    small = yaml.safe_load(Path(profile()).read_text())
    given = dict(load_profile("paper")["uncertainty"]["resources"])
    claim_folder(work, load_profile(profile(uncertainty=small["uncertainty"] | dict(resources=given))))
    subprocess.run(snakemake_command(work, nbs, ["fig2b"], cluster=str(here)), check=True, capture_output=True)
    prepare, uncertainty, fig2b = (here / "submitted").read_text().splitlines()
    assert "-p gpu -t 240 --mem 32000" in uncertainty and "--gpus=1" in uncertainty and "--cpus-per-task=4" in uncertainty
    assert not any("--gpus" in line or "-p gpu" in line for line in (prepare, fig2b))
    place = dict(model="tiny-llama", dataset="sharegpt")
    assert [(work / folder_of(run, place) / "result.json").read_text() for run in ("prepare", "uncertainty")] == ["", "0"]


def test_catalogue_has_no_unknown_key():
    keys = dict(experiments={"notebook", "axes", "settings", "reads", "data_dir", "tables", "priority", "resources", "section", "example"},
                figures={"notebook", "title", "section", "reads", "files"})
    for kind, entries in catalogue().items():
        for name, entry in entries.items():
            assert set(entry) <= keys[kind] and {"notebook", "section"} <= set(entry), name
            for rule in (entry["reads"].values() if kind == "experiments" and "reads" in entry else entry.get("reads", ())):
                assert (rule if isinstance(rule, str) else rule["experiment"]) in EXPERIMENTS, name
    assert all(set(e["axes"]) <= set(AXES) and e["priority"] and e["resources"] for e in EXPERIMENTS.values())


@pytest.mark.parametrize("name", ["cpu", "cpu-full", "cpu-families", "cpu-repeated", "cpu-chat", "cpu-1b", "gpu", "smoke", "paper"])
def test_profiles_fit_the_notebooks(name, tmp_path):
    p = load_profile(name)
    claim_folder(tmp_path / "results", p)
    runs = plan(snakemake_command(tmp_path / "results", ROOT / "nbs"))
    assert len(runs) == len(result_files(p)) + len(figures(p))
    assert all(p[e]["seconds"] for e in EXPERIMENTS if e in p) and p["figures"]["seconds"]
    if name in ("cpu", "cpu-families", "cpu-repeated", "cpu-chat", "cpu-1b", "gpu"): return  # they leave everything else to cpu-full
    assert p["posteriors"]["candidates"] == p["uncertainty"]["candidates"], "E9 shows what the rule chose from"
    possible = [f for f in FIGURES.values() if any(runs_of(p, experiment) for experiment in f["reads"])]
    assert {FIGURES[f]["notebook"] for f in figures(p)} == {f["notebook"] for f in possible}, "every figure notebook is used"
    assert name != "smoke" or len(possible) == len(FIGURES)


@pytest.mark.parametrize("name", sorted(p.stem for p in (FLOW / "profiles").glob("*.yaml")))
def test_what_other_results_read_is_kept_by_the_training_runs(name, tmp_path):
    "Lists of a profile replace those of its base, so what the base asked for can be lost."
    for dataset in ("alpaca", "gsm8k"): (tmp_path / f"{dataset}.json").write_text("[]")
    conf = load_profile(name, tmp_path)
    for run in runs_of(conf, "learnability"):
        assert parameters(conf, "train", regime="one_pass", objective="mle", **run)["keep_states"]
    followed = [run for run in runs_of(conf, "train") if parameters(conf, "train", **run).get("track")]
    assert followed or "fig4" not in figures(conf)


def test_figures_come_as_soon_as_they_can():
    "Figures 1, 2A and 2B wait for no training run, and have priority over all of them."
    urgency = {name: entry["priority"] for name, entry in EXPERIMENTS.items()}
    figure = int(re.findall(r"priority: (\d+)", (FLOW / "Snakefile").read_text())[-1])
    others = [p for name, p in urgency.items() if name not in ("uncertainty", "prepare", "train")]
    assert figure > urgency["uncertainty"] > urgency["prepare"] > max(others) and min(others) > urgency["train"]


def test_digest_of_real_notebooks_follows_the_library():
    a, b = (code_digest(ROOT / "nbs" / "experiments" / f"{n}.ipynb") for n in ("uncertainty", "train"))
    assert a != b and re.fullmatch(r"[0-9a-f]{16}", a)


def test_events_are_snakemakes_own():
    "The names of events and fields that we read are those of the installed Snakemake."
    from snakemake_interface_logger_plugins.common import LogEvent
    assert {"job_info", "job_finished", "job_error", "error"} <= {str(e) for e in LogEvent}


def test_parameters_are_those_that_papermill_sees():
    from papermill import inspect_notebook
    for entry in (*EXPERIMENTS.values(), *FIGURES.values()):
        path = ROOT / "nbs" / f"{entry['notebook']}.ipynb"
        assert known_parameters(path) == list(inspect_notebook(str(path)))


def test_smoke_profile_draws_everything(tmp_path):
    "The real notebooks, under the real papermill and Snakemake, through the command line."
    work, smoke = tmp_path / "results-smoke", load_profile("smoke")
    environment = os.environ | dict(HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", "import sys; from uat_repro.cli import main; sys.exit(main())"]
    asked = ["reproduce", "--profile", "smoke", "--workdir", str(work)]
    p = subprocess.run([*command, *asked], env=environment, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]
    assert not [f for f in result_files(smoke) if not (work / f).exists()]
    assert set(figures(smoke)) == set(FIGURES)
    for name in set(FIGURES) - {"claims", "t1"}:
        assert (work / f"figures/{name}.png").stat().st_size > 5000 and len(pd.read_csv(work / f"figures/{name}.csv"))
    assert "| tiny Gemma 2 (random) |" in (work / "figures/t1.md").read_text()
    for run in runs_of(smoke, "train"):
        result = json.loads((work / folder_of("train", run) / "result.json").read_text())
        assert result["identity"]["objective"] == run["objective"] and result["manifest"]["versions"]["torch"]
    assert str(ROOT.parent) not in "".join(f.read_text() for f in work.rglob("result.json"))
    judged = json.loads((work / "claims.json").read_text())["claims"]
    assert {claim["id"] for claim in judged} >= {f"C{i}" for i in range(1, 9)}
    p = subprocess.run([*command, "claims", str(work)], env=environment, capture_output=True, text=True)
    assert p.returncode == 0 and "C8" in p.stdout


def test_the_gpu_profile_runs_without_one_at_smoke_size(tmp_path):
    "Its own switches (all layers, precision, benchmarks, followed tokens, kept states), on a tiny model and few records."
    gpu = yaml.safe_load((FLOW / "profiles" / "gpu.yaml").read_text())
    kept = {k: gpu[k] for k in ("prepare", "uncertainty", "untrained", "train", "regimes", "objectives", "figures")}
    few = dict(kept, models={"tiny-llama": dict(spec="tiny-llama", layer=0)}, seeds=[0], objectives={"mle": {}, "masked_mle": {}})
    few["datasets"] = {name: dict(how, max_length=900, counts=dict(train=8, validation=4, test=4), min_response=4) for name, how in gpu["datasets"].items()}
    few["uncertainty"] |= dict(candidates=gpu["uncertainty"]["candidates"][:2], samples=4, datasets=["gsm8k"])
    small = dict(tasks=["gsm8k"], limit=2, max_new_tokens=4, batch_size=2)
    few["untrained"] |= dict(models=["tiny-llama"], benchmarks=small)
    few["train"] |= dict(batch_size=4, samples=4, grid=[dict(datasets=["gsm8k"], regimes=[r], objectives=["masked_mle"]) for r in gpu["regimes"]])
    for block in few["train"]["where"]:
        if "benchmarks" in block: block.update(models=["tiny-llama"], benchmarks=small)
        if "track" in block: block.update(track=2, track_every=1)
    few["regimes"] = {name: dict(how, documents=4, epochs=min(2, how["epochs"]), seeds=[0]) for name, how in gpu["regimes"].items()}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(few))
    sums = [(f"What is {i} + {i}?", f"{i} + {i} = {2 * i}\n#### {2 * i}") for i in range(120)]
    problems = [dict(question=q, answer=a) for q, a in sums]
    files = dict(gsm8k_train=problems[:90], gsm8k_test=problems[90:], alpaca=[dict(instruction=q, input="", output=a) for q, a in sums],
                 sharegpt=[dict(id=str(i), conversations=[{"from": "human", "value": q}, {"from": "gpt", "value": a}]) for i, (q, a) in enumerate(sums)])
    (tmp_path / "data").mkdir()
    for name, records in files.items():
        ending, text = ("jsonl", "\n".join(map(json.dumps, records))) if "gsm8k" in name else ("json", json.dumps(records))
        (tmp_path / "data" / f"{name}.{ending}").write_text(text)
    assert reproduce(str(tmp_path / "small.yaml"), only="t1", workdir=tmp_path / "results", data_dir=tmp_path / "data", notebooks=ROOT / "nbs") == 0
    table = (tmp_path / "results/figures/t1.md").read_text()
    assert all(said in table for said in ("initial model", "masked MLE", "one pass", "repeated passes", "exact_match"))


@pytest.mark.parametrize("package", ["snakemake", "papermill", "ipykernel"])
def test_a_package_of_the_workflow_that_is_missing_is_one_line(package, monkeypatch):
    monkeypatch.setattr(workflow, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(ImportError, match=rf"the package {package} is missing: run `pip install 'uat_repro\[reproduce\]'`"):
        plan(["never started"])
