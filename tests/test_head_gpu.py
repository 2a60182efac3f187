"""The output layer as a GPU computes it: products from bfloat16 and large slices give the numbers of the plain formula."""
import pytest, torch
from torch.nn import functional as F

from uat_repro import _products, head as head_module
from uat_repro import loss as loss_module
from uat_repro.head import scores_and_divergence, scores_of, token_scores
from uat_repro.loss import token_loss
from uat_repro.models import Head

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    "A GPU, or a processor that multiplies as one; slices of 300 words, which do not divide the vocabulary."
    if request.param == "cpu": monkeypatch.setattr(_products, "_narrow", lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr(head_module, "GPU_LOGITS", 300 * 40)
    monkeypatch.setattr(head_module, "SLICE_LOGITS", 300 * 40)
    return request.param


def tensors(dtype, device, vocab=1000, width=16, tokens=40):
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(vocab, width, generator=g).to(device, dtype) for _ in range(2))
    hidden, taught = (torch.randn(tokens, width, generator=g).to(device, dtype) for _ in range(2))
    return student, teacher, hidden, taught, torch.randint(vocab, (tokens,), generator=g).to(device)


def plain(hidden, head, targets, w, v, taught, teacher, tau):
    "The loss on all logits, in float64 from the same numbers."
    def logits(h, x):
        z = h.double() @ x.weight.double().T + (0 if x.bias is None else x.bias.double())
        return z * x.scale if x.softcap is None else x.softcap * torch.tanh(z * x.scale / x.softcap)
    z = logits(hidden, head)
    log_q, log_p = (logits(taught, teacher) / tau).log_softmax(-1), (z / tau).log_softmax(-1)
    kl = tau**2 * (log_q.exp() * (log_q - log_p)).sum(-1)
    return (w * F.cross_entropy(z, targets, reduction="none") + v * kl).sum()


@pytest.mark.parametrize("tau", [1., 2.])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [{}, dict(softcap=5.), dict(scale=.5), dict(bias=True)], ids=str)
def test_loss_and_gradients(device, dtype, kind, tau):
    student, teacher, hidden, taught, targets = tensors(dtype, device)
    kind = dict(kind, bias=torch.linspace(-1, 1, 1000, device=device) if "bias" in kind else None)
    w, v = (torch.arange(40, device=device) % 4 == 0).float(), (torch.arange(40, device=device) % 3 == 0).float()
    found = []
    for compute in (token_loss, plain):
        h, a = hidden.clone().requires_grad_(), student.clone().requires_grad_()
        args = h, Head(a, **kind), targets, w, v, taught, Head(teacher, **kind), tau
        total = token_loss(args[0], targets, args[1], *args[3:])[0] if compute is token_loss else plain(*args)
        found.append((total.double(), *(g.double() for g in torch.autograd.grad(total, (h, a)))))
    close = 1e-5 if dtype == torch.float32 else 1e-2  # gradients of bfloat16 have 8 bits
    assert abs(found[0][0] / found[1][0] - 1) < 1e-5
    for ours, theirs in zip(found[0][1:], found[1][1:]): assert (ours - theirs).norm() < close * theirs.norm()


def test_scores_lose_nothing(device):
    "What is bfloat16 already is multiplied exactly."
    student, teacher, hidden, taught, targets = tensors(torch.bfloat16, device)
    head, other = Head(student), Head(teacher)
    exact = scores_of(hidden.float() @ student.float().T, targets)
    start = token_scores(taught, targets, other)
    found, moved = scores_and_divergence(hidden, targets, head, taught, other, start.log_z)
    for ours, theirs in zip(found, exact): torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    log_q, log_p = (taught.double() @ teacher.double().T).log_softmax(-1), (hidden.double() @ student.double().T).log_softmax(-1)
    torch.testing.assert_close(moved.double(), (log_q.exp() * (log_q - log_p)).sum(-1), atol=1e-4, rtol=1e-4)


def test_a_tied_weight_gets_both_gradients(device):
    "An embedding that is also the head: what comes from below is added to what the head gives."
    student, _, _, _, targets = tensors(torch.bfloat16, device)
    w, found = torch.ones(40, device=device), []
    for compute in (lambda h, a: token_loss(h, targets, Head(a), w)[0],
                    lambda h, a: F.cross_entropy(h.double() @ a.double().T, targets, reduction="sum")):
        a = student.clone().requires_grad_()
        found.append(torch.autograd.grad(compute(F.embedding(targets.flip(0), a), a), a)[0].double())
    assert (found[0] - found[1]).norm() < 1e-2 * found[1].norm()


def test_compiled_losses_are_the_plain_ones(monkeypatch):
    "What is fused on a GPU compiles without a break and changes nothing."
    if not torch.cuda.is_available(): pytest.skip("needs a GPU")
    student, teacher, hidden, taught, targets = tensors(torch.bfloat16, "cuda")
    w, v, found = torch.ones(40, device="cuda"), torch.ones(40, device="cuda"), []
    for many in (2**24, 1):
        monkeypatch.setattr(_products, "_MANY", many)
        h, a = hidden.clone().requires_grad_(), student.clone().requires_grad_()
        scores = token_scores(h.detach(), targets, Head(a))
        total, loss, kl = token_loss(h, targets, Head(a), w, v, taught, Head(teacher), 2.)
        found.append((*scores, total.detach(), loss, kl, *torch.autograd.grad(total, (h, a))))
    assert loss_module.loss_slope.compiled not in (None, loss_module.loss_slope.__wrapped__)
    for ours, theirs in zip(*found): torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
