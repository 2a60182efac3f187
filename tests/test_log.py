"""What a Trainer logs beside the loss, and to whom."""
import json

import pandas as pd, pytest, torch
from datasets import Dataset
from transformers.integrations import integration_utils

from examples import rows, tokenizer
from test_trainer_faults import RAGGED, trainer
from test_training import two_processes
from uat_repro import cli
from uat_repro.models import tiny_model
from uat_repro.objective import Objective
from uat_repro.tokens import Collator


def repeating():
    "A model that repeats its input, so that it is right wherever a token follows itself."
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj): part.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


DATA = rows([*RAGGED, ("h", "aa, bbb, cccc")])

def expected(data):
    "The share of tokens that follow themselves, of those that have a label."
    pairs = [(a, b) for row in data for a, b, label in zip(row["input_ids"], row["input_ids"][1:], row["labels"][1:])
             if label != -100]
    return pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("objective", ["mle", "masked_mle"])
@pytest.mark.parametrize("size, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_the_accuracy_of_a_step_counts_all_of_its_tokens_however_it_is_cut(objective, size, accumulation, tmp_path):
    t = trainer(tmp_path, objective, DATA[-4:], per_device_train_batch_size=size, logging_steps=1, model=repeating(),
                gradient_accumulation_steps=accumulation)
    t.train()
    assert [line["accuracy"] for line in t.state.log_history if "mle" in line] == [expected(DATA[-4:])] != [0]


MIXED = Dataset.from_list([row | dict(source="ab"[i % 3 > 0], loss_weights=[1. + i] * len(row["labels"]))
                           for i, row in enumerate(DATA[-4:])])

def by_source():
    "The loss and the accuracy of each source by the model at the start, over all tokens that have a label."
    losses, found = Objective.preset("mle")(repeating(), Collator(tokenizer)(DATA[-4:])).token_loss, {}
    for name in "ab":
        mine = [i for i, source in enumerate(MIXED["source"]) if source == name]
        found |= {f"loss/{name}": pytest.approx(losses[mine].nanmean().item(), rel=1e-5),
                  f"accuracy/{name}": expected([DATA[-4:][i] for i in mine])}
    return found

def of_sources(t):
    "The lines about sources in the log."
    t.train()
    return [{name: x for name, x in line.items() if "/" in name} for line in t.state.log_history if "mle" in line]


@pytest.mark.parametrize("objective", ["mle", "masked_mle"])
@pytest.mark.parametrize("size, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_each_source_has_its_loss_and_accuracy_however_a_step_is_cut(objective, size, accumulation, tmp_path):
    cut = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    t = trainer(tmp_path, objective, MIXED, logging_steps=1, model=repeating(), **cut)
    assert of_sources(t) == [by_source()]


def test_one_source_or_none_adds_nothing_to_the_log_and_too_many_are_told(tmp_path, caplog):
    one = MIXED.remove_columns("source").add_column("source", ["a"] * 4)
    for data in (one, DATA[-4:]): assert not any(of_sources(trainer(tmp_path, "mle", data, logging_steps=1)))
    assert not caplog.records
    many = Dataset.from_list([DATA[0] | dict(source=str(i)) for i in range(21)])
    assert trainer(tmp_path, "mle", many).sources == [] and "21 sources are too many" in caplog.text


def half(rank, folder):
    t = trainer(folder, "masked_mle", MIXED, per_device_train_batch_size=2, logging_steps=1, model=repeating())
    if rank == 0: json.dump(of_sources(t), open(f"{folder}/log.json", "w"))
    else: t.train()


def test_the_sources_of_all_ranks_are_one_sum(tmp_path):
    two_processes(half, tmp_path/"store", tmp_path)
    assert json.loads((tmp_path/"log.json").read_text()) == [by_source()]


def test_records_bring_their_source_from_the_file_to_the_log(tmp_path):
    raw = [dict(question=f"{i} + 1?", answer="aa", source="web" if i % 2 else "books") for i in range(8)]
    (tmp_path/"mix.jsonl").write_text("\n".join(map(json.dumps, raw)))
    assert not cli.main(["train", str(tmp_path/"mix.jsonl"), "--model", "tiny-llama", "--out", str(tmp_path/"out")])
    log = pd.read_parquet(tmp_path/"out/log.parquet")
    assert {"loss/web", "accuracy/web", "loss/books", "accuracy/books"} < {*log}


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_accuracy_of_an_evaluation_is_one_number_for_every_batch_size(size, tmp_path):
    found = trainer(tmp_path, per_device_eval_batch_size=size, model=repeating()).evaluate(DATA)
    assert found["eval_accuracy"] == expected(DATA) != 0


@pytest.mark.parametrize("to, said", [("trackio", "pip install trackio"), ("trackoi", "trackio")])
def test_who_else_gets_the_log_is_told_in_one_line_where_it_cannot_be(to, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: False)
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(dict(question=f"{i}?", answer=f"{i}")) for i in range(9)))
    asked = ["train", str(tmp_path / "sums.jsonl"), "--model", "tiny-llama", "--out", str(tmp_path / "out")]
    assert cli.main([*asked, "--report-to", to]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("uat-repro: ") and said in err
