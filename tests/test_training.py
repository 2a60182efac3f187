"""The Trainer: one result however a step is cut, in one process or two, with checkpoints."""
import gc, json, os

import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from examples import flat_grad, rows, tokenizer
from uat_repro.tokens import Collator
from uat_repro.distillation import FrozenTeacher
from uat_repro.models import tiny_model
from uat_repro.objective import Objective
from uat_repro.training import UncertaintyAwareTrainer

collate = Collator(tokenizer)


class InOrder(UncertaintyAwareTrainer):
    "Without shuffling, so that steps hold the same documents however they are cut."
    def _get_train_sampler(self, train_dataset=None): return torch.utils.data.SequentialSampler(self.train_dataset)


BY_SEQUENCE = [
    Objective(scope="sequence", distill_weight=.5), Objective.preset("mle"),
    Objective(scope="sequence", metric="entropy", keep=.5),
]


@pytest.mark.parametrize("objective", BY_SEQUENCE, ids=str)
def test_accumulation_changes_nothing(objective, tmp_path):
    "Six documents in steps of four: the second step is short, and its micro-batches are ragged."
    def weights(size, accumulation):
        args = TrainingArguments(
            str(tmp_path), num_train_epochs=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=.5, max_grad_norm=0,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
        teacher = FrozenTeacher(tiny_model(seed=1))
        trainer = InOrder(tiny_model(), args, objective, teacher, train_dataset=rows(), processing_class=tokenizer)
        trainer.train()
        assert trainer.state.global_step == 2
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    whole = weights(4, 1)
    for size, accumulation in ((2, 2), (1, 4)):
        torch.testing.assert_close(weights(size, accumulation), whole, atol=2e-5, rtol=1e-4)


def test_activation_checkpointing_changes_nothing(tmp_path):
    "The layers run again in the backward, on documents in a row; afterwards the model generates as before."
    def trained(checkpointing):
        args = TrainingArguments(
            str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-2,
            gradient_checkpointing=checkpointing, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
        teacher = FrozenTeacher(tiny_model(seed=1))
        trainer = InOrder(tiny_model(), args, "combined", teacher, train_dataset=rows(), processing_class=tokenizer)
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        prompt = tokenizer(["Count", "Say more than that"], return_tensors="pt", padding=True, padding_side="left",
                           return_token_type_ids=False)
        return weights, trainer.model.eval().generate(**prompt, max_new_tokens=8, do_sample=False)
    (plain, said), (checkpointed, again) = trained(False), trained(True)
    torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(said, again)


SPLIT = {
    "sequence": Objective(scope="sequence", distill_weight=.5), "global": Objective(scope="global", distill_weight=.5),
    "mle": Objective.preset("mle"),
    "global documents": Objective(
        granularity="document", scope="global", keep=.5, distill_weight=.5, distill_on="all"),
}


def in_group(rank, work, store, *args):
    "Do `work` as one of two gloo processes. Its models are gone before the group is: their reducers wait on it."
    torch.set_num_threads(1)
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)  # for the Trainer
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    work(rank, *args)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def two_processes(work, *args):
    mp.start_processes(in_group, (work, *map(str, args)), nprocs=2, start_method="spawn")


def step(o, rows):
    "Gradient of this rank's rows through DistributedDataParallel, and the loss before it is averaged."
    batch, model = collate(rows), tiny_model()
    wrapped, total = DistributedDataParallel(model), o.counts(batch)
    dist.all_reduce(total)
    loss = o(wrapped, batch, teacher=FrozenTeacher(tiny_model(seed=1)), num_items=total).loss
    (2 * loss).backward()
    return flat_grad(model), loss.item()


def gradients(rank, parts, out):
    found = {name: step(o, [rows()[i] for i in json.loads(parts)[rank]])[0] for name, o in SPLIT.items()}
    if rank == 0: torch.save(found, out)


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3, 4, 5]]], ids=str)
def test_two_processes_equal_one(parts, tmp_path):
    two_processes(gradients, tmp_path/"store", json.dumps(parts), tmp_path/"out.pt")
    together, batch = torch.load(tmp_path/"out.pt", weights_only=True), collate(rows())
    for name, o in SPLIT.items():
        model = tiny_model()
        o(model, batch, teacher=FrozenTeacher(tiny_model(seed=1))).loss.backward()
        torch.testing.assert_close(together[name], flat_grad(model), atol=1e-5, rtol=1e-3, msg=lambda m: f"{name}: {m}")


def lonely(rank):
    "Rank 1 has a prompt without a response."
    mine = [dict(rows()[0], labels=[-100] * len(rows()[0]["labels"]))] if rank else [rows()[2]]
    documents = Objective(granularity="document", scope="global")
    for o in (Objective(), Objective(scope="global"), Objective.preset("combined"), documents):
        gradient, loss = step(o, mine)
        assert gradient.isfinite().all() and gradient.any() and (rank == 0 or loss == 0)


def test_a_rank_without_response_tokens_takes_part(tmp_path):
    two_processes(lonely, tmp_path/"store")
