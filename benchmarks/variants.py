"""The steps under comparison. A variant gets a model and a workload. It returns a function of a batch: forward,
backward, the loss.

Run as a program it is one such process: it prints a line when it is ready. It then takes a step for each line that
it reads, and prints the cost of the step. `bench.py` keeps several of them and lets them step in turn.
"""
import argparse, copy, ctypes, gc, json, re, sys, tempfile, time
from pathlib import Path

import torch, trl
from datasets import Dataset
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl.experimental.gkd import GKDConfig, GKDTrainer

from uat_repro import (CachedTeacher, FrozenTeacher, HiddenCache, MCDropout, UncertaintyAwareTrainer, decompose,
                       load_model, load_records)
from uat_repro.cache import CachedDataset
from uat_repro.tokens import Collator, valid_tokens
from uat_repro.masking import count_kept
from uat_repro.models import autocast, head_of, split_layers, tiny_tokenizer

MC = dict(p=.02)
VARIANTS = {}

def variant(fn):
    VARIANTS[fn.__name__] = fn
    return fn

# The workload: documents of fixed lengths, real text where the model is real

def lengths_of(documents:int, shortest:int, longest:int)->list[int]:
    return [round(shortest + i * (longest - shortest) / max(1, documents - 1)) for i in range(documents)]

def make_rows(tokenizer, vocab:int, steps:int, lengths:list[int], share:float)->list[list[dict]]:
    "For each step a batch of rows; the last `share` of every document is its response."
    need, g = steps * sum(lengths), torch.Generator().manual_seed(0)
    if vocab == len(tokenizer):
        text = "\n\n".join(m["content"] for r in load_records("sharegpt", "train", limit=200) for m in r["messages"])
        ids = tokenizer(text[:12 * need], add_special_tokens=False)["input_ids"][:need]
    else: ids = torch.randint(3, vocab, (need,), generator=g).tolist()
    batches, at = [], 0
    for _ in range(steps):
        rows = []
        for n in lengths:
            own, prompt = ids[at:at + n], n - round(share * n)
            rows.append(dict(id=str(at), input_ids=own, labels=[-100] * prompt + own[prompt:]))
            at += n
        batches.append(rows)
    return batches

def make_model(name:str):
    "SmolLM2; `wide-V`, two layers under a vocabulary of V; `head-V`, the same with its own head, embeddings frozen."
    kind, _, vocab = name.partition("-")
    if kind not in ("wide", "head"): return load_model(name)
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=int(vocab), tie_word_embeddings=kind == "wide", **shape)).eval()
    model.get_input_embeddings().requires_grad_(kind == "wide")
    return model, tiny_tokenizer()

def perturb(model, layers:int)->None:
    "Move the upper layers, so that the student is no longer its teacher."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.get_decoder().layers[-layers:]:
            for p in layer.parameters(): p += .05 * p.std() * torch.randn(p.shape, generator=g)

# Trainers

def arguments(cls=TrainingArguments, **kw):
    return cls(output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", bf16=False, per_device_train_batch_size=8,
               disable_tqdm=True, **kw)

def by_trainer(trainer):
    "One training step of a Trainer, without its optimiser."
    trainer.current_gradient_accumulation_steps = 1
    def step(batch):
        samples, items = trainer.get_batch_samples(iter([dict(batch)]), 1, torch.device("cpu"))
        return trainer.training_step(trainer.model, samples[0], items)
    return step

def largest_mean(losses): return losses.sort(descending=True).values[:count_kept(len(losses), .25)].mean()

@variant
def trainer_mle(model, work): return by_trainer(Trainer(model, arguments()))

@variant
def trainer_topk(model, work):
    def loss(outputs, labels, num_items_in_batch=None):
        token = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return largest_mean(token[labels[:, 1:].flatten() != -100])
    return by_trainer(Trainer(model, arguments(), compute_loss_func=loss))

def by_trl(cls, config, model, work, settings={}, **kw):
    "A trainer of TRL, on batches that are made already."
    rows = Dataset.from_list([{k: r[k] for k in ("input_ids", "labels")} for r in work.rows[0]])
    args = arguments(config, gradient_checkpointing=False, dataset_kwargs=dict(skip_prepare_dataset=True), **settings)
    return by_trainer(cls(model, args=args, train_dataset=rows, processing_class=work.tokenizer, **kw))

@variant
def sft_nll(model, work): return by_trl(trl.SFTTrainer, trl.SFTConfig, model, work)

@variant
def sft_topk(model, work):
    class TopK(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs, use_cache=False, fused_lm_head=True)
            return largest_mean(-out.log_probs[out.label_mask])
    return by_trl(TopK, trl.SFTConfig, model, work)

@variant
def gkd(model, work):
    return by_trl(GKDTrainer, GKDConfig, model, work, dict(lmbda=0.0, beta=0.0), teacher_model=copy.deepcopy(model))

@variant
def teacher_loop(model, work):
    teacher = copy.deepcopy(model).eval()
    def step(batch):
        inputs, valid = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"][:, 1:] != -100
        logits = model(**inputs).logits[:, :-1]
        with torch.no_grad(): theirs = teacher(**inputs).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")[valid]
        kl = F.kl_div(logits.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1)[valid]
        kept = torch.zeros_like(losses, dtype=torch.bool)
        kept[losses.detach().sort(descending=True, stable=True).indices[:count_kept(len(losses), .25)]] = True
        loss = losses[kept].mean() + kl[~kept].mean()
        loss.backward()
        return loss.detach()
    return step

