"The configurations for `accelerate launch` that the package ships."
import json, os, shutil, subprocess, sys
from importlib.resources import files

import pandas as pd, pytest, torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from uat_repro.models import load_model

CONFIGS = files("uat_repro")/"workflow"/"accelerate"


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_configurations(name, kind):
    config = load_config_from_file(str(CONFIGS/f"{name}.yaml"))
    assert (config.distributed_type.value, config.mixed_precision, config.num_machines) == (kind, "bf16", 1)


def test_the_output_layer_stays_whole_under_fsdp():
    fsdp = load_config_from_file(str(CONFIGS/"fsdp2.yaml")).fsdp_config
    assert (fsdp["fsdp_version"], fsdp["fsdp_reshard_after_forward"]) == (2, False)


PRETEND = """
import os
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from uat_repro.cli import main

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
main()
"""  # processes as on two GPUs, for accelerate leaves FSDP out where there is none


def launch(name, folder, *more):
    "Train in two processes on documents that are made in a folder."
    mine, script = folder/"mine.jsonl", folder/"pretend.py"
    rows = [dict(instruction=f"Count to {i}", input="", output=" ".join(map(str, range(i)))) for i in range(1, 41)]
    mine.write_text("\n".join(map(json.dumps, rows)))
    script.write_text(PRETEND)
    flags = ["--config_file", str(CONFIGS/f"{name}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    train = ["--debug", "train", str(mine), "--model", "tiny-llama", "--documents", "16", "--batch-size", "4", *more]
    program = ["-m", "uat_repro.cli"] if name == "ddp" else [str(script)]
    call = [sys.executable, "-m", "accelerate.commands.launch", *flags, *program, *train]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_with_a_configuration(name, tmp_path):
    launch(name, tmp_path, "--out", str(tmp_path/"out"))
    found = json.loads((tmp_path/"out/result.json").read_text())
    assert found["steps"] == 2  # 16 documents, 4 on each of 2 processes
    assert found["loss_after"] < found["loss_before"]
    initial, trained = (load_model(x)[0].state_dict() for x in ("tiny-llama", str(tmp_path/"out/model")))
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in initial.items()}
    assert not any(torch.equal(v, initial[k]) for k, v in trained.items() if k.endswith("o_proj.weight"))


def weights(folder): return load_file(folder/"model/model.safetensors")


def test_batches_in_parts_make_the_same_steps(tmp_path):
    "Two processes, two passes, and all documents in each step: 8 at once, then 2 at once in four goes."
    def train(out, *more): launch("ddp", tmp_path, "--objective", "mle", "--epochs", "2", "--out", str(tmp_path/out), *more)
    train("whole", "--batch-size", "8")
    train("parts", "--batch-size", "2", "--accumulate", "4")
    first, second = (pd.read_parquet(tmp_path/out/"log.parquet")[["loss", "grad_norm"]] for out in ("whole", "parts"))
    assert len(first) == 2 and second.to_numpy() == pytest.approx(first.to_numpy(), rel=.01)  # bfloat16


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_training_goes_on_from_a_checkpoint_inside_its_second_pass(name, tmp_path):
    "Two processes, two steps in a pass: the documents that come are those of that pass."
    out = tmp_path/"out"
    def train(*more): launch(name, tmp_path, "--objective", "mle", "--epochs", "2", "--checkpoint-every", "1", "--out", str(out), *more)
    train()
    straight = weights(out)
    for late in ("model", "checkpoint-4"): shutil.rmtree(out/late)
    train("--resume")
    again = weights(out)
    assert all(torch.equal(again[name], straight[name]) for name in straight)
