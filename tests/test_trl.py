"""TRL's trainer with the objective ends with the losses and weights of our own Trainer on the same tokens."""
import subprocess, sys

import pytest, torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments, set_seed

from test_training import two_processes
from uat_repro.distillation import AdapterTeacher, FrozenTeacher
from uat_repro.models import tiny_model, tiny_tokenizer
from uat_repro.objective import Objective
from uat_repro.tokens import TEMPLATE_DATE, Collator, encode, encode_all
from uat_repro.training import TokenLog, UncertaintyAwareTrainer

trl = pytest.importorskip("trl", reason="TRL is an optional companion: pip install trl")
from uat_repro.sft import UncertaintyAwareSFTTrainer  # noqa: E402

MARKED = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
          "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
          "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHATS = [[dict(role="user", content=f"{i} + {i}?"), dict(role="assistant", content=f"{'It is ' * (i % 4)}{2 * i}.")]
         for i in range(8)]
tokenizer = tiny_tokenizer()
ROWS = encode_all([dict(id=str(i), messages=chat) for i, chat in enumerate(CHATS)], tokenizer)
OBJECTIVES = [
    Objective(), Objective(scope="sequence", distill_weight=.5), Objective.preset("dft"),
    Objective(granularity="document", keep=.5, distill_weight=1., distill_on="all"),
]


def options(folder, changes):
    "Plain gradient descent, so that weights show gradients."
    return dict(output_dir=str(folder), max_steps=2, learning_rate=.2, optim="sgd", lr_scheduler_type="constant",
                max_grad_norm=0, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                use_cpu=True) | changes


def trained(trainer):
    "The losses in the log, and the weights that were trained."
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return torch.tensor([r["loss"] for r in trainer.state.log_history if "loss" in r]), weights


def ours(folder, objective, model=None, teacher=None, **changes):
    "By our Trainer, on rows that we encoded and padded."
    args = TrainingArguments(**options(folder, changes))
    return trained(UncertaintyAwareTrainer(model or tiny_model(), args, objective, teacher or frozen(),
                                           train_dataset=ROWS, processing_class=tokenizer))


def frozen(): return FrozenTeacher(tiny_model(seed=1))


def sft(folder, objective, rows=ROWS, teacher=None, **changes):
    "By TRL's, on rows of any kind."
    marked = tiny_tokenizer()
    marked.chat_template = MARKED
    adapter = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
    args = trl.SFTConfig(**options(folder, dict(bf16=False) | changes))
    return UncertaintyAwareSFTTrainer(tiny_model(), args, objective, teacher or frozen(), train_dataset=rows,
                                      processing_class=marked, **adapter)


def assert_same(found, expected):
    for a, b in zip(found, expected): torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert len(expected[0]) == 2 and expected[0][0] != expected[0][1]  # something was learned


LAYOUTS = {
    "plain": {}, "packing": dict(packing=True, max_length=100),
    "padding_free": dict(padding_free=True, max_length=None),
}
WHOLE = dict(per_device_train_batch_size=8)  # every step holds all documents, in whatever rows


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_layout_trains_as_padded_rows_do(objective, tmp_path):
    expected = ours(tmp_path, objective, **WHOLE)
    for changes in LAYOUTS.values():
        trainer = sft(tmp_path, objective, **WHOLE, **changes)
        assert ("packing" in changes) == (1 < len(trainer.train_dataset) < 8)
        assert_same(trained(trainer), expected)


