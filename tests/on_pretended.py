"""What users do on a GPU, on a pretended one: `python tests/on_pretended.py` prints a line of JSON for each.

Called by `test_devices.py`, in a process of its own.
"""
import contextlib, functools, json, sys, tempfile, traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pandas as pd, torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import TrainingArguments

from examples import code, rows, tokenizer
from pretend import DEVICE, WAITS, Pretending, There, move
from uat_repro import (AdapterTeacher, CachedTeacher, Collator, Ensemble, FrozenTeacher, HiddenCache, MCDropout, Objective,
                       TokenLog, add_lora, head_of)
from uat_repro import cache as cache_module, head as head_module
from uat_repro.answers import exact_match
from uat_repro.cache import CachedDataset
from uat_repro.calibration import calibration
from uat_repro.compute_loss import as_compute_loss_func
from uat_repro.evaluation import evaluate, measure_baseline, summarise
from uat_repro.head import token_scores
from uat_repro.loss import token_loss
from uat_repro.models import Head, split_layers, tiny_model, weights_hash
from uat_repro.objective import PRESETS
from uat_repro.uncertainty import choose_posterior, score_tokens

ROWS = rows()
BATCH = dict(Collator(tokenizer)(ROWS))
CASES = {}


def case(fn):
    "A case: it returns numbers of the pretended GPU and the same of the CPU, which must agree."
    CASES[fn.__name__] = fn
    return fn


def both(use, *models, batch=BATCH):
    "What `use` gives on the pretended GPU and on the CPU, for copies of the same models."
    makers = models or (tiny_model,)
    here = use(*(make() for make in makers), batch)
    return use(*(move(make()) for make in makers), move(batch)), here


@contextlib.contextmanager
def accelerated(device):
    "Inside, accelerate and the Trainer find this device."
    state, found, made = PartialState._shared_state, TrainingArguments.device, TrainingArguments.__init__
    TrainingArguments.__init__ = functools.partialmethod(made, dataloader_pin_memory=False)  # a real GPU has some
    TrainingArguments.device = property(lambda self: (self._setup_devices, state.update(device=device), device)[2])
    before, begin = state["device"], Accelerator.__init__
    def start(self, *args, **kwargs):
        AcceleratorState._reset_state()
        begin(self, *args, **kwargs)
        self.state.device = device
        state["device"] = device
    state["device"], Accelerator.__init__ = device, start
    try: yield
    finally:
        state["device"], Accelerator.__init__ = before, begin
        TrainingArguments.device, TrainingArguments.__init__ = found, made


def notebook(name, **parameters):
    "Run an experiment notebook in a folder of its own; the folder."
    out, space = tempfile.mkdtemp(), dict(display=lambda *_: None)
    exec(code(name, "parameters"), space)
    exec(code(name), space | parameters | dict(out=out))
    return out


def everywhere(use):
    "What `use` gives where accelerate finds the pretended GPU, and the CPU."
    found = []
    for device in (DEVICE, torch.device("cpu")):
        with accelerated(device): found.append(use())
    return found


def prepared(layer=0, **more):
    return notebook("prepare", layer=layer, precision="float32", max_length=448, counts=dict(train=12, validation=4, test=4), **more)


def numbers(x):
    "All numbers of a result, as a flat list."
    if isinstance(x, pd.DataFrame): return numbers([x[c].tolist() for c in x.select_dtypes("number")])
    if isinstance(x, torch.Tensor): return x.detach().cpu().flatten().double().nan_to_num(-1).numpy().tolist()
    if isinstance(x, dict): return numbers(list(x.values()))
    if isinstance(x, (list, tuple)): return [n for part in x for n in numbers(part)]
    return [float(x)] if isinstance(x, (int, float)) else []


def step(objective, model, batch, **more):
    "Loss and gradient of one step."
    torch.manual_seed(0)  # some rules draw their tokens
    out = objective(model.train(), batch, **more)
    out.loss.backward()
    return out.loss, model.get_output_embeddings().weight.grad.norm()


