"""The paper profile, as far as it can be tested without its models.

Small stand-ins have the same classes, switches and kinds of chat template; they are loaded from local folders.
"""
import json
from pathlib import Path

import pandas as pd, papermill, pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from uat_repro.distillation import FrozenTeacher
from uat_repro.models import TINY, head_of, hidden_states, load_model, tiny_tokenizer
from uat_repro.objective import Objective
from uat_repro.records import load_records
from uat_repro.results import runs_of
from uat_repro.tokens import Collator, encode_all, lay_out
from uat_repro.training import UncertaintyAwareTrainer
from uat_repro.uncertainty import MCDropout
from uat_repro.workflow import load_profile, parameters

ROOT, PROFILE = Path(__file__).resolve().parents[1], load_profile("paper")
ASIDE = ("model_type", "tie_word_embeddings", "max_position_embeddings")
SMALL = {k: v for k, v in TINY["tiny-llama"].items() if k not in ASIDE}
LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
            original_max_position_embeddings=256)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=256)
STAND_INS = {  # switches of the real configuration, and a chat template of the same kind
    "gemma-2-2b": (
        dict(model_type="gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=16, attn_logit_softcapping=50.0,
             final_logit_softcapping=30.0, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh",
             max_position_embeddings=512),
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ 'model' if m.role == 'assistant' else m.role }}]\n{{ m.content | trim }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[model]\n{% endif %}"),
    "llama-3.2-1b": (
        dict(model_type="llama", head_dim=8, tie_word_embeddings=True, max_position_embeddings=1024,
             rope_parameters=LLAMA3),
        "{{ '[system]\n\nToday is a day.[eot]' }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}[eot]"
        "{% endfor %}{% if add_generation_prompt %}[assistant]\n\n{% endif %}"),
    "phi-3.5-mini": (
        dict(model_type="phi3", tie_word_embeddings=False, sliding_window=400, max_position_embeddings=1024,
             resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, rope_parameters=LONG),
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"),
}
assert set(STAND_INS) == set(PROFILE["models"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A folder of safetensors, configuration and tokenizer for each of the three models."
    made = {}
    for name, (config, template) in STAND_INS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **config}))
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        made[name] = tmp_path_factory.mktemp(name)
        for part in (model, tokenizer): part.save_pretrained(made[name])
    return made


def test_data_sets_are_large_enough():
    "For every seed and the reference of Rho-1, after a tenth each for validation and what is too long."
    needed = PROFILE["prepare"]["counts"]["train"]
    assert needed < .88 * min(dict(alpaca=52_002, gsm8k=7_473, sharegpt=90_000).values())
    assert needed >= (2 + max(PROFILE["seeds"])) * max(r["documents"] for r in PROFILE["regimes"].values())


def test_models_are_pinned():
    assert all(len(m["spec"].partition("@")[2]) == 40 for m in PROFILE["models"].values())


def encoded(tokenizer, limit: int):
    "Training rows of GSM-Symbolic that fit the stand-ins."
    return encode_all(load_records("gsm_symbolic", "train", limit=limit), tokenizer, max_length=448, too_long="crop")


@pytest.mark.parametrize("name", STAND_INS)
def test_head_scores_and_samples_are_the_models_own(folders, name):
    model, tokenizer = load_model(str(folders[name]))
    rows = encoded(tokenizer, limit=3)
    batch = Collator(tokenizer)([rows[i] for i in range(len(rows))])
    layout = lay_out(batch)
    with torch.no_grad():
        ours = head_of(model).logits(layout.predicting(hidden_states(model, batch)))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(ours, layout.predicting(logits), atol=1e-4, rtol=1e-4)
    for candidate in PROFILE["uncertainty"]["candidates"]:
        epistemic = MCDropout(**candidate, samples=4)(model, batch).epistemic[layout.valid]
        # few units: a token may lose none of them in four samples
        assert epistemic.min() >= 0 and epistemic.mean() > 0


