"""The objective against float64 formulas on plain logits, for three families, two metrics and both granularities."""
import math

import pytest, torch

from examples import PAIRS, flat_grad, logits_of, rows, tokenizer
from uat_repro import head as head_module
from uat_repro.tokens import Collator
from uat_repro.distillation import FrozenTeacher
from uat_repro.models import TINY, tiny_model
from uat_repro.objective import METRICS, PRESETS, WEIGHTS, Metric, Objective, Weight
from uat_repro.uncertainty import MCDropout

batch = Collator(tokenizer)(rows())
valid = (batch["labels"] != -100)[:, 1:]


def naive_mask(o, losses, entropies):
    "Equation 7 by sorting Python lists; a copy of nothing in the library."
    scores, mask = losses if o.metric == "loss" else entropies, torch.zeros_like(valid)
    sign = 1 if o.order == "top" else -1
    if o.granularity == "document":
        docs = sorted(range(len(valid)), key=lambda b: (-sign * scores[b][valid[b]].mean().item(), b))
        for b in docs[:math.ceil(o.keep * len(docs))]: mask[b] = valid[b]
        return mask
    places = [(b, t) for b in range(valid.shape[0]) for t in range(valid.shape[1]) if valid[b, t]]
    groups = [[p for p in places if p[0] == b] for b in range(len(valid))] if o.scope == "sequence" else [places]
    for group in groups:
        ranked = sorted(group, key=lambda p: (-sign * scores[p].item(), p))
        for b, t in ranked[:math.ceil(o.keep * len(group))]: mask[b, t] = True
    return mask


def naive_loss(o, model, teacher):
    "Equation 9 in float64, with its own mask."
    log_p = logits_of(model, batch).double().log_softmax(-1)
    losses = -log_p.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    m = naive_mask(o, losses.detach(), -(log_p.exp() * log_p).sum(-1).detach())
    d = valid if o.distill_on == "all" else valid & ~m
    tau = o.temperature
    log_s, log_t = (logits_of(x, batch).double().div(tau).log_softmax(-1) for x in (model, teacher))
    kl = tau**2 * (log_t.exp() * (log_t - log_s)).sum(-1)
    return losses[m].mean() + o.distill_weight * kl[d].mean(), m


OBJECTIVES = [
    Objective(), Objective(keep=.1, metric="entropy"), Objective(scope="sequence", keep=.4),
    Objective(order="bottom", keep=.5), Objective(granularity="document", keep=.4),
    Objective(distill_weight=.7, temperature=2.), Objective(keep=1, distill_weight=1., distill_on="all"),
]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("o", OBJECTIVES, ids=str)
def test_loss_mask_and_gradient(family, o, monkeypatch):
    monkeypatch.setattr(head_module, "SLICE_LOGITS", 1)  # the narrowest slices of the vocabulary, of 256 and 3 tokens
    student, teacher = tiny_model(family), FrozenTeacher(tiny_model(family, seed=1))
    out = o(student, batch, teacher=teacher)
    out.loss.backward()
    reference = tiny_model(family).double()
    loss, mask = naive_loss(o, reference, teacher.model.double())
    loss.backward()
    assert torch.equal(out.selected[:, 1:], mask) and not out.selected[:, 0].any()
    torch.testing.assert_close(out.loss.double(), loss, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(flat_grad(student).double(), flat_grad(reference), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["mle", "masked_mle", "dft"])
@pytest.mark.parametrize("label", [-1, 259])
def test_a_label_that_is_no_token_is_refused(name, label):
    wrong = {**batch, "labels": batch["labels"].index_fill(1, torch.tensor([3]), label)}
    with pytest.raises(ValueError, match=f"label {label} is none of the 259 tokens of the vocabulary"):
        Objective.preset(name)(tiny_model(), wrong)


@pytest.mark.parametrize("family", TINY)
def test_finite_differences_of_the_distillation_term(family):
    o, model = Objective.preset("self_distillation"), tiny_model(family)
    teacher = FrozenTeacher(tiny_model(family, seed=1))
    o(model, batch, teacher=teacher).loss.backward()
    weight = model.model.layers[0].mlp.down_proj.weight
    direction = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    slope, step, values = float((weight.grad * direction).sum()), 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            values.append(float(o(model, batch, teacher=teacher).loss))
            weight -= sign * step * direction
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)


def test_distillation_from_itself_is_zero_at_the_start():
    model = tiny_model()
    out = Objective.preset("self_distillation")(model, batch, teacher=FrozenTeacher(model))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0, abs=1e-5) and flat_grad(model).abs().max() < 1e-4


def test_first_response_token_and_end_of_turn_are_predicted():
    out = Objective.preset("mle")(tiny_model(), batch)
    for row, (prompt, response) in enumerate(PAIRS):
        start = len(tokenizer(prompt)["input_ids"])
        end = start + len(tokenizer(response)["input_ids"])
        assert out.selected[row].nonzero()[:, 0].tolist() == list(range(start, end))


def test_packed_documents_do_not_predict_each_other():
    one, other = (row["input_ids"] for row in rows(PAIRS[:2]))
    packed = dict(input_ids=torch.tensor([one + other]), labels=torch.tensor([one + other]),
                  position_ids=torch.tensor([[*range(len(one)), *range(len(other))]]))
    out = Objective.preset("mle")(tiny_model(), packed)
    assert not out.selected[0, 0] and not out.selected[0, len(one)]
    assert int(out.selected.sum()) == packed["labels"].numel() - 2


