"""At most an hour of faults, by `make soak`: kills, damage, a full disk, two at once. Whatever happens, the end is the same.

`make test` has a short form of each.
"""
import os, random, signal, subprocess, sys, time
from itertools import cycle
from pathlib import Path

import pytest, torch

ROOT = Path(__file__).resolve().parents[1]
KILLS_OF_REPRODUCE, KILLS_OF_TRAINER = 20, 40
CLI = [sys.executable, "-m", "uat_repro.cli"]
ENVIRONMENT = os.environ | dict(HF_HUB_OFFLINE="1")
SMOKE = ["reproduce", "--profile", "smoke", "--only", "fig2b", "--workdir"]


def start(*command) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)

def finish(*command) -> str:
    "Run a command to its end, which is a good one."
    child = start(*command)
    said = child.communicate()[1]
    assert child.returncode == 0, said
    return said

def kill_at_random(rng, longest: float, *command) -> bool:
    "Start a command, and kill its whole group after a random time; whether it was still at work."
    child = start(*command)
    time.sleep(rng.uniform(0, longest))
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL

def contents(folder: Path) -> dict[str, bytes]:
    "What a folder of results holds, without what tells of its making."
    kept = [p for p in folder.rglob("*") if p.is_file() and not {".snakemake", "notebooks"} & {*p.parts}]
    aside = ("cost.json", "manifest.json", "snakemake.log", ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.name not in aside}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "results"
    finish(*CLI, *SMOKE, folder)
    return contents(folder)


def test_kills_of_reproduce(tmp_path, undisturbed):
    rng, killed = random.Random(0), 0
    for _ in range(KILLS_OF_REPRODUCE): killed += kill_at_random(rng, 40, *CLI, *SMOKE, tmp_path / "results")
    assert killed
    finish(*CLI, *SMOKE, tmp_path / "results")
    assert contents(tmp_path / "results") == undisturbed


def test_damage_is_found_and_mended(tmp_path, undisturbed):
    "Every file once, by turns cut in half, altered in one byte, and gone."
    folder = tmp_path / "results"
    finish(*CLI, *SMOKE, folder)
    files = sorted(n for n in undisturbed if n.endswith((".parquet", "result.json")))
    for name, damage in zip(files, cycle(("cut", "altered", "gone"))):
        path, whole = folder / name, undisturbed[name]
        middle = len(whole) // 2
        rest = b"" if damage == "cut" else bytes([whole[middle] ^ 1]) + whole[middle + 1:]
        path.unlink() if damage == "gone" else path.write_bytes(whole[:middle] + rest)
        said = subprocess.run([*CLI, "verify", folder], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert said.returncode == 1 and str(path) in said.stdout, (name, damage)
        finish(*CLI, *SMOKE, folder)
        assert contents(folder) == undisturbed, (name, damage)


def test_two_at_once(tmp_path, undisturbed):
    both = [start(*CLI, *SMOKE, tmp_path / "results") for _ in range(2)]
    said = [child.communicate()[1] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert contents(tmp_path / "results") == undisturbed


TRAINING = """
import sys
from transformers import TrainingArguments
from uat_repro.models import tiny_model, tiny_tokenizer
from uat_repro.tokens import encode_all
from uat_repro.training import TokenLog, UncertaintyAwareTrainer
import torch
from pathlib import Path
out, tokenizer = Path(sys.argv[1]), tiny_tokenizer()
data = encode_all([dict(question=f"{i} + {i}?", answer=f"{2 * i}") for i in range(40)], tokenizer)
args = TrainingArguments(str(out), per_device_train_batch_size=4, max_steps=60, save_steps=3, save_total_limit=3,
                         report_to="none", disable_tqdm=True, use_cpu=True)
log = TokenLog(out / "tokens.parquet", range(0, 60, 7), tokenizer)
trainer = UncertaintyAwareTrainer(tiny_model(), args, "masked_mle", token_log=log, train_dataset=data,
                                  processing_class=tokenizer)
try: trainer.train(True)
except ValueError: trainer.train()
torch.save(trainer.model.state_dict(), out / "end.pt")
"""

def test_kills_of_the_trainer(tmp_path):
    finish(sys.executable, "-c", TRAINING, tmp_path / "straight")
    rng, killed = random.Random(1), 0
    command = sys.executable, "-c", TRAINING, tmp_path / "killed"
    for _ in range(KILLS_OF_TRAINER): killed += kill_at_random(rng, 15, *command)
    assert killed
    finish(*command)
    straight, again = (torch.load(tmp_path / name / "end.pt") for name in ("straight", "killed"))
    assert all(torch.equal(straight[k], again[k]) for k in straight)
    assert (tmp_path / "straight/tokens.parquet").read_bytes() == (tmp_path / "killed/tokens.parquet").read_bytes()


def test_a_full_disk_is_named(tmp_path, undisturbed):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes the rights of root")
    try:
        child = start(*CLI, *SMOKE, small / "results")
        said = child.communicate()[1]
        assert child.returncode == 1 and ("disk" in said or "space" in said), said
    finally: subprocess.run(["umount", "-l", small])
