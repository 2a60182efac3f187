"""What a Trainer reports and keeps: the same in one process and in two, and nothing that it cannot do in silence."""
from pathlib import Path

import pandas as pd
import pytest, torch
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from examples import PAIRS, flat_grad, rows, tokenizer
from test_training import InOrder, two_processes
from uat_repro.cache import HiddenCache
from uat_repro.distillation import CachedTeacher, FrozenTeacher
from uat_repro.models import head_of, tiny_model
from uat_repro.objective import Objective, as_compute_loss_func
from uat_repro.tokens import Collator, token_frame
from uat_repro.training import AtSteps, TokenLog, UncertaintyAwareTrainer

collate = Collator(tokenizer)


def arguments(folder, **changes):
    options = dict(max_steps=1, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
                   save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
    return TrainingArguments(str(folder), **{**options, **changes})


def trainer(folder, objective="masked_mle", data=None, token_log=None, model=None, kind=InOrder, **changes):
    "A quiet Trainer on the examples, in their order."
    t = kind(model or tiny_model(), arguments(folder, **changes), objective, token_log=token_log,
             train_dataset=data or rows(), processing_class=tokenizer)
    t.remove_callback(PrinterCallback)
    return t


RAGGED = [*PAIRS, ("g", "seven in all, so that no size of batch divides them")]


def eval_losses(folder):
    return [trainer(folder, per_device_eval_batch_size=n).evaluate(rows(RAGGED))["eval_loss"] for n in (1, 2, 3, 8)]


def evaluated(rank, folder, out):
    losses = eval_losses(folder)
    if rank == 0: torch.save(losses, out)


def test_eval_loss_is_the_mean_over_tokens_for_every_batch_size_and_in_two_processes(tmp_path):
    batch = collate(rows(RAGGED))
    exact = Objective.preset("mle")(tiny_model(), batch).loss.item()
    two_processes(evaluated, tmp_path/"store", tmp_path, tmp_path/"out.pt")
    for losses in (eval_losses(tmp_path), torch.load(tmp_path/"out.pt")):
        assert losses == pytest.approx([exact] * 4, rel=1e-6)
    by_record = [Objective.preset("mle")(tiny_model(), collate([row])).loss.item() for row in rows(RAGGED)]
    assert sum(by_record) / len(by_record) != pytest.approx(exact, rel=1e-4)  # the mean of means is another number


def packed_evaluations(rank, folder, out):
    "Two documents in a row, as packing writes them: one row of a batch at a time, and two."
    data = [dict(input_ids=a["input_ids"] + b["input_ids"], labels=a["labels"] + b["labels"], seq_lengths=[len(x["input_ids"]) for x in (a, b)])
            for a, b in zip(rows()[::2], rows()[1::2])]
    alone = trainer(folder, per_device_eval_batch_size=1).evaluate(data)["eval_loss"]
    with pytest.raises(ValueError, match="per_device_eval_batch_size is 2, but 2 processes"): trainer(folder, per_device_eval_batch_size=2).evaluate(data)
    if rank == 0: torch.save(alone, out)


def test_packed_rows_are_evaluated_exactly_in_two_processes_or_not_at_all(tmp_path):
    two_processes(packed_evaluations, tmp_path/"store", tmp_path, tmp_path/"out.pt")
    assert torch.load(tmp_path/"out.pt") == pytest.approx(Objective.preset("mle")(tiny_model(), collate(rows())).loss.item(), rel=1e-6)


def test_data_without_responses_are_not_evaluated(tmp_path):
    silent = [dict(row, labels=[-100] * len(row["labels"])) for row in rows()]
    with pytest.raises(ValueError, match="no label of the evaluation records is a token"): trainer(tmp_path).evaluate(silent)


def test_steps_without_responses_are_named_once(tmp_path, caplog):
    silent = [dict(row, labels=[-100] * len(row["labels"])) for row in rows()]
    t = trainer(tmp_path, data=silent[:2] + rows(), max_steps=3, per_device_train_batch_size=1)
    t.train()
    told = [r.getMessage() for r in caplog.records if "no response token" in r.getMessage()]
    assert len(told) == 1 and told[0].startswith("step 0 ")
    assert t.state.log_history  # it went on


def trained(folder, size, compiled):
    "Weights after three steps of four documents, and what the forward went through."
    backend = dict(torch_compile=True, torch_compile_backend="eager") if compiled else {}
    t = trainer(folder, "mle", rows()[:4], per_device_train_batch_size=size, max_steps=3, learning_rate=.1, **backend)
    t.train()
    return torch.cat([p.detach().flatten() for p in t.model.parameters()]), counters["stats"]["calls_captured"]


def compile_in_group(rank, folder):
    weights, calls = trained(folder, 2, compiled=True)
    assert calls
    torch.save(weights, f"{folder}/{rank}.pt")


def test_compiled_models_of_two_processes_end_with_the_weights_of_one(tmp_path):
    "Gradients are averaged although torch.compile wraps DistributedDataParallel, and one process is compiled too."
    two_processes(compile_in_group, tmp_path/"store", tmp_path)
    first, second = (torch.load(tmp_path/f"{rank}.pt") for rank in (0, 1))
    plain, _ = trained(tmp_path, 4, compiled=False)
    counters.clear()
    compiled, calls = trained(tmp_path, 4, compiled=True)
    assert calls and torch.equal(first, second)
    for weights in (first, compiled): torch.testing.assert_close(weights, plain, atol=1e-5, rtol=1e-4)


class Plain(Trainer):
    "The Trainer of transformers on the examples, in their order, with a loss function."
    def _get_train_sampler(self, train_dataset=None): return torch.utils.data.SequentialSampler(self.train_dataset)


def change(folder, objective, **changes):
    "The gradient of one step on all examples by `as_compute_loss_func`: the change of the weights; the Trainer."
    model, before = tiny_model(), torch.cat([p.detach().flatten().clone() for p in tiny_model().parameters()])
    data = [{k: row[k] for k in ("input_ids", "labels")} for row in rows()]
    t = Plain(model, arguments(folder, remove_unused_columns=False, **changes), train_dataset=data,
              data_collator=collate, compute_loss_func=as_compute_loss_func(objective))
    t.remove_callback(PrinterCallback)
    t.train()
    return before - torch.cat([p.detach().flatten() for p in model.parameters()]), t


def exact_gradient(objective):
    objective(model := tiny_model(), collate(rows())).loss.backward()
    return flat_grad(model)


NO_DIVISOR = "cannot know how many of those are selected: use UncertaintyAwareTrainer"


def test_a_loss_function_gives_the_gradient_of_the_objective_or_refuses(tmp_path):
    for o in (Objective(), Objective(threshold=5.5), Objective(weight="probability"), Objective.preset("mle")):
        found, _ = change(tmp_path, o, per_device_train_batch_size=6)
        torch.testing.assert_close(found, exact_gradient(o), atol=1e-6, rtol=1e-3)
    for name in ("mle", "dft"):  # nothing is selected, so all response tokens divide
        o = Objective.preset(name)
        found, _ = change(tmp_path, o, per_device_train_batch_size=2, gradient_accumulation_steps=3)
        torch.testing.assert_close(found, exact_gradient(o), atol=1e-6, rtol=1e-3)
    with pytest.raises(ValueError, match=NO_DIVISOR):
        change(tmp_path, Objective(), per_device_train_batch_size=2, gradient_accumulation_steps=3)


@pytest.mark.parametrize("asked", [dict(label_smoothing_factor=.1), dict(gradient_accumulation_steps=2)], ids=str)
def test_a_loss_function_that_knows_the_arguments_refuses_at_once(asked, tmp_path):
    with pytest.raises(ValueError, match=f"^{[*asked][0]} is {[*asked.values()][0]}"):
        as_compute_loss_func(Objective(), arguments(tmp_path, **asked))


def by_loss_function(rank, folder, out):
    found, _ = change(folder, Objective.preset("mle"), per_device_train_batch_size=3)
    with pytest.raises(ValueError, match=NO_DIVISOR):
        change(folder, Objective(), per_device_train_batch_size=3, average_tokens_across_devices=False)
    if rank == 0: torch.save(found, out)


def test_a_loss_function_in_two_processes(tmp_path):
    two_processes(by_loss_function, tmp_path/"store", tmp_path, tmp_path/"out.pt")
    together, mle = torch.load(tmp_path/"out.pt"), exact_gradient(Objective.preset("mle"))
    torch.testing.assert_close(together, mle, atol=1e-6, rtol=1e-3)


def test_a_loss_function_evaluates_with_the_plain_loss(tmp_path):
    "`load_best_model_at_end` reads this number."
    _, t = change(tmp_path, Objective(), per_device_train_batch_size=6, per_device_eval_batch_size=6, learning_rate=0.)
    plain = Objective.preset("mle")(tiny_model(), collate(rows())).loss.item()
    assert t.evaluate(rows())["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert next(r["train_loss"] for r in t.state.log_history if "train_loss" in r) > 1.01 * plain  # the masked loss


@pytest.mark.parametrize("settings", [dict(scope="sequence"), dict(granularity="document"),
                                      dict(granularity="document", metric="random"),
                                      dict(keep=1, weight="adaptive_probability")], ids=str)
def test_a_loss_function_cannot_tell_packed_documents_apart(settings):
    with pytest.raises(ValueError, match="cannot tell packed (documents|ones) apart: use UncertaintyAwareTrainer"):
        as_compute_loss_func(Objective(**settings))


def logged(folder, size):
    log = TokenLog(folder/f"{size}.parquet", (0, 1), tokenizer)
    trainer(folder, Objective(scope="global"), token_log=log, per_device_train_batch_size=size, max_steps=2,
            learning_rate=0.).train()
    return log.path


def log_tokens(rank, folder): logged(Path(folder), 2)


def test_the_token_log_has_the_documents_of_all_ranks(tmp_path):
    "Two processes with two documents each against one with four; the second step of three documents is filled up."
    two_processes(log_tokens, tmp_path/"store", tmp_path)
    key = ["step", "record", "position"]
    apart, whole = (pd.read_parquet(path).sort_values(key, ignore_index=True)
                    for path in (tmp_path/"2.parquet", logged(tmp_path, 4)))
    first = [frame[frame["step"] == 0].reset_index(drop=True) for frame in (apart, whole)]
    assert first[0]["record"].unique().tolist() == ["0", "1", "2", "3"]
    pd.testing.assert_frame_equal(*first, rtol=1e-5)
    assert {"4", "5"} <= set(apart.loc[apart["step"] == 1, "record"])


def test_the_token_log_keeps_two_records_of_one_id(tmp_path):
    data = [dict(row, id="the same") for row in rows()]
    log, cut = TokenLog(tmp_path/"tokens.parquet", (0,), tokenizer), dict(gradient_accumulation_steps=3)
    for _ in range(2):  # trained again, from the start
        trainer(tmp_path, data=data, token_log=log, per_device_train_batch_size=2, **cut).train()
    assert len(pd.read_parquet(log.path)) == sum(label != -100 for row in data for label in row["labels"])


def test_several_visible_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(args, "_n_gpu", 4)
    with pytest.raises(ValueError, match="sees 4 GPUs.*set CUDA_VISIBLE_DEVICES .*or start with .accelerate launch"):
        UncertaintyAwareTrainer(tiny_model(), args, train_dataset=rows(), processing_class=tokenizer)


@pytest.mark.parametrize("name, value", [("label_smoothing_factor", .1), ("train_sampling_strategy", "sequential")])
def test_arguments_without_effect_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"^{name} is .* leave it at"): trainer(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_that_would_never_be_called_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name} would never be called"):
        UncertaintyAwareTrainer(tiny_model(), arguments(tmp_path), processing_class=tokenizer, **{name: print})


SHARDED = "tiny-llama", "tiny-gemma2", "tiny-phi3"


def sharded(rank, folder):
    "Gradients of this rank's part of a batch with FSDP2, whole again."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    whole = collate(rows())
    for name in SHARDED:
        for o in (Objective.preset("mle"), Objective(scope="sequence", distill_weight=1.0)):
            model, mesh = tiny_model(name), init_device_mesh("cpu", (2,))
            for layer in model.model.layers: fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the objective reads the head after a forward
            with pytest.raises(ValueError, match="divided among processes"): head_of(model)  # before any forward
            batch, teacher = collate(rows()[rank::2]), FrozenTeacher(tiny_model(name, seed=1))
            (2 * o(model, batch, teacher, o.counts(whole)).loss).backward()
            grads = {k: p.grad.full_tensor() for k, p in model.named_parameters()}
            if rank == 0: torch.save(grads, f"{folder}/{name}-{o.scope}.pt")


def test_sharded_models_have_the_gradients_of_whole_ones(tmp_path):
    two_processes(sharded, tmp_path/"store", tmp_path)
    assert {tiny_model(name).config.tie_word_embeddings for name in SHARDED} == {True, False}
    for name in SHARDED:
        for o in (Objective.preset("mle"), Objective(scope="sequence", distill_weight=1.0)):
            model = tiny_model(name)
            o(model, collate(rows()), FrozenTeacher(tiny_model(name, seed=1))).loss.backward()
            found = torch.load(tmp_path/f"{name}-{o.scope}.pt")
            for k, p in model.named_parameters(): torch.testing.assert_close(found[k], p.grad, atol=1e-6, rtol=1e-4)


def wrapped_by_fsdp1(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel
    model = FullyShardedDataParallel(tiny_model(), device_id=torch.device("cpu"), use_orig_params=True)
    for use in (head_of, lambda m: Objective.preset("mle")(m, collate(rows()))):
        with pytest.raises(ValueError, match="wrapped by FSDP1: use DDP, or FSDP2 .* FSDP1 and ZeRO-3 are not supported"):
            use(model)


def test_fsdp1_is_refused_by_its_name(tmp_path):
    "PyTorch itself would end its backward with a state that it did not expect."
    two_processes(wrapped_by_fsdp1, tmp_path/"store", tmp_path)


@pytest.mark.parametrize("changes", [dict(logging_steps=1), dict(save_strategy="steps", save_steps=1), {}], ids=str)
@pytest.mark.parametrize("clip", [0, 1.0])
@pytest.mark.parametrize("objective", ["mle", "masked_mle"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_ends_the_training(bad, tmp_path, changes, clip, objective):
    "It leaves no trace in the loss of its step, and NaN weights in all that follow; no checkpoint has them."
    model, step = tiny_model(), 3 if not changes and objective == "mle" else 1
    model.get_decoder().layers[0].mlp.up_proj.weight.register_hook(lambda g: g + bad)
    with pytest.raises(FloatingPointError, match=f"the gradient is NaN or infinite at step {step} or before, .*: begin again, with a lower"):
        trainer(tmp_path, objective, model=model, max_steps=3, max_grad_norm=clip, **changes).train()
    assert not [*tmp_path.glob("checkpoint-*/*.safetensors")]


def test_a_gradient_that_was_no_number_is_not_told_again(tmp_path):
    "Of weights that were loaded again an evaluation is asked for, and another training."
    model = tiny_model()
    hook = model.get_decoder().layers[0].mlp.up_proj.weight.register_hook(lambda g: g * float("nan"))
    t = trainer(tmp_path, model=model, logging_steps=1)
    with pytest.raises(FloatingPointError): t.train()
    hook.remove()
    model.load_state_dict(tiny_model().state_dict())
    assert t.evaluate(rows())["eval_loss"] > 0 and t.train().global_step == 1


def test_a_cached_teacher_that_would_follow_the_student_is_refused(tmp_path):
    model = tiny_model().requires_grad_(False)
    teacher = CachedTeacher(HiddenCache.build(model, rows(), tmp_path/"states"), head_of(model))
    assert torch.isfinite(Objective.preset("combined")(model, collate(rows()), teacher).loss)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="was frozen when the cached teacher was made of it, and trains by now"):
        Objective.preset("combined")(model, collate(rows()), teacher)


def test_rows_that_a_function_makes(tmp_path):
    from datasets import Dataset
    lazy = Dataset.from_dict(dict(n=[*range(len(rows()))])).with_transform(lambda batch: {
        k: [rows()[n][k] for n in batch["n"]] for k in ("id", "input_ids", "labels")})
    (a, b) = (trainer(tmp_path, data=data) for data in (lazy, rows()))
    assert a.train().training_loss == b.train().training_loss


def test_a_resume_says_which_checkpoints_it_passes_over(tmp_path, caplog):
    "The files of others' callbacks do not matter; those that a training goes on by do."
    trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train()
    for name, text in (("overrides.json", "{}"), ("metrics.json", "{}\n{}")): (tmp_path/"checkpoint-2"/name).write_text(text)
    (tmp_path/"checkpoint-3/trainer_state.json").write_text('{"epoch": ')
    t = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    began = []
    t.add_callback(AtSteps(lambda step, model: began.append(step), 1))
    t.train(resume_from_checkpoint=True)
    for name in "optimizer.pt", "scheduler.pt": (tmp_path/"checkpoint-3"/name).unlink()  # as `save_only_model` leaves them out
    t.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is not whole and is passed over: files are missing" in caplog.text
    assert began == [3, 3] and "checkpoint-3 is not whole and is passed over: trainer_state.json" in caplog.text


@pytest.mark.parametrize("asked", [True, False])
def test_a_loss_that_balances_experts_is_not_dropped_in_silence(asked, tmp_path, caplog):
    config = AutoConfig.for_model("mixtral", vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=2, num_local_experts=2, output_router_logits=asked)
    trainer(tmp_path, "mle", model=AutoModelForCausalLM.from_config(config))
    assert ("a loss that balances its experts" in caplog.text) == asked


def test_data_seed_draws_another_order(tmp_path):
    def order(**seeds):
        t = trainer(tmp_path, kind=UncertaintyAwareTrainer, per_device_train_batch_size=2, **seeds)
        return list(t._get_train_sampler())
    assert order(seed=3) == order(seed=3, data_seed=3) == order(seed=4, data_seed=3)
    assert len({tuple(order(data_seed=n)) for n in range(5)}) > 1


def test_padding_on_the_left_changes_nothing():
    "The first token of a row has nothing but padding before it, so that it is no response token."
    texts = [[5, 6, 7, 8, 9], [10, 11]]
    model, right = tiny_model(), collate([dict(input_ids=x, labels=x, id=str(n)) for n, x in enumerate(texts)])
    left = {name: right[name].clone() for name in ("input_ids", "labels", "attention_mask")}
    for x in left.values(): x[1] = x[1].roll(3)
    for objective in (Objective.preset("mle"), Objective.preset("masked_mle")):
        a, b = objective(model, right), objective(model, left)
        assert b.loss.item() == pytest.approx(a.loss.item(), rel=1e-5)


def test_a_compute_loss_func_takes_the_name_of_a_preset():
    batch, model = collate(rows()), tiny_model()
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    named, given = (as_compute_loss_func(o)(out, batch["labels"]) for o in ("masked_mle", Objective.preset("masked_mle")))
    assert named.item() == given.item()


def test_a_compute_loss_func_tells_of_the_loss_of_experts_that_it_leaves_out():
    batch, model = collate(rows()), tiny_model()
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    out.aux_loss = torch.tensor(1.)
    with pytest.warns(UserWarning, match="balances its experts"): as_compute_loss_func("mle")(out, batch["labels"])


def test_a_compute_loss_func_leaves_a_learnt_prompt_out():
    batch, model = collate(rows()), tiny_model()
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    want = as_compute_loss_func("masked_mle")(out, batch["labels"])
    out.logits = torch.cat([torch.randn(len(out.logits), 3, out.logits.shape[-1]), out.logits], 1)
    assert as_compute_loss_func("masked_mle")(out, batch["labels"]).item() == want.item()


def test_a_second_training_begins_with_a_log_of_its_own(tmp_path):
    t = trainer(tmp_path, "mle", max_steps=3, logging_steps=2, learning_rate=0.)
    for _ in range(2): t.train()
    first = next(row for row in t.state.log_history if "mle" in row)
    assert first["loss"] == pytest.approx(first["mle"], rel=1e-4)
    assert t._seen is not None  # the third step is in no line


def test_a_hook_at_steps_is_called_at_an_end_that_comes_early(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 4
    t, seen = trainer(tmp_path, max_steps=6), []
    for callback in AtSteps(lambda step, model: seen.append(step), 3), Stop(): t.add_callback(callback)
    t.train(); t.train()
    assert seen == [0, 3, 4, 0, 3, 4]


def test_tokens_without_a_record_are_told():
    packed = dict(input_ids=torch.arange(5, 15)[None], labels=torch.arange(5, 15)[None])
    with pytest.raises(ValueError, match="there is no 'id', only input_ids, labels: make rows by encode_all"):
        token_frame(packed, tokenizer)
