"""Scores under autocast are those without it: layers run in bfloat16, nothing between logits and a score does."""
import pytest, torch

from uat_repro.head import full_precision, map_tokens, scores_and_divergence, scores_of, token_scores
from uat_repro.loss import token_loss
from uat_repro.models import Head, autocast
from uat_repro.uncertainty import _mixture_scores, decompose

CONFIDENT = 30.0  # logits of a model that is sure: entropies near 0, as the difference of large numbers


@pytest.fixture(scope="module")
def case():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 50, 16, generator=g), torch.randn(3000, 16, generator=g) * CONFIDENT / 16**.5
    return hidden[0], hidden[1], Head(weight), torch.randint(0, 3000, (50,), generator=g)


def entropy(logits): return torch.distributions.Categorical(logits=logits.double()).entropy()


def test_entropy_is_exact_and_not_negative(case):
    hidden, _, head, targets = case
    exact = entropy(head.logits(hidden))
    assert exact.min() < .01
    with torch.autocast("cpu", torch.bfloat16):
        for scores in (token_scores(hidden, targets, head), scores_of(head.logits(hidden), targets)):
            torch.testing.assert_close(scores.entropy.double(), exact, atol=1e-3, rtol=1e-3)
            assert scores.entropy.min() >= -1e-4


def test_divergences_are_exact(case):
    hidden, other, head, targets = case
    p, q = (head.logits(h).double().log_softmax(-1) for h in (hidden, other))
    exact = (q.exp() * (q - p)).sum(-1)
    with torch.autocast("cpu", torch.bfloat16):
        _, kl = scores_and_divergence(hidden, targets, head, other, head, token_scores(other, targets, head).log_z)
        _, _, again = token_loss(hidden, targets, head, torch.ones(50), torch.ones(50), other, head)
    for found in (kl, again): torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-3)


def test_aleatoric_uncertainty_is_exact(case):
    hidden, other, head, targets = case
    logits = torch.stack([head.logits(hidden + step * other) for step in (0, .1, -.1, .2)])
    exact = decompose(logits.double().log_softmax(-1))
    with torch.autocast("cpu", torch.bfloat16): total, aleatoric, *_ = _mixture_scores(logits.clone(), targets)
    torch.testing.assert_close(aleatoric.double(), exact.aleatoric, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(total.double(), exact.total, atol=1e-3, rtol=1e-3)


class Watched(Head):
    "A head that notes how products of float32 matrices are computed, in the forward and the backward."
    seen, backward = [], Head.backward

    def logits(self, hidden):
        self.seen.append(torch.backends.cuda.matmul.fp32_precision + torch.backends.mkldnn.matmul.fp32_precision)
        return super().logits(hidden)


def by_default(): pass
def by_transformers(): torch.backends.fp32_precision = "tf32"
def by_accelerate(): torch.backends.cuda.matmul.allow_tf32 = True
def by_the_user(): torch.set_float32_matmul_precision("high")


PLACES = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.fixture
def untouched():
    "Settings of the process, put back afterwards."
    yield
    torch.set_float32_matmul_precision("highest")
    for place in PLACES: place.fp32_precision = "none"


def settings(): return [place.fp32_precision for place in PLACES]


@pytest.mark.parametrize("switch", [by_default, by_transformers, by_accelerate, by_the_user])
def test_the_head_never_rounds_to_tf32_and_leaves_the_setting(case, switch, untouched):
    hidden, other, head, targets = case
    plain = token_loss(hidden, targets, head, torch.ones(50), torch.ones(50), other, head)[0]
    switch()
    before, head = settings(), Watched(*head)
    Watched.seen.clear()
    leaf = hidden.clone().requires_grad_()
    scores = token_scores(hidden, targets, head)
    total = token_loss(leaf, targets, head, torch.ones(50), torch.ones(50), other, head)[0]
    total.backward()
    scores_and_divergence(hidden, targets, head, other, head, scores.log_z)
    map_tokens(lambda logits: (logits.sum(-1),), hidden, head)
    assert set(Watched.seen) == {"ieeeieee"}
    assert settings() == before and torch.equal(total, plain)
    torch.backends.fp32_precision = "ieee"  # whoever followed the setting for all still does
    assert settings()[1:] == ["ieee" if b == before[0] else b for b in before[1:]]


def test_the_setting_is_put_back_after_an_error(case, untouched):
    by_transformers()
    with pytest.raises(ZeroDivisionError), full_precision(): 1 / 0
    assert settings() == ["tf32"] * 3


def test_layers_compute_where_accelerate_puts_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert autocast("bfloat16").device == "cpu"