@case
def presets():
    "Every preset, with a teacher made from a model that is on the GPU."
    def use(model, batch): return [step(Objective.preset(p), model, batch, teacher=FrozenTeacher(model)) for p in PRESETS]
    return both(use)

@case
def scopes():
    def use(model, batch): return [step(Objective(scope=s), model, batch) for s in ("sequence", "batch", "global")]
    return both(use)

@case
def frozen_teacher():
    "Made before a Trainer moves the model."
    def use(move_to, batch):
        model = tiny_model()
        teacher = FrozenTeacher(tiny_model(seed=1))
        return step(Objective.preset("combined"), move_to(model), batch, teacher=teacher)
    return use(move, move(BATCH)), use(lambda m: m, BATCH)

@case
def frozen_head():
    "A frozen copy of the output layer, of a model that moves afterwards."
    def use(move_to, batch):
        model = tiny_model()
        taught = CachedTeacher(HiddenCache.build(tiny_model(seed=1), ROWS, tempfile.mkdtemp()), head_of(tiny_model(seed=1)))
        return step(Objective.preset("combined"), move_to(model), batch, teacher=taught)
    return use(move, move(BATCH)), use(lambda m: m, BATCH)

@case
def adapter_teacher():
    def use(move_to, batch):
        torch.manual_seed(0)
        model = add_lora(tiny_model(), rank=4)
        teacher = AdapterTeacher(model)
        out = Objective.preset("combined")(move_to(model), batch, teacher=teacher)
        out.loss.backward()
        return out.loss
    return use(move, move(BATCH)), use(lambda m: m, BATCH)

@case
def states_of_a_model_on_the_gpu():
    def use(model, batch):
        teacher = CachedTeacher(HiddenCache.build(model, ROWS, tempfile.mkdtemp()), head_of(model))
        return step(Objective.preset("combined"), model, batch, teacher=teacher)
    return both(use)

@case
def layers_above_kept_states():
    def use(model, batch):
        cache, top = HiddenCache.build(model, ROWS, tempfile.mkdtemp(), layer=1), split_layers(model, 1)[1]
        kept = dict(Collator(tokenizer)([CachedDataset(ROWS, cache)[i] for i in range(len(ROWS))]))
        return step(Objective(), top, move(kept) if isinstance(batch["labels"], There) else kept)
    return both(use)

@case
def dropout():
    "Masks are drawn on the CPU on both."
    places = dict(), dict(sites=("probabilities",)), dict(from_layer=1)
    def use(model, batch):
        found = [MCDropout(p=.1, samples=4, seed=1, **place)(model, batch) for place in places]
        return [(u.epistemic, u.aleatoric, u.inflation(), u.reliability()) for u in found]
    return both(use)

@case
def ensemble():
    makers = [lambda seed=seed: tiny_model(seed=seed) for seed in range(4)]
    def use(*given):
        *models, batch = given
        found = Ensemble(tuple(models))(models[0], batch)
        return found.epistemic, found.aleatoric
    return both(use, *makers)

@case
def chosen_posterior():
    def use(model, batch): return choose_posterior([MCDropout(p=p, samples=4, seed=1)(model, batch) for p in (.1, .2)])
    return both(use)

@case
def evaluation():
    def use(initial, trained, batch): return summarise(evaluate(trained, [batch], measure_baseline(initial, [batch])))
    return both(use, tiny_model, lambda: tiny_model(seed=1))

@case
def scores():
    def use(model, batch): return score_tokens(model, tokenizer, Dataset.from_list(ROWS))
    return both(use)

@case
def calibrated():
    def use(model, batch): return calibration(model, [batch], [batch])
    return both(use)

@case
def answers():
    problem = [dict(role="user", content="1 + 1?"), dict(role="assistant", content="#### 2")]
    def said(found): return [*map(ord, "".join(found.response)), *found.cut.astype(int)]
    def use(model, batch): return said(exact_match(model, tokenizer, [dict(id="0", messages=problem)] * 3, max_new_tokens=4))
    return both(use)

