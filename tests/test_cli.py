"""The command line starts fast, and a script can rely on its exit status."""
import json, os, re, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from uat_repro import _doctor, _tasks, cli, workflow
from uat_repro.masking import select_tokens
from uat_repro.models import load_model, tiny_model, tiny_tokenizer, weights_hash
from uat_repro._files import file_hash
from uat_repro._verify import sealed
from uat_repro.results import read_json, result_files, write_json
from uat_repro.tokens import Collator, encode_all
from uat_repro.workflow import load_profile


def test_help_and_a_misspelt_option_need_no_large_package():
    code = ("import sys; from uat_repro.cli import main; status = main(sys.argv[1:]); "
            "print({'matplotlib', 'numpy', 'pandas', 'scipy', 'torch', 'transformers'} & {*sys.modules}); sys.exit(status)")
    for *arguments, status in (("--help", 0), ("train", "--help", 0), ("--hlep", 2), ("reproduce", "--cors", 2)):
        p = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert p.returncode == status and p.stdout.splitlines()[-1] == "set()"


WITHOUT = """
import importlib.metadata as metadata, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == module: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def version(name):
    if name == package: raise metadata.PackageNotFoundError(name)
    return there(name)
package, module = sys.argv[1:]
there, metadata.version = metadata.version, version
sys.meta_path.insert(0, Absent())
from uat_repro.cli import main
sys.exit(main(["--debug", "doctor", "--timeout", ".1"]))
"""

@pytest.mark.parametrize("package", ["numpy", "pandas", "scipy", "snakemake", "torch", "packaging", "pyyaml"])
def test_doctor_names_a_package_that_is_missing(package):
    module = dict(pyyaml="yaml").get(package, package)
    p = subprocess.run([sys.executable, "-c", WITHOUT, package, module], capture_output=True, text=True)
    assert p.returncode == 1 and "Traceback" not in p.stderr
    assert f"--  {package:22} not installed: pip install '{package}" in p.stdout
    assert all(package in line for line in p.stdout.splitlines() if line.startswith("profile "))


def test_doctor_names_a_package_whose_modules_are_gone():
    p = subprocess.run([sys.executable, "-c", WITHOUT, "", "pandas"], capture_output=True, text=True)
    assert p.returncode == 1 and "Traceback" not in p.stderr and "profile smoke    lacks pandas" in p.stdout


def test_there_are_no_progress_bars_in_a_file():
    code = "from uat_repro.cli import main; main(['--version']); from tqdm.auto import tqdm; list(tqdm(range(3)))"
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stderr == ""


def test_results_that_are_stale_or_missing_are_refused(tmp_path, monkeypatch, capsys):
    profile, stale = load_profile("smoke"), []
    write_json(tmp_path / "profile.json", profile)
    (tmp_path / "claims.md").write_text("# Claims\n")
    monkeypatch.setattr(workflow, "plan", lambda command: stale)
    assert cli.main(["claims", str(tmp_path)]) == 1 and "results are missing" in capsys.readouterr().err
    for file in result_files(profile): write_json(tmp_path / file, {})
    assert cli.main(["claims", str(tmp_path)]) == 0
    run = (tmp_path / result_files(profile)[0]).parent
    write_json(run / "result.json", sealed({}, run))
    (run / "more.parquet").touch()
    assert cli.main(["claims", str(tmp_path)]) == 1
    assert "1 files are not as their runs left them, first" in capsys.readouterr().err
    (run / "more.parquet").unlink()
    stale.append("train tiny-llama")
    assert cli.main(["claims", str(tmp_path)]) == 1
    assert "1 results are older than their code or data, first train tiny-llama" in capsys.readouterr().err


def test_marked_tokens_are_those_that_the_objective_would_select():
    loss = torch.randint(0, 5, (3, 10), generator=torch.Generator().manual_seed(0)).float()  # with ties
    tokens = pd.DataFrame(dict(record=np.repeat(["b", "a", "c"], 10), loss=loss.flatten().numpy()))
    expected = select_tokens(loss, torch.ones_like(loss, dtype=torch.bool), keep=.25, scope="sequence")
    assert _tasks.mark_selected(tokens).selected.tolist() == expected.flatten().tolist()


