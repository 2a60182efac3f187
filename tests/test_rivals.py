"""Objectives of other papers against their own formulas, in float64 on plain logits, for three families."""
import math, statistics

import pytest, torch

from examples import flat_grad, logits_of, rows, tokenizer
from uat_repro.tokens import Collator
from uat_repro.distillation import FrozenTeacher
from uat_repro.models import TINY, tiny_model
from uat_repro.objective import Objective

batch = Collator(tokenizer)(rows())
valid = (batch["labels"] != -100)[:, 1:]


def learnt(family: str, steps: int) -> torch.nn.Module:
    "A model that knows the batch somewhat: some of its tokens have become likely."
    model = tiny_model(family)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        Objective.preset("mle")(model, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def log_probs(model) -> torch.Tensor: return logits_of(model, batch).double().log_softmax(-1)[valid]


def of_labels(log_p: torch.Tensor) -> torch.Tensor:
    return -log_p.gather(-1, batch["labels"][:, 1:][valid][:, None])[:, 0]


def rho1(log_p, reference):
    "Lin et al. 2024, equations 3 to 5: the quarter with the largest excess loss, and the mean of its losses."
    loss = of_labels(log_p)
    excess = (loss - of_labels(reference)).tolist()
    chosen = sorted(range(len(excess)), key=lambda t: -excess[t])[:math.ceil(.25 * len(excess))]
    return sum(loss[t] for t in chosen) / len(chosen)


def stm(log_p, reference):
    "Wu et al. 2025 (2501.14315): tokens with a perplexity above 2.5 under the initial model carry no label."
    known = of_labels(reference).exp() <= 2.5
    assert 0 < known.sum() < len(known)
    return of_labels(log_p)[known].mean()


def dft(log_p, reference):
    "Wu et al. 2025 (2508.05629), equation 9: each loss times the token's own probability, without its gradient."
    loss = of_labels(log_p)
    return ((-loss).exp().detach() * loss).mean()


def asft(log_p, reference):
    "Zhu et al. 2025: DFT plus the divergence of the initial model's distribution from the model's."
    return dft(log_p, reference) + .1 * (reference.exp() * (reference - log_p)).sum(-1).mean()


def eaft(log_p, reference):
    "Diao et al. 2026: each loss times the normalised entropy, of the 20 likeliest tokens."
    p = log_p.detach().exp().topk(20).values
    p = p / p.sum(-1, keepdim=True)
    return (-(p * p.log()).sum(-1) / math.log(20) * of_labels(log_p)).mean()


def profit(log_p, reference):
    "Liu et al. 2026 (2601.09195): tokens with a probability below 0.1 carry no label."
    loss = of_labels(log_p)
    known = (-loss.detach()).exp() >= .1
    assert 0 < known.sum() < len(known)
    return loss[known].mean()


def iw_sft(log_p, reference):
    "Qin and Springenberg 2025: each text's losses times exp(mean log ratio) of that text, in [0, 16]."
    loss, total, first = of_labels(log_p), 0, 0
    for length in valid.sum(1).tolist():
        own, other = (x[first:first + length] for x in (loss, of_labels(reference)))
        ratio = math.exp((other - own).mean().item())
        total, first = total + min(ratio, 16) * own.sum(), first + length
    return total / len(loss)


def p10(log_p, reference):
    "Li et al. 2025 (2510.00526): (1 - p^k) / k in place of the loss, k = 10."
    return ((1 - (-10 * of_labels(log_p)).exp()) / 10).mean()


def info_sft(log_p, reference):
    "Sabbaghi et al. 2026 (2605.14967): each loss times p [1 - logit p / logit P]+, P = 0.93."
    loss = of_labels(log_p)
    p = (-loss.detach()).exp()
    weight = p * torch.relu(1 - torch.logit(p) / math.log(.93 / .07))
    assert weight.any()
    return (weight * loss).mean()


def talr(log_p, reference):
    "Lin et al. 2025 (2509.20758): each loss times p^(1/tau), tau the median of the texts' mean losses."
    loss = of_labels(log_p)
    tau = statistics.median(part.mean().item() for part in loss.split(valid.sum(1).tolist()))
    return ((-loss.detach() / tau).exp() * loss).mean()


def psft(log_p, reference):
    "Zhu et al. 2025 (2508.17784): the objective of PPO, with an advantage of 1."
    ratio = (of_labels(reference) - of_labels(log_p)).exp()
    assert 0 < (ratio > 1.28).sum() < len(ratio)
    return -torch.minimum(ratio, ratio.clamp(1 - .2, 1 + .28)).mean()


def pear(log_p, reference):
    """Zhang et al. 2026 (2602.01058), by suffixes: each loss times gamma^(T - t) and the ratios of all later tokens, where
    a ratio's logarithm is within [-0.08, 0.3] and the product's within [-10, 5]."""
    loss, total, first, clipped = of_labels(log_p), 0, 0, 0
    for length in valid.sum(1).tolist():
        own, other = (x[first:first + length] for x in (loss, of_labels(reference)))
        ratio = (other - own).detach()
        clipped += (ratio > .3).sum() + (ratio < -.08).sum()
        for t in range(length):
            weight = (length - 1 - t) * math.log(.999) + sum(min(max(r, -.08), .3) for r in ratio[t + 1:].tolist())
            total, at_most = total + math.exp(min(max(weight, -10), 5)) * own[t], weight
        first += length
    assert clipped and at_most == 0
    return total / len(loss)


FORMULAS = [rho1, stm, dft, asft, eaft, profit, iw_sft, p10, info_sft, talr, psft, pear]
STEPS = {"p10": (80, 0), "info_sft": (30, 0), "psft": (8, 6)}  # of training: enough to know some tokens well, or to go beyond the clip
BY_GRADIENT = [p10, psft]  # functions of p, whose gradient is that of a weighted loss: the values are others


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
def test_preset_is_the_formula_of_its_paper(family, formula):
    steps, before = STEPS.get(formula.__name__, (8, 35 if family == "tiny-gemma2" else 12))
    student, reference = learnt(family, steps), learnt(family, steps).double()
    teacher = FrozenTeacher(learnt(family, before))
    out = Objective.preset(formula.__name__)(student, batch, teacher=teacher)
    out.loss.backward()
    loss = formula(log_probs(reference), log_probs(teacher.model.double()).detach())
    loss.backward()
    if formula not in BY_GRADIENT: torch.testing.assert_close(out.loss.double(), loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat_grad(student).double(), flat_grad(reference), atol=1e-4, rtol=1e-3)
    assert flat_grad(reference).abs().max() > 1e-3


QUANTILE = {"loss": of_labels, "entropy": lambda log_p: -(log_p.exp() * log_p).sum(-1)}


@pytest.mark.parametrize("metric", QUANTILE)
def test_eslm_is_a_setting(metric):
    "Bal et al. 2025 (2505.19893): the mean loss of the tokens whose score reaches its quantile in the batch."
    student, log_p = tiny_model(), log_probs(tiny_model())
    scores = QUANTILE[metric](log_p)
    chosen = scores >= scores.sort().values[-math.ceil(.1 * len(scores))]
    out = Objective(metric=metric, keep=.1)(student, batch)
    torch.testing.assert_close(out.loss.double(), of_labels(log_p)[chosen].mean(), atol=1e-5, rtol=1e-5)


def test_thresholds_of_other_powers_are_settings():
    "Li et al. 2025: (1 - p) [p >= q] has the gradient of DFT with a threshold."
    student, reference, q = learnt("tiny-llama", 8), learnt("tiny-llama", 8).double(), .1
    Objective.preset("dft", order="bottom", threshold=-math.log(q))(student, batch).loss.backward()
    p = (-of_labels(log_probs(reference))).exp()
    assert 0 < (p >= q).sum() < len(p)
    (1 - p)[p >= q].mean().backward()
    torch.testing.assert_close(flat_grad(student).double(), flat_grad(reference), atol=1e-4, rtol=1e-3)


def test_a_rule_that_needs_a_second_model_says_so():
    for name in ("rho1", "stm", "asft", "iw_sft", "psft", "pear"):
        with pytest.raises(ValueError, match="pass teacher="): Objective.preset(name)(tiny_model(), batch)