@pytest.mark.parametrize("columns, changes", [
    (dict(messages=CHATS), {}), (dict(prompt=[c[:1] for c in CHATS], completion=[c[1:] for c in CHATS]), dict(completion_only_loss=False)),
    (dict(conversations=[[{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]] * 8), {})])
def test_questions_among_the_tokens_that_are_chosen_from_are_told(columns, changes, tmp_path, caplog):
    sft(tmp_path, Objective(), Dataset.from_dict(columns), **changes)
    assert "TRL trains questions too" in caplog.text


def test_arguments_that_trl_takes_as_well(tmp_path):
    args = TrainingArguments(**options(tmp_path, {}))
    data = Dataset.from_dict(dict(prompt=[c[:1] for c in CHATS], completion=[c[1:] for c in CHATS]))
    t = UncertaintyAwareSFTTrainer(tiny_model(), args, "masked_mle", train_dataset=data, processing_class=tokenizer)
    assert t.train().global_step == 2


def test_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the data set has images, and an objective reads text only"):
        sft(tmp_path, Objective(), Dataset.from_dict(dict(images=[[]] * 8, prompt=[c[:1] for c in CHATS], completion=[c[1:] for c in CHATS])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_assistant_masks(layout, tmp_path):
    "TRL renders and masks the chats, and the tokens are those that we encode."
    chats = Dataset.from_list([dict(messages=chat) for chat in CHATS])
    trainer = sft(tmp_path, Objective(), chats, assistant_only_loss=True, **WHOLE, **LAYOUTS[layout])
    if layout == "plain":
        for mine, theirs in zip(ROWS, trainer.train_dataset):
            assert (mine["input_ids"], mine["labels"]) == (theirs["input_ids"], theirs["labels"])
    assert_same(trained(trainer), ours(tmp_path, Objective(), **WHOLE))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "padding_free"])
def test_accumulation(layout, objective, tmp_path):
    "The micro-batches are ragged, and both trainers draw the same ones."
    cut = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same(trained(sft(tmp_path, objective, **cut, **LAYOUTS[layout])), ours(tmp_path, objective, **cut))


def test_accumulation_of_packed_rows(tmp_path):
    "Where tokens compete inside documents, it does not matter which rows a micro-batch has."
    objective = Objective(scope="sequence", distill_weight=.5)
    trainer = sft(tmp_path, objective, per_device_train_batch_size=1, gradient_accumulation_steps=4,
                  packing=True, max_length=100)
    assert len(trainer.train_dataset) == 4
    assert_same(trained(trainer), ours(tmp_path, objective, **WHOLE))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft(layout, tmp_path):
    "TRL adds the adapter, and activation checkpointing is its default."
    config = lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    objective = Objective.preset("combined")
    trainer = sft(tmp_path, objective, peft_config=config(), teacher=FrozenTeacher(tiny_model()), **WHOLE,
                  **LAYOUTS[layout])
    assert trainer.args.gradient_checkpointing
    set_seed(42)  # as TRL does before it adds one
    lora = get_peft_model(tiny_model(), config())
    assert_same(trained(trainer), ours(tmp_path, objective, lora, AdapterTeacher(lora), **WHOLE))


def in_two(rank, folder):
    objective = Objective(scope="sequence", distill_weight=.5)
    found = {name: trained(sft(folder, objective, per_device_train_batch_size=2, **LAYOUTS[name])) for name in LAYOUTS}
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_ranks(tmp_path):
    "Each has half of a step; our Trainer has it all, in two micro-batches or, where rows are packed, in one."
    two_processes(in_two, tmp_path/"store", tmp_path)
    objective = Objective(scope="sequence", distill_weight=.5)
    halves = ours(tmp_path, objective, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    expected = dict(plain=halves, padding_free=halves, packing=ours(tmp_path, objective, **WHOLE))
    for rank in (0, 1):
        found = torch.load(tmp_path/f"{rank}.pt")
        for name in LAYOUTS: torch.testing.assert_close(found[name][1], expected[name][1], atol=2e-5, rtol=1e-4)


def test_a_text_has_the_tokens_that_trl_gives_it(tmp_path):
    texts = [dict(text=text) for text in ("A page.", "It ends.<|im_end|>", "Two\n\nlines")]
    args = trl.SFTConfig(**options(tmp_path, dict(bf16=False)))
    theirs = trl.SFTTrainer(tiny_model(), args, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)
    rows = encode_all(texts, tokenizer)
    assert [*rows["input_ids"]] == [*rows["labels"]] == [*theirs.train_dataset["input_ids"]]


@pytest.mark.parametrize("layout", ["messages", "completion"])
@pytest.mark.parametrize("write", ["{{ date_string }}", "{{ strftime_now('%d %b %Y') }}"])
def test_what_trl_renders_has_the_same_date_tomorrow(write, layout, tmp_path):
    "Llama-3.2's template writes the date of the day into every prompt."
    dated = tiny_tokenizer()
    dated.chat_template = f"{{%- if not date_string is defined %}}{{%- set date_string = 'today' %}}{{%- endif %}}{write}\n{dated.chat_template}"
    user, answer = [dict(role="user", content="Hi")], [dict(role="assistant", content="Hello")]
    row = dict(messages=user + answer) if layout == "messages" else dict(prompt=user, completion=answer)
    trainer = UncertaintyAwareSFTTrainer(tiny_model(), trl.SFTConfig(**options(tmp_path, dict(bf16=False))), "mle",
                                         train_dataset=Dataset.from_list([row] * 2), processing_class=dated)
    found = trainer.train_dataset[0]["input_ids"]
    assert dated.decode(found).startswith(TEMPLATE_DATE) and found == encode(dict(messages=user + answer), dated)["input_ids"][:len(found)]


def test_a_step_is_one_forward(tmp_path):
    "And the token log works where batches have ids."
    log, calls = TokenLog(tmp_path/"tokens.parquet", [0], tokenizer), []
    args = trl.SFTConfig(**options(tmp_path, dict(bf16=False, gradient_checkpointing=False, **WHOLE)))
    ours(tmp_path, "mle", max_steps=1)  # the first forward of a model of this kind is tried out
    trainer = UncertaintyAwareSFTTrainer(tiny_model(), args, token_log=log, train_dataset=ROWS,
                                         processing_class=tokenizer, data_collator=Collator(tokenizer))
    trainer.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 2 and set(log.frames[0]["record"]) == set(ROWS["id"])


def test_the_package_does_without_trl():
    code = """if True:
        import sys
        sys.modules["trl"] = None
        from uat_repro import *
        from uat_repro import UncertaintyAwareTrainer
        try: from uat_repro import UncertaintyAwareSFTTrainer
        except ModuleNotFoundError as e: assert "trl" in str(e)
        else: raise AssertionError"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packed_evaluations_of_several_processes_are_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trl.SFTConfig, "world_size", 2)
    chats = Dataset.from_list([dict(text="Some text.")] * 4)
    for how in (dict(packing=True, max_length=16), dict(padding_free=True)):
        args = trl.SFTConfig(**options(tmp_path, how), per_device_eval_batch_size=2, bf16=False)
        with pytest.raises(ValueError, match="can't tell packed rows of a batch apart"):
            UncertaintyAwareSFTTrainer(tiny_model(), args, "mle", train_dataset=chats, eval_dataset=chats, processing_class=tokenizer)
