"""What a Trainer reports and keeps: the same in one process and in two, and nothing that it cannot do in silence."""
import pytest, torch
from transformers import PrinterCallback, TrainingArguments

from examples import PAIRS, rows, tokenizer
from test_training import InOrder, two_processes
from uat_repro.models import tiny_model
from uat_repro.objective import Objective
from uat_repro.tokens import Collator
from uat_repro.training import UncertaintyAwareTrainer

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
    for losses in (eval_losses(tmp_path), torch.load(tmp_path/"out.pt")): assert losses == pytest.approx([exact] * 4, rel=1e-6)
    by_record = [Objective.preset("mle")(tiny_model(), collate([row])).loss.item() for row in rows(RAGGED)]
    assert sum(by_record) / len(by_record) != pytest.approx(exact, rel=1e-4)  # the mean of means is another number


def test_eval_loss_of_data_without_responses_is_not_zero(tmp_path):
    silent = [dict(row, labels=[-100] * len(row["labels"])) for row in rows()]
    assert trainer(tmp_path).evaluate(silent)["eval_loss"] != 0
