"""Token-level uncertainty, selection and self-distillation for post-training language models (arXiv 2503.16511).

The public names load their modules on first use, so that `import uat_repro` costs nothing.
"""
__version__ = "0.1.0"

_MODULES = {
    "records": ("load_records", "to_messages"),
    "tokens": ("Collator", "LengthSampler", "encode", "encode_all", "token_frame"),
    "models": ("Head", "add_lora", "head_of", "hidden_states", "load_model", "split_layers"),
    "cache": ("CachedDataset", "HiddenCache"),
    "uncertainty": ("Decomposition", "Ensemble", "MCDropout", "TokenUncertainty", "decompose", "score_tokens"),
    "masking": ("select_tokens",),
    "distillation": ("AdapterTeacher", "CachedTeacher", "FrozenTeacher"),
    "rules": ("METRICS", "WEIGHTS", "Metric", "Weight"),
    "objective": ("Objective", "ObjectiveOutput"),
    "compute_loss": ("as_compute_loss_func",),
    "training": ("AtSteps", "TokenLog", "UncertaintyAwareTrainer"),
    "evaluation": ("evaluate", "measure_baseline"),
    "answers": ("exact_match", "join_layers"),
}
_OPTIONAL = {"sft": ("UncertaintyAwareSFTTrainer",)}  # needs trl, so `import *` leaves it out
_HOME = {name: module for module, names in (_MODULES | _OPTIONAL).items() for name in names}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'uat_repro' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__(): return sorted([*globals(), *_HOME])
