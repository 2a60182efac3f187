"""What the upper layers of a model cost over kept states, in seconds of one core: for the `seconds` of a new profile.

    python benchmarks/cost.py qwen2.5-coder-1.5b 24
"""
import json, sys, time

import torch

from uat_repro import Collator, FrozenTeacher, Objective, encode_all, load_model, load_records
from uat_repro.answers import exact_match
from uat_repro.models import hidden_states, split_layers

DOCUMENTS, PROBLEMS, WRITTEN = 4, 10, 8


def seconds(work)->tuple:
    "What a call returns, and the seconds of a core that it takes."
    start = time.process_time()
    return work(), time.process_time() - start


def peak()->float:
    "GB that this process has had at most."
    return next(int(line.split()[1]) / 1e6 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def main(spec:str, layer:int)->None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(spec)
    records = load_records("gsm_symbolic", "train", limit=4 * PROBLEMS)
    rows = encode_all(records, tokenizer, max_length=320, too_long="drop")
    batch = dict(Collator(tokenizer)([rows[i] for i in range(DOCUMENTS)]))
    tokens, found = int(batch["attention_mask"].sum()), dict(spec=spec, layer=layer)
    trunk, top = split_layers(model, layer)
    for part in (top.get_input_embeddings(), top.get_output_embeddings()): part.requires_grad_(False)
    with torch.no_grad():
        for _ in range(2): states, taken = seconds(lambda: hidden_states(trunk, batch))  # the first reads the weights
    found["tokens a second below"] = tokens / taken
    kept = {k: batch[k] for k in ("attention_mask", "labels")} | dict(inputs_embeds=states)
    teacher = FrozenTeacher(top)
    for name in ("mle", "masked_mle", "combined"):
        objective = Objective.preset(name)
        def step(): objective(top.train(), kept, teacher if objective.needs_teacher else None).loss.backward()
        found[f"tokens a second, {name}"] = tokens / seconds(step)[1]
    several = [seconds(lambda: exact_match(model, tokenizer, records[:PROBLEMS], n, PROBLEMS))[1] for n in (1, 1 + WRITTEN)]
    found |= {"seconds of reading problems": several[0], "seconds of a written token of each": (several[1] - several[0]) / WRITTEN,
              "problems": PROBLEMS, "peak, GB": peak()}
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, indent=1))


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]))
