"""Each example of the README runs by itself, as it is written, on a tiny model and for a step."""
import importlib.util, json, re, subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
SMALLER = {'"smollm2-135m"': '"tiny-llama"', "max_length=256": "max_length=700", "max_steps=20": "max_steps=1",
           "limit=64": "limit=8", "p=.02": "p=.2"}  # values only: an argument more would hide what a reader meets


def test_the_sizes_are_those_of_the_readme():
    assert len(EXAMPLES) == 6 and all(any(value in example for example in EXAMPLES) for value in SMALLER)


def test_links_lead_somewhere():
    links = [target for target in re.findall(r"\]\(([^)\s#]+)", README) if not re.match(r"[a-z]+:", target)]
    assert links and all((ROOT / target).exists() for target in links), links


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


def test_the_notebook_for_colab_installs_what_it_needs_and_only_where_it_is_not_there(monkeypatch):
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    settings, called = settings["DEFAULT"], []
    repository, path = re.search(r"colab.research.google.com/(github/.+?/.+?)/blob/main/([^)]+)", README).groups()
    assert settings["git_url"] == f"https://{repository.replace('github', 'github.com', 1)}"
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "trl_requirements" in settings and any("import trl" in text or "from trl" in text for text in code)
    monkeypatch.setattr(subprocess, "check_call", called.append)
    exec(code[0], {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(code[0], {})
    assert [command[-1] for command in called] == [f"uat_repro[trl] @ git+{settings['git_url']}"]
