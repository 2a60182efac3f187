"""The public names are a contract: others import them as the documentation writes them."""
import ast, importlib, subprocess, sys
from pathlib import Path

import pytest

import uat_repro

CONTRACT = ("select_tokens decompose MCDropout Ensemble Objective HiddenCache FrozenTeacher AdapterTeacher "
            "CachedTeacher UncertaintyAwareTrainer as_compute_loss_func load_model load_records encode "
            "encode_all Collator").split()


@pytest.mark.parametrize("name", uat_repro.__all__)
def test_name_is_what_its_module_defines(name):
    assert getattr(uat_repro, name) is getattr(importlib.import_module(f"uat_repro.{uat_repro._HOME[name]}"), name)


def test_contract(): assert set(CONTRACT) <= set(uat_repro.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match="Objektive"): uat_repro.Objektive


def test_import_is_cheap():
    code = "import sys, uat_repro; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("file", sorted(Path(uat_repro.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_no_module_uses_a_private_name_of_another(file):
    imports = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.level or (node.module or "").split(".")[0] == "uat_repro"]
    private = {name.name for node in ours for name in node.names if name.name.startswith("_")}
    assert {name for name in private if not (file.parent / f"{name}.py").exists()} - {"__version__"} == set()