@case
def token_log():
    def use(model, batch):
        log = TokenLog(Path(tempfile.mkdtemp())/"log.parquet", (0,), tokenizer)
        log(0, batch, Objective()(model, batch))
        return pd.concat(log.frames)
    return both(use)

@case
def checkpointing():
    def use(model, batch):
        model.gradient_checkpointing_enable()
        return step(Objective(), model, batch)
    return both(use)

@case
def packed():
    ids, labels = (torch.cat([torch.as_tensor(row[k]) for row in ROWS])[None] for k in ("input_ids", "labels"))
    places = torch.cat([torch.arange(len(row["input_ids"])) for row in ROWS])[None]
    def use(model, batch): return step(Objective(scope="sequence"), model, batch)
    return both(use, batch=dict(input_ids=ids, labels=labels, position_ids=places))

@case
def loss_function():
    "The number of items is a tensor on the GPU there."
    def use(model, batch):
        items = (batch["labels"][:, 1:] != -100).sum()
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return as_compute_loss_func(Objective())(out, batch["labels"], num_items_in_batch=items)
    return both(use)

@case
def hashed():
    def use(model, batch): return int(weights_hash(model), 16) % 2**40
    return both(use)

@case
def prepare():
    "States of all layers, and of the layers below a trained top; where each forward took place."
    seen, compute = set(), cache_module.compute_states
    def spy(model, rows):
        seen.add(next(model.parameters()).device.type)
        return compute(model, rows)
    cache_module.compute_states = spy
    try: found = everywhere(lambda: [pd.read_parquet(Path(prepared(layer), "initial.parquet")) for layer in (0, 1)])
    finally: cache_module.compute_states = compute
    if seen != {DEVICE.type, "cpu"}: raise RuntimeError(f"states were computed on {seen}")
    return found

@case
def notebooks():
    "Chosen dropout, a training in micro-batches with checkpointing, and steps on subsets of tokens."
    def use():
        source = prepared()
        chosen = notebook("uncertainty", prepared=source, samples=4)
        trained = notebook("train", prepared=dict(gsm_symbolic=source), uncertainty=chosen, objective="combined", batch_size=4,
                           micro_batch=2, checkpointing=True, documents=4, epochs=1, track=1, track_every=1)
        subsets = notebook("subsets", prepared=source, uncertainty=chosen, seeds=[0], documents=2, epochs=1, batch_size=2,
                           distances=[.5], samples=4)
        kept = [pd.read_parquet(Path(folder, f"{table}.parquet"))
                for folder, table in ((chosen, "tokens"), (trained, "records"), (subsets, "subsets"))]
        return [table.select_dtypes("float").abs().mean().tolist() for table in kept]
    return everywhere(use)

@case
def waits():
    "The processor waits once for the range of the targets and once for the tokens that count, however many slices."
    torch.manual_seed(0)
    weight, states, taught = (torch.randn(n, 16) for n in (5000, 64, 64))
    y, mask = torch.randint(5000, (64,)), torch.arange(64) % 4 == 0
    found = []
    for logits in (2**14, 2**17):
        head_module.SLICE_LOGITS = head_module.GPU_LOGITS = logits
        h, head = move(states).requires_grad_(), Head(move(weight).requires_grad_())
        WAITS.clear()
        s = token_scores(h.detach(), move(y), head)
        found.append(sum(WAITS.values()))
        WAITS.clear()
        token_loss(h, move(y), head, move(mask.float()), move((~mask).float()), move(taught), Head(move(weight)), log_z=s.log_z)[0].backward()
        found.append(sum(WAITS.values()))
    return found, [1, 1, 1, 1]


def main():
    torch.set_num_threads(1)
    PartialState(cpu=True)
    for name, fn in CASES.items():
        try:
            with Pretending(): there, here = map(numbers, fn())
            about = dict(there=there, here=here)
        except Exception as e:
            at = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if "uat_repro" in f.filename]
            about = dict(error=f"{type(e).__name__}: {str(e).splitlines()[0]}", at=at[-1:])
        print(json.dumps(dict(case=name, **about)), flush=True)


if __name__ == "__main__": main()
