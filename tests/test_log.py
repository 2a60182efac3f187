"""What a Trainer logs beside the loss, and to whom."""
import json

import pytest, torch
from transformers.integrations import integration_utils

from examples import rows, tokenizer
from test_trainer_faults import RAGGED, trainer
from uat_repro import cli
from uat_repro.models import tiny_model


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
