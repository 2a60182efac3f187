"""The examples of the README run as they are written, on a tiny model and for a step."""
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SMALLER = {'"smollm2-135m"': '"tiny-llama"', "max_length=256": "max_length=700", "max_steps=20": "max_steps=1, use_cpu=True", "limit=64": "limit=8", "p=.02": "p=.2"}


def test_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym", reason="the examples train on GSM-Symbolic: pip install reasoning-gym")
    pytest.importorskip("trl", reason="one example is for TRL: pip install trl")
    monkeypatch.chdir(tmp_path)
    blocks, names = re.findall(r"```python\n(.*?)```", README, re.S), {}
    assert len(blocks) >= 5
    for block in blocks:
        for long, short in SMALLER.items(): block = block.replace(long, short)
        exec(compile(block, "README.md", "exec"), names)
    assert names["trainer"].objective.distill_weight == 1 and names["out"].selected.any() and names["u"].samples == 8
