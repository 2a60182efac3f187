"""Each example of the README runs by itself, as it is written, on a tiny model and for a step."""
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
SMALLER = {'"smollm2-135m"': '"tiny-llama"', "max_length=256": "max_length=700", "max_steps=20": "max_steps=1",
           "limit=64": "limit=8", "p=.02": "p=.2"}  # values only: an argument more would hide what a reader meets


def test_the_sizes_are_those_of_the_readme():
    assert len(EXAMPLES) == 6 and all(any(value in example for example in EXAMPLES) for value in SMALLER)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: "-".join(re.findall(r"(\w+)\(", text)[-2:]))
def test_example_runs(example, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym", reason="the examples read GSM-Symbolic: pip install reasoning-gym")
    if "from trl" in example: pytest.importorskip("trl", reason="this example is for TRL: pip install trl")
    monkeypatch.chdir(tmp_path)
    for value, smaller in SMALLER.items(): example = example.replace(value, smaller)
    exec(compile(example, "README.md", "exec"), names := {})
    if "trainer" in names: assert names["trainer"].state.global_step == 1
    if "teacher" in names: assert len(names["teacher"].cache) == 8
    if "out" in names: assert names["out"].selected.any()
    if "u" in names: assert names["u"].samples == 8