def test_bfloat16_model_is_scored_in_float32():
    o, half = Objective(), tiny_model().bfloat16()
    out = o(half, batch)
    out.loss.backward()
    scores = out.token_loss[~out.token_loss.isnan()]
    assert out.token_loss.dtype == torch.float32 and len(scores.unique()) > .9 * len(scores)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in half.parameters())


def test_a_new_metric_is_one_entry(monkeypatch):
    "Three lines; a step trains on its tokens, and whoever misspells it is told its name first."
    def surprise(scored): return scored.scores.loss - scored.scores.entropy
    monkeypatch.setitem(METRICS, "surprise", Metric(surprise))
    o = Objective(metric="surprise")

    model = tiny_model()
    out = o(model, batch)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=.1).step()
    surprises = out.token_loss - out.token_entropy
    assert surprises[out.selected].min() >= surprises[~out.selected & ~out.token_loss.isnan()].max()
    assert o(model, batch).token_loss[out.selected].mean() < out.mle
    assert torch.equal(out.selected, Objective(metric=surprise)(tiny_model(), batch).selected)
    with pytest.raises(ValueError, match="metric is 'suprise'. Did you mean 'surprise'. Others are .*loss"):
        Objective(metric="suprise")


def test_a_new_weight_is_one_entry(monkeypatch):
    "It sees the selected tokens only, and their logits if it wants them."
    seen = []

    def margin(scored):
        seen.append(scored.layout.targets)
        return scored.over_logits(lambda logits: logits.topk(2).values.diff().abs()[:, 0])
    monkeypatch.setitem(WEIGHTS, "margin", Weight(margin, "logits"))
    out = Objective(weight="margin")(tiny_model(), batch)
    assert torch.equal(seen[0], batch["labels"][out.selected])
    top = logits_of(tiny_model(), batch).topk(2).values[out.selected[:, 1:]]
    expected = ((top[:, 0] - top[:, 1]) * out.token_loss[out.selected]).mean()
    torch.testing.assert_close(out.mle, expected, atol=1e-5, rtol=1e-5)


def test_what_an_objective_needs_follows_from_its_rules():
    needs = {name: Objective.preset(name) for name in ("masked_mle", "combined", "stm", "rho1", "eaft")}
    assert [n for n, o in needs.items() if o.needs_teacher] == ["combined", "stm", "rho1"]
    assert [n for n, o in needs.items() if o.needs_reference] == ["rho1"]
    unread = Objective(metric=Metric(lambda scored: scored.teacher.loss, "teacher"), keep=1.)
    assert not unread.needs_teacher  # all tokens are selected, so nobody reads the metric


def test_a_weight_may_read_uncertainty_and_teacher_of_packed_documents():
    r = rows()
    packed = {k: torch.tensor([sum((row[k] for row in r), [])]) for k in ("input_ids", "labels")}
    packed["position_ids"] = torch.tensor([[t for row in r for t in range(len(row["input_ids"]))]])
    posterior, teacher = MCDropout(p=.1, samples=4), FrozenTeacher(tiny_model(seed=1))
    weights = dict(posterior=lambda scored: scored.uncertainty.epistemic, teacher=lambda scored: scored.teacher.loss)
    for needs, fn in weights.items():
        o = Objective(weight=Weight(fn, needs), posterior=posterior)
        out = o(tiny_model(), packed, teacher=teacher)
        if needs == "posterior": weight = posterior(tiny_model(), packed).epistemic
        else: weight = Objective.preset("mle")(teacher.model, packed).token_loss
        expected = (weight * out.token_loss)[out.selected].mean()
        torch.testing.assert_close(out.mle, expected, atol=1e-5, rtol=1e-5)


def test_a_teacher_with_more_rows_in_its_output_layer_than_tokens():
    "Some families pad it: the rows that the student does not have are left out; a shorter layer is refused."
    student, teacher, o = tiny_model(), tiny_model(seed=1), Objective.preset("combined")
    batch, tokens = Collator(tokenizer)(rows()), student.config.vocab_size
    same = o(student, batch, FrozenTeacher(teacher)).loss
    teacher.resize_token_embeddings(tokens + 8, mean_resizing=False)
    assert torch.equal(o(student, batch, FrozenTeacher(teacher)).loss, same)
    student.resize_token_embeddings(tokens + 16, mean_resizing=False)
    with pytest.raises(ValueError, match="make the teacher after the embeddings are resized"):
        o(student, batch, FrozenTeacher(teacher))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_head_that_does_not_train_changes_nothing_else(family, preset, monkeypatch):
    monkeypatch.setattr("uat_repro.loss.LEAST", 5)
    monkeypatch.setattr("uat_repro.head.CHUNK_LOGITS", 1)
    teacher, found = FrozenTeacher(tiny_model(family, seed=1)), []
    for trains in (True, False):
        model = tiny_model(family)
        for part in (model.get_input_embeddings(), model.get_output_embeddings()): part.requires_grad_(trains)
        torch.manual_seed(0)  # of random masks
        out = Objective.preset(preset)(model, batch, teacher=teacher)
        out.loss.backward()
        layers = [p.grad for p in model.get_decoder().layers.parameters()]
        found.append([out.loss.detach(), out.mle, out.distill, out.token_loss, out.token_entropy, *layers])
    for whole, frozen in zip(*found): torch.testing.assert_close(whole, frozen, atol=1e-6, rtol=1e-4, equal_nan=True)
