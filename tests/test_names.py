"""The public names are a contract: others import them as the documentation writes them."""
import importlib, subprocess, sys

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
