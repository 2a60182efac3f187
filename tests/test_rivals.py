"""Objectives of other papers against their own formulas, in float64 on plain logits, for three families."""
import math

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


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("formula", [rho1, stm, dft, asft, eaft], ids=lambda f: f.__name__)
def test_preset_is_the_formula_of_its_paper(family, formula):
    student, reference = learnt(family, 8), learnt(family, 8).double()
    teacher = FrozenTeacher(learnt(family, 35 if family == "tiny-gemma2" else 12))
    out = Objective.preset(formula.__name__)(student, batch, teacher=teacher)
    out.loss.backward()
    loss = formula(log_probs(reference), log_probs(teacher.model.double()).detach())
    loss.backward()
    torch.testing.assert_close(out.loss.double(), loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat_grad(student).double(), flat_grad(reference), atol=1e-4, rtol=1e-3)


def test_a_rule_that_needs_a_second_model_says_so():
    for name in ("rho1", "stm", "asft"):
        with pytest.raises(ValueError, match="pass teacher="): Objective.preset(name)(tiny_model(), batch)
