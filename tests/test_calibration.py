"""Calibration against a direct computation, and models whose calibration is known."""
import numpy as np, pytest, torch
from torch.nn.functional import cross_entropy

from uat_repro.calibration import calibration, calibration_error, fit_temperature, predictions_of, reliability_table
from uat_repro.models import tiny_model, tiny_tokenizer
from uat_repro.tokens import Collator, encode_all, lay_out


@pytest.fixture(scope="module")
def batches():
    tok = tiny_tokenizer()
    def chat(i): return [dict(role="user", content="?" * i), dict(role="assistant", content=f"{i} " * (9 + i))]
    rows = encode_all([dict(messages=chat(i)) for i in range(1, 13)], tok)
    return [Collator(tok)([rows[j] for j in range(i, i + 4)]) for i in (0, 4, 8)]


def plainly(model, batches):
    "Logits (N, V) and targets (N,)."
    layouts = [lay_out(b) for b in batches]
    with torch.no_grad(): logits = [model(b["input_ids"], b["attention_mask"]).logits for b in batches]
    found = torch.cat([layout.predicting(z) for layout, z in zip(layouts, logits)])
    return found.double(), torch.cat([layout.targets for layout in layouts])


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2"])
def test_against_a_plain_computation(name, batches):
    model = tiny_model(name).eval()
    with torch.no_grad(): model.get_output_embeddings().weight.mul_(8)
    found = calibration(model, batches[:1], batches[1:], bins=7).set_index("fitted")
    logits, targets = plainly(model, batches[1:])
    for fitted, row in found.iterrows():
        p = (logits / row["temperature"]).softmax(-1)
        top, best = p.max(-1)
        right = (best == targets).numpy()
        bins = np.digitize(top.numpy(), np.linspace(0, 1, 8)[1:-1], right=True)
        error = sum(abs((right - top.numpy())[bins == b].sum()) for b in set(bins)) / len(bins)
        assert row["calibration_error"] == pytest.approx(error, abs=1e-4)
        assert row["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
        assert row["confidence"] == pytest.approx(float(top.mean()), abs=1e-4)
        assert row["nll"] == pytest.approx(float(cross_entropy(logits / row["temperature"], targets)), abs=1e-4)


def drawn(model, batches):
    "The batches with other labels, which are drawn from what the model predicts."
    draws, found = torch.Generator().manual_seed(0), []
    for b in batches:
        layout, (logits, _) = lay_out(b), plainly(model, [b])
        labels = b["labels"].clone()
        labels[layout.valid] = logits.softmax(-1).multinomial(1, generator=draws)[:, 0]
        found.append(b | dict(labels=labels))
    return found


def test_a_calibrated_model_needs_no_temperature_and_scaled_logits_give_the_scale_back(batches):
    model = tiny_model().eval()
    with torch.no_grad(): model.get_output_embeddings().weight.mul_(4)
    honest = drawn(model, batches)
    found = calibration(model, honest, honest)
    fitted = found["temperature"][1]
    assert fitted == pytest.approx(1, abs=.1)
    assert found["confidence"][0] == pytest.approx(found["accuracy"][0], abs=.05)
    logits, targets = plainly(model, honest)
    grid = torch.logspace(-.3, .3, 400)
    losses = torch.stack([cross_entropy(logits / tau, targets) for tau in grid])
    assert fitted == pytest.approx(float(grid[losses.argmin()]), rel=.01)
    model.lm_head.weight = torch.nn.Parameter(3 * model.lm_head.weight.detach())  # the embeddings stay as they are
    assert fit_temperature(predictions_of(model, honest)) / fitted == pytest.approx(3, rel=.01)


def test_honest_promises_have_no_error():
    draws = torch.Generator().manual_seed(0)
    promised = torch.rand(200_000, generator=draws)
    kept = torch.rand(200_000, generator=draws) < promised
    assert calibration_error(reliability_table(promised, kept)) < .01
    assert calibration_error(reliability_table(promised.sqrt(), kept)) == pytest.approx(1 / 6, abs=.01)  # E[sqrt u - u]
