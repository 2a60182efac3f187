"The plan of a profile: its model of memory against the bytes that PyTorch allocates, and what it says."
import gc, json

import pytest, torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from examples import code
from uat_repro import head
from uat_repro._plan import peak_bytes, plan_text, sizes_of, training_bytes
from uat_repro.cache import HiddenCache
from uat_repro.distillation import CachedTeacher, FrozenTeacher
from uat_repro.head import SLICE_LOGITS
from uat_repro.models import head_of, tiny_tokenizer
from uat_repro.objective import Objective
from uat_repro.training import train_in_memory
from uat_repro.workflow import FLOW, load_profile

SMALL = dict(model_type="llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=4000, max_position_embeddings=512, pad_token_id=0)
LENGTH = 64


def allocated(train) -> int:
    "The most bytes that PyTorch had allocated at once on the CPU for tensors that `train` makes."
    gc.collect()  # files of weights that were mapped before and are given back meanwhile would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: train()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(held.max())


@pytest.mark.parametrize("tied, batch, accumulate, checkpointing, teacher, bf16", [
    (True, 1, 1, False, "", False), (False, 1, 1, False, "", False), (True, 16, 1, False, "", False),
    (False, 16, 1, True, "", False), (True, 4, 2, False, "", False), (True, 1, 1, False, "model", False),
    (True, 1, 1, False, "head", False), (False, 16, 1, False, "head", False), (True, 4, 2, False, "head", False),
    (True, 1, 1, False, "", True), (False, 16, 1, False, "", True), (False, 16, 1, True, "", True)])
def test_the_model_of_memory_is_near_what_is_allocated(tied, batch, accumulate, checkpointing, teacher, bf16, tmp_path):
    config = AutoConfig.for_model(**SMALL, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    ids = torch.randint(3, 4000, (2 * batch * accumulate, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [dict(id=str(i), input_ids=x, labels=x) for i, x in enumerate(ids)]

    if teacher == "head": kept = HiddenCache.build(AutoModelForCausalLM.from_config(config), rows, tmp_path/"states")

    def train():
        model = AutoModelForCausalLM.from_config(config)
        goal = Objective.preset("combined" if teacher else "mle")
        second = dict(model=FrozenTeacher, head=lambda model: CachedTeacher(kept, head_of(model))).get(teacher, lambda model: None)
        train_in_memory(model, goal, rows, tiny_tokenizer(), 0, "bfloat16" if bf16 else "float32", second(model),
                        max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
                        activation_checkpointing=checkpointing)

    expected = training_bytes(sizes_of(str(tmp_path), 0, LENGTH), batch * LENGTH, accumulate > 1, checkpointing, bf16,
                              teacher, slice_logits=SLICE_LOGITS)
    print(f"expected {expected / 1e6:.1f} MB")
    found = allocated(train)
    print(f"allocated {found / 1e6:.1f} MB, ratio {expected / found:.3f}")
    assert expected == pytest.approx(found, rel=.15)


@pytest.mark.parametrize("experiment, more, teacher", [
    ("subsets", dict(distances=[.5]), ""), ("train", dict(objective="combined", track=0), "head"),
    ("train", dict(objective="rho1", track=0), "model")])
def test_whole_experiments_take_the_memory_that_is_planned(experiment, more, teacher, tmp_path, monkeypatch):
    "On the CPU what waits there is counted as well: the initial weights, and for subsets the way and a point of it."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(head, "CHUNK_LOGITS", 2**16)  # the logits of all samples would be larger than so small a model
    config = AutoConfig.for_model(**SMALL, tie_word_embeddings=True)
    for part in (AutoModelForCausalLM.from_config(config), tiny_tokenizer()): part.save_pretrained(tmp_path/"model")

    digits = torch.randint(10, (200, 500), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [dict(instruction=f"Say {i}", input="", output="".join(map(str, row))) for i, row in enumerate(digits)]
    (tmp_path/"long.jsonl").write_text("\n".join(map(json.dumps, lines)))  # all are cropped to one length

    def go(name, **parameters):
        space = {}
        exec(code(name, "parameters"), space)
        exec(code(name), space | parameters | dict(out=str(tmp_path/name)))

    prepared = dict(prepared=str(tmp_path/"prepare"))
    go("prepare", spec=str(tmp_path/"model"), layer=0, precision="float32", max_length=400,
       dataset="long.jsonl", counts=dict(train=12, validation=4, test=4))
    go("uncertainty", **prepared)
    size = sizes_of(str(tmp_path/"model"), 0, 400)
    if experiment == "train": prepared = dict(prepared={"long.jsonl": prepared["prepared"]}, dataset="long.jsonl")
    found = allocated(lambda: go(experiment, **prepared, uncertainty=str(tmp_path/"uncertainty"), documents=6,
                                 batch_size=2, micro_batch=1, epochs=1, seeds=[0], samples=4, **more))
    expected = training_bytes(size, 400, True, teacher=teacher, slice_logits=SLICE_LOGITS) + 4 * size.trained
    print(f"expected {expected / 1e6:.1f} MB, allocated {found / 1e6:.1f} MB, ratio {expected / found:.3f}")
    assert expected == pytest.approx(found, rel=.15) and (experiment == "train" or found < expected)


def test_a_model_that_is_not_known_here_is_said_to_be(tmp_path):
    path = tmp_path/"mine.yaml"
    path.write_text(json.dumps(dict(base="smoke", models={"tiny-llama": dict(spec="someone/unknown", layer=0)})))
    assert "unknown: connect to the hub" in plan_text(str(path))
    few = dict(models={"unheard": dict(spec="someone/unknown")}, datasets={"gsm8k": {}}, seeds=[0], figures=dict(seconds=1))
    path.write_text(json.dumps(few))  # without training there is nothing to count
    assert "unknown: connect to the hub" in plan_text(str(path))
    with pytest.raises(ValueError, match="did you mean 'smoke'"): plan_text("smok")


def test_what_the_plan_counts_must_be_in_the_profile(tmp_path):
    path = tmp_path/"mine.yaml"
    path.write_text(json.dumps(dict(
        models={"tiny-llama": dict(spec="tiny-llama")}, datasets={"gsm_symbolic": {}}, seeds=[0], objectives={"mle": {}},
        prepare={}, train=dict(documents=4, epochs=1), regimes={"one_pass": {}})))
    with pytest.raises(ValueError, match="prepare of mine lacks 'counts'"): plan_text(str(path))


def test_the_profile_tells_the_memory_that_the_plan_computes():
    paper = load_profile("paper")
    first, second, third = (f"{peak_bytes(paper, model, True) / 1e9:.0f}" for model in paper["models"])
    assert f"{first}, {second} and {third} GB" in (FLOW / "profiles" / "paper.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