@pytest.mark.parametrize("command", ["reproduce", "claims", "doctor"])
def test_a_data_folder_that_is_not_there_is_refused(command, capsys):
    assert cli.main([command, "--data-dir", "nowhere"]) == 2 and "nowhere" in capsys.readouterr().err


def test_a_package_is_told_from_other_findings_by_its_kind():
    odd = _doctor.Finding("package", "name with spaces", False)
    assert _doctor.runnable([odd])["smoke"] == ["name with spaces"]
    assert _doctor.runnable([_doctor.Finding("machine", "memory", False)])["smoke"] == []


def test_a_reference_of_another_tokenizer_is_refused(tmp_path, capsys):
    model, tokenizer = load_model("tiny-llama")
    model.save_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    data = "\n".join(json.dumps(dict(question=f"{i} + {i}?", answer=f"{2 * i}")) for i in range(40))
    (tmp_path / "sums.jsonl").write_text(data)
    asked = ["train", "sums.jsonl", "--model", "tiny-llama", "--objective", "rho1", "--reference", "other",
             "--out", "out"]
    paths = [str(tmp_path / a) if a in ("sums.jsonl", "other", "out") else a for a in asked]
    assert cli.main(paths) == 1 and "has another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out/result.json").exists()


@pytest.mark.parametrize("asked, option", [
    (["score", "sums.jsonl", "--max-length", "4"], "--max-length"),
    (["score", "odd.jsonl"], "--on-error"),
    (["score", "sums.jsonl", "--p", "2"], "p is 2.0"),
    (["score", "alpaca", "--data-dir", "."], "--data-dir")])
