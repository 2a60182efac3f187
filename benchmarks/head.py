"""The output layer by itself, which does not train here: what its step takes beside the layers below it, and whether it
is read faster by chunks of tokens or by slices of the vocabulary. The two take turns; times are medians, in seconds."""
import json, statistics, time

import torch

from uat_repro import loss
from uat_repro._weights import PACKAGED_WEIGHTS, absent_parts
from uat_repro.loss import token_loss
from uat_repro.models import head_of, hidden_states
from uat_repro.tokens import lay_out
from variants import Work, lengths_of, make_model, make_rows

MODELS = {"smollm2-135m": 8, "gemma-3-270m": 4}  # documents
ROUNDS = 5


def seconds(step)->float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def by_slices(step)->float:
    "A step as it is for a head that trains, which is read by slices."
    trains, loss._trains = loss._trains, lambda head: True
    try: return seconds(step)
    finally: loss._trains = trains


def measured(name:str)->dict:
    "Medians of one model: the layers, forward and backward; the head, for the loss of all response tokens and its gradient."
    model, tokenizer = make_model(name)
    documents = MODELS[name]
    rows = make_rows(tokenizer, model.config.vocab_size, 1, lengths_of(documents, 40, 256), .72)
    batch = Work(tokenizer, rows, documents).batches[0]
    layout, head = lay_out(batch), head_of(model)
    head.weight.requires_grad_(False)
    weight = torch.full((len(layout.targets),), 1 / len(layout.targets))
    states = layout.predicting(hidden_states(model, batch)).detach().requires_grad_()
    def layers(): layout.predicting(hidden_states(model, batch)).sum().backward()
    def read(): token_loss(states, layout.targets, head, weight)[0].backward()
    times = [(seconds(layers), seconds(read), by_slices(read)) for _ in range(ROUNDS + 1)][1:]
    trunk, chunks, slices = map(statistics.median, zip(*times))
    return dict(vocab=len(head.weight), tokens=len(layout.targets), layers=trunk, chunks=chunks, slices=slices, ratio=chunks / slices)


def main():
    torch.set_num_threads(2)
    known = {name: PACKAGED_WEIGHTS[name] for name in MODELS}
    print(json.dumps({name: measured(name) for name, weights in known.items() if not absent_parts(weights)}))


if __name__ == "__main__": main()
