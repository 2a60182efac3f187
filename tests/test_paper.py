"""The paper profile as far as it can be proven without its models: small stand-ins with the same classes, switches and kinds of chat template, from local folders."""
import json
from pathlib import Path

import pandas as pd, papermill, pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from uat_repro.data import Collator, encode_all, load_records
from uat_repro.distillation import FrozenTeacher
from uat_repro.head import predicting_states, valid_tokens
from uat_repro.models import TINY, head_of, hidden_states, load_model, tiny_tokenizer
from uat_repro.objective import Objective
from uat_repro.training import UncertaintyAwareTrainer
from uat_repro.uncertainty import MCDropout
from uat_repro.workflow import grid, load_profile, parameters

ROOT, PROFILE = Path(__file__).resolve().parents[1], load_profile("paper")
SMALL = {k: v for k, v in TINY["tiny-llama"].items() if k not in ("model_type", "tie_word_embeddings", "max_position_embeddings")}
LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=256)
STAND_INS = {  # switches of the real configuration -> a template of the same kind
    "gemma-2-2b": (dict(model_type="gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, tie_word_embeddings=True,
                        hidden_activation="gelu_pytorch_tanh", max_position_embeddings=512),
                   "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}[{{ 'model' if m.role == 'assistant' else m.role }}]\n{{ m.content | trim }}[end]\n"
                   "{% endfor %}{% if add_generation_prompt %}[model]\n{% endif %}"),
    "llama-3.2-1b": (dict(model_type="llama", head_dim=8, tie_word_embeddings=True, max_position_embeddings=1024,
                          rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)),
                     "{{ '[system]\n\nToday is a day.[eot]' }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}[eot]{% endfor %}{% if add_generation_prompt %}[assistant]\n\n{% endif %}"),
    "phi-3.5-mini": (dict(model_type="phi3", tie_word_embeddings=False, sliding_window=400, max_position_embeddings=1024, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, rope_parameters=LONG),
                     "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"),
}
assert set(STAND_INS) == set(PROFILE["models"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A folder of safetensors, configuration and tokenizer for each of the three models."
    made = {}
    for name, (config, template) in STAND_INS.items():
        torch.manual_seed(0)
        model, tokenizer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **config})), tiny_tokenizer()
        tokenizer.chat_template = template
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name]); tokenizer.save_pretrained(made[name])
    return made


def test_data_sets_are_large_enough():
    "For the search, every seed and the reference of Rho-1, after a tenth each for validation and what is too long."
    needed = PROFILE["prepare"]["counts"]["train"]
    assert needed < .88 * min(dict(alpaca=52_002, gsm8k=7_473, sharegpt=90_000).values())
    assert needed >= (2 + max(PROFILE["seeds"]) + 1) * max(r["documents"] for r in PROFILE["regimes"].values())


def test_models_are_pinned():
    assert all(len(m["spec"].partition("@")[2]) == 40 for m in PROFILE["models"].values())


@pytest.mark.parametrize("name", STAND_INS)
def test_head_scores_and_samples_are_the_models_own(folders, name):
    model, tokenizer = load_model(str(folders[name]))
    rows = encode_all(load_records("gsm_symbolic", "train", limit=3), tokenizer, max_length=448, crop=True)
    batch = Collator(tokenizer)([rows[i] for i in range(len(rows))])
    valid = valid_tokens(batch["labels"])
    with torch.no_grad():
        ours = head_of(model).logits(predicting_states(hidden_states(model, batch), valid))
        plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][valid[:, 1:]]
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    for candidate in PROFILE["uncertainty"]["candidates"]:
        u = MCDropout(**candidate, samples=4)(model, batch)
        assert u.epistemic[valid].min() >= 0 and u.epistemic[valid].mean() > 0  # few units: a token may lose none of them in four samples


@pytest.mark.parametrize("name", STAND_INS)
def test_one_step_of_each_objective(folders, name, tmp_path):
    "With the profile's own micro-batches and checkpointing."
    model, tokenizer = load_model(str(folders[name]))
    rows, t = encode_all(load_records("gsm_symbolic", "train", limit=4), tokenizer, max_length=448, crop=True), PROFILE["train"]
    initial, teacher = {k: v.clone() for k, v in model.state_dict().items()}, FrozenTeacher(load_model(str(folders[name]))[0])
    for objective in dict.fromkeys(r["objective"] for r in grid(PROFILE) if r["model"] == name):
        about = PROFILE["objectives"][objective]
        goal = Objective.preset(about.get("preset", objective), **about.get("changes", {}))
        model.load_state_dict(initial)
        args = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, activation_checkpointing=t["checkpointing"], learning_rate=1e-3, logging_steps=1,
                                 save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
        trainer = UncertaintyAwareTrainer(model, args, goal, teacher=teacher if goal.needs_teacher else None, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        log = next(r for r in trainer.state.log_history if "mle" in r)
        assert torch.isfinite(torch.tensor([log["loss"], log["grad_norm"]])).all()
        if log["selected_fraction"]: assert any(not torch.equal(v, initial[k]) for k, v in model.state_dict().items()), objective


def test_a_run_of_the_profile_through_its_notebooks(folders, tmp_path):
    "Parameters of the profile, sizes of a test: prepared from a folder, trained in micro-batches, with a benchmark on local files."
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'uat_repro[benchmarks]'")
    (tmp_path / "data").mkdir()
    for split, numbers in (("train", range(60)), ("test", range(100, 120))):
        (tmp_path / "data" / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(dict(question=f"What is {i} and {i}?", answer=f"It is {2 * i}.\n#### {2 * i}")) + "\n" for i in numbers))
    go = lambda name, **p: papermill.execute_notebook(ROOT / "nbs" / "experiments" / f"{name}.ipynb", None, p, kernel_name="python3", progress_bar=False, cwd=tmp_path)
    go("00_prepare", **{**parameters(PROFILE, "prepare", model="llama-3.2-1b"), "spec": str(folders["llama-3.2-1b"]), "counts": dict(train=12, validation=2, test=4)},
       model="llama-3.2-1b", dataset="gsm8k", data_dir=str(tmp_path / "data"), out="prepared")
    run = dict(model="llama-3.2-1b", dataset="gsm8k", regime="one_pass", objective="combined")
    small = dict(documents=4, batch_size=4, micro_batch=2, learning_rates=[1e-3], evaluate_records=4, seeds=[0, 1], samples=4, benchmarks=dict(tasks=["gsm8k"], limit=2, max_new_tokens=4))
    go("11_train", **{**parameters(PROFILE, "train", **run), **small}, prepared=dict(gsm8k="prepared"), dataset="gsm8k", regime="one_pass", objective="combined", data_dir=str(tmp_path / "data"), out="train/run")
    result = json.loads((tmp_path / "train" / "run" / "result.json").read_text())
    assert result["settings"]["distill_weight"] == 1 and result["layer"] == 0 and result["seeds"] == [0, 1]
    found = pd.read_parquet(tmp_path / "train" / "run" / "benchmarks.parquet")
    assert set(found.checkpoint) == {"initial", "last"} and set(found.task) == {"gsm8k"}
    papermill.execute_notebook(ROOT / "nbs" / "figures" / "33_t1.ipynb", None, dict(results=".", out="figures"), kernel_name="python3", progress_bar=False, cwd=tmp_path)
    assert "| llama-3.2-1b | GSM8K | one pass | combined | gsm8k | exact_match, strict-match | ID | 0.00 [0.00, 0.00] | 0 |" in (tmp_path / "figures" / "t1.md").read_text()