@pytest.mark.parametrize("name", STAND_INS)
def test_one_step_of_each_objective(folders, name, tmp_path):
    "With the profile's own micro-batches and checkpointing."
    model, tokenizer = load_model(str(folders[name]))
    rows, teacher = encoded(tokenizer, limit=4), FrozenTeacher(load_model(str(folders[name]))[0])
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    for objective in dict.fromkeys(r["objective"] for r in runs_of(PROFILE, "train") if r["model"] == name):
        about = PROFILE["objectives"][objective]
        goal = Objective.preset(about.get("preset", objective), **about.get("changes", {}))
        model.load_state_dict(initial)
        args = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            activation_checkpointing=PROFILE["train"]["checkpointing"], learning_rate=1e-3, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
        trainer = UncertaintyAwareTrainer(
            model, args, goal, teacher=teacher if goal.needs_teacher or goal.needs_reference else None,
            train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        log = next(r for r in trainer.state.log_history if "mle" in r)
        assert torch.isfinite(torch.tensor([log["loss"], log["grad_norm"]])).all()
        moved = any(not torch.equal(v, initial[k]) for k, v in model.state_dict().items())
        assert moved or not log["selected_fraction"], objective


def write_problems(folder: Path) -> None:
    "Files of GSM8K's form."
    folder.mkdir()
    for split, numbers in (("train", range(60)), ("test", range(100, 120))):
        lines = [dict(question=f"What is {i} and {i}?", answer=f"It is {2 * i}.\n#### {2 * i}") for i in numbers]
        (folder / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_of_the_profile_through_its_notebooks(folders, tmp_path, monkeypatch):
    "Parameters of the profile, sizes of a test: trained in micro-batches, with a benchmark on local files."
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'uat_repro[benchmarks]'")
    write_problems(tmp_path / "data")
    monkeypatch.setenv("UAT_REPRO_DATA_DIR", str(tmp_path / "data"))

    def go(name, **p):
        notebook = ROOT / "nbs" / f"{name}.ipynb"
        papermill.execute_notebook(notebook, None, p, kernel_name="python3", progress_bar=False, cwd=tmp_path)

    run = dict(model="llama-3.2-1b", dataset="gsm8k", regime="one_pass", objective="combined")
    prepared = parameters(PROFILE, "prepare", model=run["model"], dataset=run["dataset"])
    prepared |= dict(spec=str(folders[run["model"]]), counts=dict(train=12, validation=2, test=4))
    go("experiments/prepare", **prepared, model=run["model"], dataset=run["dataset"],
       out="prepared")
    small = dict(documents=4, batch_size=4, micro_batch=2, learning_rate=1e-3, seeds=[0, 1],
                 samples=4, benchmarks=dict(tasks=["gsm8k"], limit=2, max_new_tokens=4))
    settings = {**parameters(PROFILE, "train", **run), **small}
    go("experiments/train", **settings, prepared=dict(gsm8k="prepared"), dataset="gsm8k", regime="one_pass",
       objective="combined", out="train/run")

    result = json.loads((tmp_path / "train" / "run" / "result.json").read_text())
    assert result["settings"]["distill_weight"] == 1 and result["layer"] == 0 and result["seeds"] == [0, 1]
    assert result["identity"] == dict(model=run["model"], trained_on="gsm8k", regime="one_pass", objective="combined")
    found = pd.read_parquet(tmp_path / "train" / "run" / "benchmarks.parquet")
    assert set(found.checkpoint) == {"last"} and set(found.seed) == {0, 1} and set(found.task) == {"gsm8k"}
    go("experiments/untrained", prepared=dict(gsm8k="prepared"), benchmarks=small["benchmarks"], out="untrained/llama")
    go("figures/t1", results=".", out="figures")
    told, score = (tmp_path / "figures" / "t1.md").read_text(), "0.00 [no interval] | 0 |"
    assert f"| llama-3.2-1b | GSM8K | one pass | combined | gsm8k | exact_match, strict-match | ID | {score}" in told
    assert f"| llama-3.2-1b | - | - | initial model | gsm8k | exact_match, strict-match | - | {score}" in told