def test_an_error_names_the_option_that_helps(asked, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text(json.dumps(dict(question="1 + 1?", answer="2")))
    (tmp_path / "odd.jsonl").write_text('{"instruction": "Go", "output": ""}')
    assert cli.main([*asked, "--model", "tiny-llama"]) == 1
    assert option in capsys.readouterr().err


def test_a_base_model_is_given_a_template_by_an_option(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model("tiny-llama")
    tokenizer.chat_template = None
    for part in (model, tokenizer): part.save_pretrained("base")
    data = [json.dumps(dict(question=f"{i} + {i}?", answer=f"{2 * i}")) for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(data))
    asked = ["score", "sums.jsonl", "--model", "base", "--samples", "4"]
    assert cli.main(asked) == 1 and "--chat-template plain" in capsys.readouterr().err
    assert cli.main([*asked, "--chat-template", "plain"]) == 0
    assert len(pd.read_parquet("scores/tokens.parquet").record.unique()) == 4


def test_no_text_of_a_record_reaches_the_terminal_or_the_page_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = "</script><img src=x onerror=alert(1)> \x1b[31mred\x1b[0m"
    (tmp_path / "odd.jsonl").write_text("\n".join(json.dumps(dict(question=f"{i}?", answer=hostile)) for i in range(5)))
    assert cli.main(["score", "odd.jsonl", "--model", "tiny-llama", "--samples", "4", "--by", "loss"]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "scores/tokens.html").read_text()
    assert "\x1b" not in out + page and "records of largest mean loss" in out
    assert "2 of the 2 records of largest loss begin alike: '</script><img" in out
    assert page.count("</script>") == 2 and "<img" not in page


def sums(path, count=40):
    "A file of so many little sums."
    path.write_text("\n".join(json.dumps(dict(question=f"{i} + {i}?", answer=f"{2 * i}")) for i in range(count)))


def test_training_goes_on_from_an_adapter_and_its_seed_is_that_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl")
    for part in load_model("tiny-llama"): part.save_pretrained("base")
    def train(out, *more):
        assert cli.main(["train", "sums.jsonl", "--lora", "--learning-rate", "0.05", "--out", out, *more]) == 0
        return json.loads((tmp_path / out / "result.json").read_text())
    first = train("one", "--model", "base")
    assert train("same", "--model", "base")["loss_after"] == first["loss_after"]
    assert train("two", "--model", "base", "--seed", "1")["loss_after"] != first["loss_after"]
    again = train("three", "--model", "one/model")
    assert again["loss_before"] == pytest.approx(first["loss_after"], abs=1e-4) and again["loss_after"] < first["loss_after"]


def test_training_does_not_go_on_against_another_reference(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl")
    for seed in 0, 1:
        for part in (tiny_model(seed=seed), tiny_tokenizer()): part.save_pretrained(f"{seed}/model")
    asked = ["train", "sums.jsonl", "--model", "tiny-llama", "--objective", "rho1", "--checkpoint-every", "1", "--out", "out"]
    assert cli.main([*asked, "--reference", "0/model"]) == 0
    made = json.loads((tmp_path / "out/result.json").read_text())["manifest"]["weights"]
    assert made["reference"] == weights_hash(tiny_model()) and set(made) == {"tiny-llama", "reference"}
    assert cli.main([*asked, "--reference", "1/model", "--resume"]) == 1
    assert "other values of weights" in capsys.readouterr().err


def test_what_is_typed_wins_over_a_file_of_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl", 4)
    asked = []
    monkeypatch.setattr(_tasks, "run_training", asked.append)
    (tmp_path / "mine.yaml").write_text("dataset: sums.jsonl\nlearning-rate: 1e-5\nepochs: 3\nlora: true\n")
    assert cli.main(["train", "--config", "mine.yaml", "--epochs", "2", "--out", "new"]) == 0
    assert (asked[0].dataset, asked[0].learning_rate, asked[0].epochs, asked[0].lora) == ("sums.jsonl", 1e-5, 2., True)
    _tasks.keep_config(asked[0])
    assert cli.main(["train", "--config", "new/config.yaml", "--out", "other"]) == 0
    assert {name for name, value in vars(asked[1]).items() if value != vars(asked[0])[name]} == {"config", "out"}
    assert str(tmp_path) not in (tmp_path / "new/config.yaml").read_text()


@pytest.mark.parametrize("text, status, said", [
    ("learning_rat: 1", 1, "mine.yaml has 'learning_rat': did you mean 'learning_rate'?"),
    ("config: other.yaml", 1, "mine.yaml has 'config'"),
    ("epochs: many", 2, "--epochs"),
    ("batch_size: 0", 2, "--batch-size"),
    ("- epochs", 1, "holds a list"),
    ("{", 1, "no valid YAML")])
def test_a_file_of_arguments_is_checked_like_the_command_line(text, status, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    assert cli.main(["train", "gsm8k", "--config", "mine.yaml"]) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cpu", "cpu-full", "gpu"])
def test_a_reference_is_judged_and_has_no_runs_to_ask_for(name, capsys):
    reference = str(Path(__file__).resolve().parents[1] / "reference" / name)
    assert cli.main(["claims", reference]) == 0
    assert "# Claims" in capsys.readouterr().out
    for command in ("status", "verify"):
        assert cli.main([command, reference]) == 1
        assert f"`uat-repro claims {reference}` judges them" in capsys.readouterr().err


def test_claims_as_json_are_those_of_the_table(capsys):
    reference = str(Path(__file__).resolve().parents[1] / "reference/cpu")
    assert cli.main(["claims", reference, "--json"]) == 0
    claims = {c["id"]: c for c in json.loads(capsys.readouterr().out)["claims"]}
    assert cli.main(["claims", reference]) == 0
    table = capsys.readouterr().out
    said = re.findall(r"\*\*([a-z, ]*[a-z])[^*]*\*\*", table.split("## Assumed")[0])
    assert all(f"| {id} |" in table for id in claims)
    assert said == [f["verdict"] for c in sorted(claims.values(), key=lambda c: c["control"]) for f in c["findings"]]


def test_a_shell_completes_commands_and_options():
    for words, found in ("uat-repro tr", "train"), ("uat-repro train --lea", "--learning-rate"):
        env = os.environ | dict(_UAT_REPRO_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
        p = subprocess.run([sys.executable, "-m", "uat_repro.cli"], env=env, capture_output=True, text=True)
        assert found in p.stdout.split(), p.stderr


@pytest.mark.parametrize("here", ["", "{tmp_path}/"])
def test_a_model_goes_to_the_hub_with_a_card_that_names_no_place_of_this_machine(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl")
    calls = []
    for name in ("whoami", "create_repo", "upload_folder", "upload_file"):
        monkeypatch.setattr(_tasks.hub, name, lambda *args, name=name, **given: calls.append((name, args, given)))
    for part in load_model("tiny-llama"): part.save_pretrained(tmp_path / "mine/base")
    base = here.format(tmp_path=tmp_path) + "mine/base"
    asked = ["train", str(tmp_path / "sums.jsonl"), "--model", base, "--objective", "masked_mle", "--lora",
             "--out", str(tmp_path / "out"), "--push-to-hub", "someone/sums"]
    assert cli.main(asked) == 0
    assert [name for name, *_ in calls] == ["whoami", "create_repo", "upload_folder", "upload_file", "upload_file"]
    assert calls[1][1:] == (("someone/sums",), dict(private=True, exist_ok=True))
    assert calls[2][2]["folder_path"] == tmp_path / "out/model" and calls[4][2]["path_in_repo"] == "README.md"
    sent = [file for file in (tmp_path / "out/model").iterdir() if file.name not in calls[2][2]["ignore_patterns"]]
    assert sent and not [file.name for file in sent if str(tmp_path).encode() in file.read_bytes()]
    assert json.loads(calls[3][2]["path_or_fileobj"])["base_model_name_or_path"] == "base"
    card, made = (tmp_path / "out/README.md").read_text(), read_json(tmp_path / "out/result.json")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "peft" and str(tmp_path) not in card and "push_to_hub" not in card
    for said in (file_hash(tmp_path / "sums.jsonl"), *made["manifest"]["data"].values(), "| keep | 0.25 |",
                 f"| {made['loss_before']:.3f} | {made['loss_after']:.3f} |", made["manifest"]["versions"]["torch"]):
        assert said in card


def test_a_missing_login_is_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_tasks, "load", None)
    def whoami(): raise OSError("no token found: log in by `hf auth login`")
    monkeypatch.setattr(_tasks.hub, "whoami", whoami)
    assert cli.main(["train", "gsm8k", "--out", str(tmp_path), "--push-to-hub", "someone/sums"]) == 1
    assert "hf auth login" in capsys.readouterr().err


def test_the_loss_on_data_of_another_kind_is_measured_before_and_after(tmp_path, capsys):
    sums(tmp_path / "sums.jsonl")
    (tmp_path / "pages.jsonl").write_text("\n".join(json.dumps(dict(text=f"Page {i}.")) for i in range(5)))
    asked = ["train", f"{tmp_path}/sums.jsonl", "--model", "tiny-llama", "--objective", "mle", "--out", f"{tmp_path}/out",
             "--checkpoint-every", "1", "--ood"]
    assert cli.main([*asked, f"{tmp_path}/pages.jsonl"]) == 0
    made, card = read_json(tmp_path / "out/result.json"), (tmp_path / "out/README.md").read_text()
    assert made["ood_before"] != made["ood_after"] and {"sums", "pages (OOD)"} == {*made["manifest"]["data"]}
    assert f"| pages (out of distribution) | {made['ood_before']:.3f} | {made['ood_after']:.3f} |" in card
    assert f"5 OOD records: loss {made['ood_before']:.3f} -> " in capsys.readouterr().out and str(tmp_path) not in card
    model, tokenizer = load_model("tiny-llama")
    batch = Collator(tokenizer)([*encode_all([dict(text=f"Page {i}.") for i in range(5)], tokenizer)])
    with torch.no_grad(): loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    assert made["ood_before"] == pytest.approx(loss, abs=1e-4)
    (tmp_path / "one.jsonl").write_text(json.dumps(dict(text="Another page.")))
    assert cli.main([*asked, f"{tmp_path}/one.jsonl", "--resume"]) == 1 and "other values of data" in capsys.readouterr().err
    assert cli.main([*asked, f"{tmp_path}/pages.jsonl", "--learning-rate", "5e-3", "--resume"]) == 1
    assert "other values of learning_rate" in capsys.readouterr().err
    assert cli.main([*asked, f"{tmp_path}/sums.jsonl"]) == 1 and "which is trained on" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "cache", "train"])
def test_every_command_that_reads_takes_names_of_columns(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.jsonl").write_text("\n".join(json.dumps(dict(ask=f"{i}?", reply=f"{i}")) for i in range(40)))
    asked = [command, "theirs.jsonl", "--model", "tiny-llama", "--out", "out"]
    assert cli.main(asked) == 1 and "has no known format" in capsys.readouterr().err
    assert cli.main([*asked, "--columns", "prompt=ask,completion=replies"]) == 1
    assert "there is no column 'replies', but ask, reply" in capsys.readouterr().err
    assert cli.main([*asked, "--columns", "prompt=ask,completion=reply"]) == 0
