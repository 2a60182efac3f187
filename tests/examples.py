"""Small batches, naive references and the code of notebooks, shared by the tests."""
import json
from pathlib import Path

import torch

from uat_repro.models import tiny_tokenizer

PAIRS = [("a", "ragged lengths"), ("bc", "x"), ("d", "a much longer response than all the others"), ("e", "middle"),
         ("question?", "yes"), ("f", "no, never")]
tokenizer = tiny_tokenizer()
ROOT = Path(__file__).resolve().parents[1]


def rows(pairs=PAIRS):
    "Encoded records: the second of each pair is the response."
    out = []
    for i, (prompt, response) in enumerate(pairs):
        p, r = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]
        out.append(dict(input_ids=p + r, labels=[-100] * len(p) + r, id=str(i)))
    return out


def logits_of(model, batch):
    "Plain logits that predict positions 1 to T - 1. Padding is on the right, so causal attention needs no mask."
    return model(input_ids=batch["input_ids"]).logits[:, :-1]


def flat_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def code(name: str, tag: str = "") -> str:
    "The code of an experiment notebook, or of its cells with a tag."
    cells = json.loads((ROOT/f"nbs/experiments/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"
                     and (tag in c["metadata"].get("tags", []) if tag else not c["metadata"].get("tags")))
