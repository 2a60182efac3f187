"Samples of a posterior, each left out in turn, against the plain decomposition of the others."
import math
from types import SimpleNamespace

import pandas as pd, pytest, torch

from uat_repro.calibration import calibration
from uat_repro.head import CHUNK_LOGITS, scores_and_divergence
from uat_repro.models import Head, head_of, hidden_states, tiny_model
from uat_repro.tokens import Collator, lay_out
from uat_repro.tokenwise import correlation
from uat_repro.uncertainty import (Ensemble, MCDropout, TokenUncertainty, choose_posterior, decompose, leave_one_out,
                                   score_samples)

from examples import rows, tokenizer


TARGETS = torch.arange(40) * 7


def naive(states, head):
    "Aleatoric and epistemic uncertainty of all samples but one, and the loss of that one, in double precision."
    log_p = torch.stack([head.logits(h).double().log_softmax(-1) for h in states])
    parts = [decompose(torch.cat([log_p[:k], log_p[k + 1:]])) for k in range(len(states))]
    return *[torch.stack(of) for of in list(zip(*parts))[1:]], -log_p[:, range(len(TARGETS)), TARGETS]


def test_members_may_share_all_layers_but_the_last():
    members = [tiny_model("tiny-phi3") for _ in range(4)]
    batch = Collator(tokenizer)(rows())
    with pytest.raises(ValueError, match="identical"): Ensemble(tuple(members))(members[0], batch)
    for seed, member in enumerate(members):
        torch.manual_seed(seed)
        with torch.no_grad(): member.get_output_embeddings().weight.add_(.05 * torch.randn(member.config.vocab_size, 32))
    assert Ensemble(tuple(members))(members[0], batch).epistemic.nanmean() > 0


def test_a_posterior_without_a_number_is_not_the_least_harmful_one():
    told = lambda x: SimpleNamespace(samples=8, inflation=lambda: x, reliability=lambda: SimpleNamespace(spearman=.5))
    assert choose_posterior([told(x) for x in (math.nan, .09, .05)]) == 2


@pytest.mark.parametrize("samples", [3, 8])
@pytest.mark.parametrize("scale", [.01, 1., 30.])  # nearly the same samples, different ones, nearly certain ones
def test_leaving_one_out_is_the_decomposition_of_the_others(samples, scale):
    torch.manual_seed(0)
    head = Head(torch.randn(300, 16))
    states = torch.randn(1, 40, 16) + scale * torch.randn(samples, 40, 16)
    for mine, theirs in zip(leave_one_out(states, TARGETS, head), naive(states, head)):
        assert mine.shape == (samples, 40)
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-4, atol=2e-5)


def test_small_disagreement_is_not_lost_to_rounding():
    "An epistemic uncertainty of a millionth of the entropy keeps three digits."
    torch.manual_seed(0)
    head = Head(torch.randn(300, 16))
    states = torch.randn(1, 40, 16) + 1e-3 * torch.randn(5, 40, 16)
    exact = naive(states.double(), head._replace(weight=head.weight.double()))[1]
    mine = leave_one_out(states, TARGETS, head).epistemic.double()
    assert exact.max() < 1e-4
    torch.testing.assert_close(mine, exact, rtol=1e-2, atol=1e-9)


def test_chunks_do_not_matter():
    torch.manual_seed(0)
    head = Head(torch.randn(CHUNK_LOGITS // 1000, 4))  # 1000 / 3 tokens fit into a chunk
    states, targets = torch.randn(3, 400, 4), torch.arange(400)
    whole, part = leave_one_out(states, targets, head), leave_one_out(states[:, 350:], targets[350:], head)
    for a, b in zip(whole, part): torch.testing.assert_close(a[:, 350:], b, rtol=1e-4, atol=1e-5)


def test_two_samples_are_too_few():
    with pytest.raises(ValueError, match="2 samples were given"):
        leave_one_out(torch.zeros(2, 1, 4), torch.zeros(1).long(), Head(torch.zeros(3, 4)))


def test_states_of_other_models_are_scored_at_the_tokens_of_the_batch():
    model, batch = tiny_model("tiny-llama"), dict(Collator(tokenizer)(rows()))
    with torch.no_grad(): states = hidden_states(model, batch)
    samples = torch.stack([states + .1 * torch.randn_like(states) for _ in range(4)])
    found, layout, head = score_samples(model, batch, samples, head_of(model)), lay_out(batch), head_of(model)
    assert torch.equal(~found.loss.isnan(), layout.valid)
    whole = decompose(torch.stack([head.logits(h).log_softmax(-1) for h in layout.predicting(samples)]))
    torch.testing.assert_close(found.epistemic[layout.valid], whole.epistemic, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.aleatoric[layout.valid], whole.aleatoric, rtol=1e-4, atol=1e-6)


def test_an_ensemble_is_asked_in_eval_mode():
    from peft import LoraConfig, get_peft_model
    members = []
    for seed in range(4):
        torch.manual_seed(seed)
        adapter = LoraConfig(r=4, lora_dropout=.5, target_modules="all-linear", init_lora_weights=False)
        members.append(get_peft_model(tiny_model(), adapter))
    batch = Collator(tokenizer)(rows())
    ask = lambda: Ensemble(tuple(members))(members[0], batch)
    for member in members: member.eval()
    expected = ask()
    for member in members: member.train()
    found = ask()
    assert all(member.training for member in members)
    for name in ("loss", "epistemic", "halves"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), equal_nan=True)


def test_a_posterior_without_a_reliability_is_not_chosen():
    good = torch.rand(1, 50, generator=torch.Generator().manual_seed(0))
    def estimate(halves):
        return TokenUncertainty(loss=good, entropy=good, total=good, aleatoric=good, epistemic=good, mean_loss=good,
                                halves=halves, samples=8)
    dead, alive = estimate(torch.ones(2, 1, 50)), estimate(torch.stack([good, good]))
    assert (choose_posterior([dead, alive]), choose_posterior([alive, dead])) == (1, 0)


def test_no_token_has_no_reliability():
    batch = Collator(tokenizer)([dict(row, labels=[-100] * len(row["labels"])) for row in rows()])
    assert math.isnan(MCDropout(p=.1, samples=4)(tiny_model(), batch).reliability().spearman)


def test_what_cannot_be_compared_is_refused():
    head, other, states = Head(torch.randn(30, 8)), Head(torch.randn(20, 8)), torch.randn(4, 8)
    with pytest.raises(ValueError, match="the models have 30 and 20 words"):
        scores_and_divergence(states, torch.arange(4), head, states, other, torch.zeros(4))
    silent = [Collator(tokenizer)([dict(row, labels=[-100] * len(row["labels"])) for row in rows()])]
    with pytest.raises(ValueError, match="no response token to fit a temperature on"):
        calibration(tiny_model(), silent, silent)
    frame = pd.DataFrame(dict(record=list("abcd"), cluster=["x", "x", None, "y"], loss=range(4), entropy=range(4)))
    with pytest.raises(ValueError, match="1 of 4 tokens have no cluster"): correlation(frame, "loss", "entropy")
