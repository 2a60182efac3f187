"""What users do on a GPU runs on a pretended one, and gives the numbers of the CPU."""
import json, os, subprocess, sys
from pathlib import Path

import pytest

CASES = """presets scopes frozen_teacher frozen_head adapter_teacher states_of_a_model_on_the_gpu layers_above_kept_states
    dropout ensemble chosen_posterior evaluation scores calibrated answers token_log checkpointing packed loss_function hashed
    prepare notebooks waits""".split()


@pytest.fixture(scope="module")
def outcomes():
    program = Path(__file__).with_name("on_pretended.py")
    env = os.environ | dict(ACCELERATE_USE_CPU="false", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {about.pop("case"): about for about in found}


def test_every_case_has_run(outcomes): assert sorted(outcomes) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_the_numbers_of_the_cpu(outcomes, case):
    found = outcomes[case]
    assert "error" not in found, found
    assert found["there"] and found["there"] == pytest.approx(found["here"], rel=1e-4, abs=1e-6)