def ours(model, work, objective, **kw):
    return by_trainer(UncertaintyAwareTrainer(model, arguments(), objective, processing_class=work.tokenizer, **kw))

@variant
def ours_mle(model, work): return ours(model, work, "mle")

@variant
def ours_masked_mle(model, work): return ours(model, work, "masked_mle")

@variant
def ours_masked_mle_checkpointed(model, work):
    model.activation_checkpointing_enable()
    return ours(model, work, "masked_mle")

@variant
def ours_masked_mle_compiled(model, work):
    for layer in model.get_decoder().layers: layer.compile(dynamic=True)
    return ours(model, work, "masked_mle")

@variant
def ours_masked_mle_bf16(model, work):
    step = ours(model, work, "masked_mle")
    def in_bf16(batch):
        with autocast("bfloat16"): return step(batch)
    return in_bf16

@variant
def ours_combined_frozen(model, work): return ours(model, work, "combined", teacher=FrozenTeacher(model))

@variant
def ours_combined_cached(model, work):
    cache = HiddenCache.build(model, [r for rows in work.rows for r in rows], Path(work.folder, "last"))
    return ours(model, work, "combined", teacher=CachedTeacher(cache, head_of(model)))

@variant
def ours_combined_cached_checkpointed(model, work):
    step = ours_combined_cached(model, work)
    model.activation_checkpointing_enable()
    return step

@variant
def ours_masked_mle_top(model, work):
    "The upper third, over kept states of the trunk."
    rows = [r for rows in work.rows for r in rows]
    layer = model.config.num_hidden_layers * 2 // 3
    cache, n = HiddenCache.build(model, rows, Path(work.folder, "trunk"), layer), len(work.rows[0])
    cached = CachedDataset(rows, cache)
    work.batches = [work.collate([cached[i] for i in range(k, k + n)]) for k in range(0, len(rows), n)]
    work.trained = split_layers(model, layer)[1]
    work.trained.get_input_embeddings().requires_grad_(False)  # and the head, which is tied to them
    return ours(work.trained, work, "masked_mle")

# Uncertainty: the same samples, so the same numbers

def stacked(model, batch, samples, layer):
    "All distributions of all samples at once; dropout from `layer` on."
    inputs, valid = {k: batch[k] for k in ("input_ids", "attention_mask")}, valid_tokens(batch["labels"])[:, 1:]
    drop = lambda module, args, out: (F.dropout(out[0], MC["p"]), *out[1:])
    hooks = [m.self_attn.register_forward_hook(drop) for m in model.get_decoder().layers[layer:]]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        samples = torch.stack([model(**inputs).logits[:, :-1][valid].log_softmax(-1) for _ in range(samples)])
    for h in hooks: h.remove()
    return decompose(samples).epistemic.mean()

@variant
def naive_dropout(model, work): return lambda batch: stacked(model, batch, work.samples, 0)

@variant
def naive_dropout_top(model, work):
    return lambda batch: stacked(model, batch, work.samples, model.config.num_hidden_layers * 4 // 5)

@variant
def ours_dropout(model, work):
    return lambda batch: MCDropout(**MC, samples=work.samples)(model, batch).epistemic.nanmean()

@variant
def ours_dropout_top(model, work):
    layer = model.config.num_hidden_layers * 4 // 5
    return lambda batch: MCDropout(**MC, samples=work.samples, from_layer=layer)(model, batch).epistemic.nanmean()

# One process

def memory(field:str)->float: # MB
    "`VmRSS`, or `VmHWM` since it was last reset."
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def tidy()->None:
    "Give freed memory back, and forget the peak."
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

class Work:
    "What the steps work on."
    def __init__(self, tokenizer, rows, samples):
        self.tokenizer, self.rows, self.samples = tokenizer, rows, samples
        self.collate, self.trained = Collator(tokenizer), None
        self.batches, self._folder = [self.collate(r) for r in rows], tempfile.TemporaryDirectory()
        self.folder = self._folder.name

def main(options):
    torch.set_num_threads(options.threads)
    model, tokenizer = make_model(options.model)
    for p in model.parameters(): p.data = p.data.clone()  # off the file, which is mapped into memory as it is touched
    tidy()
    start = memory("VmRSS")
    lengths = lengths_of(options.documents, options.shortest, options.longest)
    rows = make_rows(tokenizer, model.config.vocab_size, options.steps, lengths, options.share)
    work = Work(tokenizer, rows, options.samples)
    step = VARIANTS[options.variant](model, work)
    student = work.trained or model
    perturb(student, max(1, model.config.num_hidden_layers // 3))
    if work.trained is not None: del model
    print("ready", flush=True)
    for line in sys.stdin:
        tidy()
        began = time.perf_counter()
        loss = float(step(work.batches[int(line)]))
        seconds, peak = time.perf_counter() - began, memory("VmHWM")
        student.zero_grad(set_to_none=True)  # who waits for its turn holds as little as it can
        tidy()
        tokens = int(work.batches[int(line)]["attention_mask"].sum())
        print(json.dumps(dict(seconds=seconds, extra_mb=peak - start, loss=loss, tokens=tokens)), flush=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--model", default="smollm2-135m")
    for name, value in dict(documents=8, shortest=40, longest=256, steps=3, samples=8, threads=2).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--share", type=float, default=.72)
    main(parser.parse_args())
