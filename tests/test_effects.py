"""Intervals cover, verdicts err as rarely as they say, and both agree with other software."""
import math, warnings
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student_t

from uat_repro.effects import (MEASURES, Effect, arm_gain, crossed_effect, detectable, effects_frame, gains, in_words,
                               mean_effect, mean_squares, paired_effect, sample_note, share_effect, shares,
                               parts, simultaneous, variance_of_mean, verdict, with_interval, _fieller)
from uat_repro.tokenwise import run_effect

COMPONENTS = [(.01, .04, .05), (.05, .04, .05), (0., .04, .05), (.02, .14, .1)]  # seeds, records, what is left


def tables(number, seeds, records, components, mean=0., seed=0):
    "Tables of differences (number, seeds, records) with crossed random effects."
    rng, (a, b, e) = np.random.default_rng(seed), components
    return (mean + a * rng.normal(size=(number, seeds, 1)) + b * rng.normal(size=(number, 1, records))
            + e * rng.normal(size=(number, seeds, records)))


def judged(d):
    "Estimates, standard errors and the seeds' share of the variance of many tables at once, by the library's formulas."
    variance, share = variance_of_mean(mean_squares(d), *d.shape[1:])
    return d.mean((1, 2)), variance**.5, share


def quantile(share, d, p):
    "As that of `Effect`, of many tables at once."
    seeds, records = d.shape[1:]
    return share * student_t.ppf(p, seeds - 1) + (1 - share) * student_t.ppf(p, records - 1)


def effects_of(d, **about):
    "The effect of each table."
    for estimate, error, share in zip(*judged(d)):
        yield replace(with_interval(estimate, error, parts(share, *d.shape[1:])), seeds=d.shape[1], **about)


def misses(d, level=.95, truth=0.):
    "How often the interval misses the truth."
    estimate, error, share = judged(d)
    return float(np.mean(np.abs(estimate - truth) > quantile(share, d, .5 + level / 2) * error))


@pytest.mark.parametrize("seeds", [3, 5, 8, 14])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds):
    """1500 simulations have a standard error of 0.56 points. Four of them are 2.3 points: at most 7.3% of the intervals
    may miss. Intervals are wide between the cases in which one part of the variance dominates, which is allowed."""
    number, records = 1500, (20, 60, 200)
    found = np.array([[misses(tables(number, seeds, r, c, seed=k)) for k, c in enumerate(COMPONENTS)] for r in records])
    tolerance = 4 * math.sqrt(.05 * .95 / number)
    assert found.max() < .05 + tolerance
    assert .03 < found.mean() < .055 and found.min() > .01


@pytest.mark.parametrize("seeds", [5, 8])
def test_far_intervals_cover_as_well(seeds):
    """At 99.75%, which twenty comparisons need, 40,000 simulations have a standard error of 0.025 points. Satterthwaite's
    degrees of freedom fail this where the seeds dominate: 0.6% of the intervals miss with five."""
    for components in [(.1, .04, .05), (.05, .1, .05), (0., .04, .05)]:
        found = misses(tables(40000, seeds, 20, components), .9975)
        assert found < .0025 + 4 * .00025


@pytest.mark.parametrize("seeds, most", [(3, .014), (5, .005)])
def test_one_number_of_degrees_of_freedom_would_not_cover(seeds, most):
    "That of Satterthwaite, which is large where seeds happen to be alike."
    d = tables(40000, seeds, 20, (.1, .04, .05))
    (a, b, e), s, r = mean_squares(d), seeds - 1, 19
    df = (a + b - e)**2 / (a**2 / s + b**2 / r + e**2 / (s * r))
    df, variance = np.where(a > e, df, r), np.where(a > e, a + b - e, b) / (seeds * 20)
    assert np.mean(np.abs(d.mean((1, 2))) > student_t.ppf(.99875, df) * variance**.5) > most


def test_three_seeds_are_too_few_for_far_intervals():
    "Four times as often as they say, which the text tells: seeds that happen to be alike look as if they did not differ."
    assert .0025 < misses(tables(40000, 3, 20, (.1, .04, .05)), .9975) < .01 + 4 * .0005


def test_treating_seeds_as_fixed_would_not_cover():
    d = tables(1000, 5, 60, (.05, .04, .05))
    error = d.mean(1).std(-1, ddof=1) / 60**.5  # the records' means alone
    assert np.mean(np.abs(d.mean((1, 2))) > student_t.ppf(.975, 59) * error) > .3


def verdicts(d, expected=1, margin=.02):
    "The share of each verdict."
    return {v: n / len(d) for v, n in Counter(verdict(e, expected) for e in effects_of(d, margin=margin)).items()}


def test_verdicts_err_as_rarely_as_they_say():
    "Half of the 5% on each side under the null; an effect of the margin is called none in at most 5%."
    null, at_margin = (tables(1000, 6, 60, (.01, .03, .05), mean) for mean in (0., .02))
    found, mirrored, edge = verdicts(null), verdicts(null, -1), verdicts(at_margin)
    side = lambda said, word: sum(n for v, n in said.items() if v.startswith(word))
    assert max(side(found, word) for word in ("supported", "contradicted")) < .025 + 4 * (.025 * .975 / 1000)**.5
    assert side(found, "supported") == side(mirrored, "contradicted")  # the same rule on both sides
    assert found["no effect"] == mirrored["no effect"] > .4
    assert edge.get("no effect", 0) < .05 + 4 * (.05 * .95 / 1000)**.5 and side(edge, "contradicted") < .005


def test_negligible_lies_inside_the_margin():
    said = verdicts(tables(300, 6, 60, (.0005, .002, .005), .005))
    assert said.get("supported, negligible", 0) > .95


def test_the_detectable_effect_is_found_four_times_out_of_five():
    "With the error known from many tables; one table knows it roughly."
    components, null = (.02, .04, .05), tables(2000, 8, 60, (.02, .04, .05))
    _, error, share = judged(null)
    least = detectable(Effect(0., error=float(np.sqrt(np.mean(error**2))), parts=parts(np.mean(share), 8, 60)))
    estimate, error, share = judged(shifted := tables(1000, 8, 60, components, least, seed=1))
    assert .74 < np.mean(estimate > quantile(share, shifted, .975) * error) < .86


def test_it_is_the_estimate_of_a_mixed_model():
    "statsmodels' MixedLM with crossed variance components, by REML, on balanced data."
    from statsmodels.regression.mixed_linear_model import MixedLM
    d = tables(1, 6, 25, (.05, .04, .05), .1, seed=3)[0]
    seed, record = (i.ravel() for i in np.indices(d.shape))
    frame = pd.DataFrame(dict(d=d.ravel(), seed=seed, record=record, all=0))
    with warnings.catch_warnings(action="ignore"):
        fit = MixedLM.from_formula("d ~ 1", frame, groups="all", re_formula="0",
                                   vc_formula=dict(seed="0 + C(seed)", record="0 + C(record)")).fit(reml=True)
    found = crossed_effect(pd.DataFrame(d))
    assert found.estimate == pytest.approx(fit.fe_params.iloc[0], rel=1e-6)
    assert found.error == pytest.approx(fit.bse_fe.iloc[0], rel=.01)


def test_it_is_the_error_of_a_two_way_bootstrap():
    "Seeds and records drawn anew; drawing both counts what is left twice more, and n - 1 of n are free."
    d = tables(1, 8, 60, (.05, .04, .01), .1, seed=5)[0]
    rng = np.random.default_rng(0)
    drawn = [d[rng.integers(0, 8, 8)][:, rng.integers(0, 60, 60)].mean() for _ in range(3000)]
    assert crossed_effect(pd.DataFrame(d)).error == pytest.approx(np.std(drawn) * (8 / 7)**.5, rel=.06)


def test_a_component_below_zero_is_floored():
    alike = tables(1, 6, 40, (0., .05, .05))[0]
    alike -= alike.mean(1, keepdims=True)  # seeds more alike than chance
    found = crossed_effect(pd.DataFrame(alike))
    assert found.error == pytest.approx(alike.mean(0).std(ddof=1) / 40**.5) and found.df == 39
    both = crossed_effect(pd.DataFrame(np.ones((4, 5))))
    assert both.estimate == 1 and math.isnan(both.error) and verdict(both) == "not judged"  # nothing varies at all


@pytest.mark.parametrize("shape, truth, components", [((6, 60), .5, .02), ((4, 30), .3, .01)])
def test_fiellers_interval_covers_the_share(shape, truth, components):
    "800 simulations have a standard error of 0.8 points; the interval by the numbers that an effect keeps."
    number, hits = 800, 0
    loss = tables(number, *shape, (.004, components, .02), .03)
    gain = truth * (.5 * loss + .015) + tables(number, *shape, (.002, .01, .01), seed=1)
    products = np.stack([mean_squares(*pair) for pair in ((gain, gain), (gain, loss), (loss, loss))])  # (3, 3, number)
    for n, (g, l) in enumerate(zip(gain, loss)):
        low, high = _fieller((g.mean(), l.mean(), *shape, *products[:, :, n].ravel()), .95)
        hits += low < truth < high
    assert abs(hits / number - .95) < 4 * (.05 * .95 / number)**.5
    rows = pd.MultiIndex.from_product([range(n) for n in shape], names=["seed", "record"]).to_frame(index=False)
    arm = lambda nll: rows.assign(nll=nll.ravel())
    whole = share_effect(arm(l - g), arm(l), arm(0 * l))
    assert (whole.low, whole.high) == pytest.approx((low, high)) and whole.estimate == pytest.approx(g.mean() / l.mean())


def test_a_share_of_nothing_is_undecided():
    a, b = arms(.0)
    found = share_effect(b, a, a.assign(nll=a.nll + .001))  # the arm is better than the start: nothing was lost
    assert (found.low, found.high) == (-math.inf, math.inf) and verdict(found) == "undecided" and found.p == 1
    assert "unbounded" in str(found)


def test_a_share_excludes_nothing_where_its_p_value_is_small():
    "The interval and the p value agree at every level, so Holm may use either."
    for seeds in (2, 5): shares_agree(tables(30, seeds, 20, (.01, .02, .03), .03), tables(30, seeds, 20, (.005, .01, .03), .01, seed=1))


def shares_agree(loss, gain):
    rows = pd.MultiIndex.from_product([range(loss.shape[1]), range(20)], names=["seed", "record"]).to_frame(index=False)
    for l, g in zip(loss, gain):
        arm = lambda nll: rows.assign(nll=nll.ravel())
        found = share_effect(arm(l - g), arm(l), arm(0 * l))
        for level in (.8, .95, .99):
            low, high = found.interval(level)
            assert (low > 0 or high < 0) == (found.p < 1 - level)


def test_holm_and_the_intervals_agree():
    from statsmodels.stats.multitest import multipletests
    rng = np.random.default_rng(0)
    for _ in range(15):
        effects = {k: with_interval(x, .01, 9.) for k, x in enumerate(rng.normal(0, .03, 12))}
        found, p = simultaneous(effects), [e.p for e in effects.values()]
        rejected, corrected, *_ = multipletests(p, .05, "holm")
        assert [e.p for e in found.values()] == pytest.approx(corrected)
        assert [not e.low <= 0 <= e.high for e in found.values()] == list(rejected)
        assert list(found) == list(effects) and min(e.level for e in found.values()) >= .95


def test_one_accident_among_many_is_rare():
    "Twelve effects that are not there: at most 5% of such families have one that is called supported or contradicted."
    number = 2000
    drawn = [tables(number, 6, 20, (.03, .03, .05), seed=k) for k in range(12)]
    beyond = []
    for d in drawn:
        estimate, error, share = judged(d)
        beyond.append(np.abs(estimate) > quantile(share, d, 1 - .025 / 12) * error)
    accidents = np.any(beyond, 0)
    assert accidents.mean() < .05 + 4 * (.05 * .95 / number)**.5
    for n in (*np.flatnonzero(accidents)[:5], *np.flatnonzero(~accidents)[:5]):  # the verdicts say the same
        family = {k: effect for k, d in enumerate(drawn) for effect in effects_of(d[n:n + 1])}
        said = [verdict(e) for e in simultaneous(family).values()]
        assert any(s.startswith(("supp", "contra")) for s in said) == accidents[n]


def test_what_is_not_judged_is_not_counted():
    one, many = replace(with_interval(.1, .01, 30.), seeds=1), with_interval(.03, .01, 30.)
    found = simultaneous(dict(one=one, many=many))
    assert found["one"] == one and found["many"].level == pytest.approx(.95) and simultaneous({}) == {}


def arms(shift, n=40, seeds=3, seed=0, noise=.2):
    "Two arms on the same records, which differ in difficulty far more than the arms do."
    rng = np.random.default_rng(seed)
    hard = rng.normal(1.5, .6, n)
    row = lambda i, s, move: dict(record=f"r{i}", seed=s, nll=hard[i] + move + rng.normal(0, noise))
    return [pd.DataFrame([row(i, s, move) for s in range(seeds) for i in range(n)]) for move in (0., shift)]


def test_pairing_narrows_the_interval():
    a, b = arms(-.1)
    mixed = b.groupby("seed").nll.transform(lambda x: x.sample(frac=1, random_state=1).to_numpy())
    paired, apart = paired_effect(a, b), paired_effect(a, b.assign(nll=mixed))
    assert paired.estimate == pytest.approx(apart.estimate)
    assert apart.high - apart.low > 1.5 * (paired.high - paired.low)


def test_paired_effect_is_the_mean_of_differences_within_records_and_seeds():
    a, b = arms(.3, n=12)
    both = a.merge(b.sample(frac=1, random_state=0), on=["record", "seed"])  # the order of rows must not matter
    gap = both.nll_y - both.nll_x
    found = paired_effect(a, b.sample(frac=1, random_state=0))
    assert found.estimate == pytest.approx(gap.mean())
    assert found.per_seed == pytest.approx(tuple(gap.groupby(both.seed).mean()))
    assert (found.seeds, found.records, found.clusters, found.margin) == (3, 12, 12, .02)


def test_records_of_a_cluster_count_once():
    a, b = arms(-.1)
    doubled = [pd.concat([x.assign(cluster=x.record), x.assign(cluster=x.record, record=x.record + "b")]) for x in (a, b)]
    once, twice = paired_effect(a, b), paired_effect(*doubled)
    assert (twice.records, twice.clusters) == (80, 40)
    assert [twice.estimate, twice.error, twice.df] == pytest.approx([once.estimate, once.error, once.df])


@pytest.mark.parametrize("effect, text", [
    (Effect(-.001, -.3, .3), "0.00 [-0.30, 0.30]"),  # no negative zero
    (Effect(.5, math.nan, math.nan), "0.50 [no interval]"),
    (Effect(.5, -math.inf, math.inf), "0.50 [unbounded]"),
    (Effect(1., 1., 1.), "1.00 [1.00, 1.00]"),
    (Effect(.1, .1, .1000001), "0.100 [0.100, 0.100]"),
    (Effect(.02, .0004, .04), "0.0200 [0.0004, 0.0400]"),  # it does not reach zero
])
def test_an_effect_has_as_many_digits_as_its_interval_deserves(effect, text): assert str(effect) == text


def test_records_without_a_value_are_left_out_of_both_arms():
    a, b = arms(-.2)
    lost = (b.record == "r7") & (b.seed == 1)  # in one seed, so in all
    assert paired_effect(a, b.assign(nll=b.nll.mask(lost))).records == 39
    with pytest.raises(ValueError, match="no record with a value of nll"): paired_effect(a, b.assign(nll=math.nan))


def test_where_nothing_was_trained_there_are_no_seeds():
    a, b = (x[x.seed == 0] for x in arms(-.2))
    found = paired_effect(a, b, seeds=None)
    gap = b.nll.to_numpy() - a.nll.to_numpy()
    assert (found.seeds, found.per_seed, found.records, found.df) == (0, (), 40, 39)
    assert found.error == pytest.approx(gap.std(ddof=1) / 40**.5) and verdict(found, -1) == "supported"


def test_one_seed_is_not_judged():
    found = paired_effect(*(x[x.seed == 0] for x in arms(-.2)))
    assert found.seeds == 1 and found.high < 0 and verdict(found, -1) == "not judged"
    alone = paired_effect(*(x[(x.seed == 0) & (x.record == "r1")] for x in arms(-.2)))
    assert "no interval" in str(alone) and in_words(alone).endswith("(not judged)")


def test_one_cluster_is_not_judged():
    for clusters in (dict(record="r1"), dict(cluster=0)):
        found = paired_effect(*(x.assign(**clusters).drop_duplicates(["seed", "record"]) for x in arms(-.2)))
        assert found.clusters == 1 and found.seeds > 1 and verdict(found, -1) == "not judged"
        assert simultaneous(dict(a=found))["a"] == found, "nor is it counted"


@pytest.mark.parametrize("value", [.7, .75, 1e9 / 3])
def test_an_error_of_rounding_is_none(value):
    constant = crossed_effect(pd.DataFrame(np.full((3, 7), value)))
    for found in (constant, run_effect([value] * 3, "Jaccard", .8)):
        assert math.isnan(found.low) and math.isnan(found.p) and verdict(found) == "not judged"


def test_a_p_value_agrees_with_its_interval_where_parts_differ_by_far():
    found = with_interval(100., 1., ((.001, 1.), (.999, 1000.)))
    assert found.p < 1 - .99 and found.interval(1 - 2 * found.p)[0] > 0 > found.interval(1 - found.p / 2)[0]


def test_the_unit_is_that_of_the_measure_or_nats():
    unit = lambda column: paired_effect(*(x.rename(columns=dict(nll=column)) for x in arms(-.2)), column).unit
    assert [unit("accuracy"), unit("kl"), unit("half")] == ["share of tokens", "nats", "nats"]
    assert MEASURES["epistemic"].margin == 0 and mean_effect(arms(0.)[0], "nll", unit="share").unit == "share"


def test_records_of_one_arm_only_are_named():
    a, b = arms(0.)
    with pytest.raises(ValueError, match=r"the arms differ: 6 rows .* only in the first and 0 only in the second"):
        paired_effect(a, b[~b.record.isin(["r1", "r2"])])
    with pytest.raises(ValueError, match="repeat"): paired_effect(a, pd.concat([b, b[:3]]))
    own = [x.assign(record=x.record + "/" + x.seed.astype(str)) for x in (a, b)]
    with pytest.raises(ValueError, match="the seeds have different records"): paired_effect(*own)


def held_out(shift=-.2):
    "Records of two objectives at three checkpoints, on four roles of data sets."
    places = [("alpaca", "id"), ("alpaca", "validation"), ("gsm8k", "ood"), ("sharegpt", "ood")]
    about = dict(model="tiny", trained_on="alpaca", regime="repeated")
    named = lambda frame, d: frame.assign(record=f"{d}/" + frame.record, accuracy=-frame.nll, **about)
    return pd.concat([named(frame, d).assign(objective=o, checkpoint=c, role=r)
                      for o, frame in zip(("mle", "masked_mle"), arms(shift))
                      for c in ("initial", "best", "last") for d, r in places])


def test_gains_are_computed_for_each_setting():
    frame, setting = held_out(), ("tiny", "alpaca", "repeated", "last")
    found = gains(frame, "masked_mle")
    assert set(found) == {("tiny", "alpaca", "repeated", c, r) for c in ("best", "last") for r in ("id", "ood")}
    assert found[*setting, "id"].estimate == pytest.approx(.2, abs=.1)
    assert found[*setting, "ood"].records == 80  # both sets, told apart by name
    assert all(e.estimate == 0 for e in gains(frame, "masked_mle", over="initial").values())
    better = gains(frame, "masked_mle", value="accuracy")[*setting, "id"]
    assert better.estimate == found[*setting, "id"].estimate and better.unit == "share of tokens"
    assert len(effects_frame(found, objective="masked_mle")) == 4


def test_shares_are_gains_over_what_was_lost():
    frame = held_out()
    frame = pd.concat([frame, frame[frame.objective == "masked_mle"].assign(
        objective="combined", nll=lambda d: d.nll - .06, accuracy=lambda d: d.accuracy + .06)])
    start = (frame.checkpoint == "initial").to_numpy()
    frame.loc[start, "nll"] -= .1  # training has lost 0.1 to 0.16
    frame.loc[start, "accuracy"] += .1
    for value in ("nll", "accuracy"):
        found = shares(frame.query("objective != 'mle'"), "combined", "masked_mle", value=value)
        assert all(e.estimate == pytest.approx(.06 / .16) for e in found.values()) and len(found) == 4


def test_a_gain_of_arms_is_that_of_their_rows_and_leaves_out_records_without_a_value():
    table = held_out().query("checkpoint == 'last' and role == 'id'").rename(columns=dict(nll="nll_hard"))
    table["nll_hard"] = table.nll_hard.where(table.record != "alpaca/r3")
    found = arm_gain(table, "masked_mle", "mle", "nll_hard", by="objective")
    ours, theirs = (table[table.objective == o].dropna(subset=["nll_hard"]) for o in ("masked_mle", "mle"))
    assert found == paired_effect(ours, theirs, "nll_hard") and found.records == 39
    with pytest.raises(ValueError, match="no measure 'loud'"): arm_gain(table, "masked_mle", "mle", "loud", "objective")


GOOD = Effect(.3, .1, .5, seeds=4, records=60, error=.07, df=6., per_seed=(.2, .4, .3, .3), margin=.02)


@pytest.mark.parametrize("effect, expected, said", [
    (GOOD, 1, "supported"), (GOOD, -1, "contradicted"),
    (replace(GOOD, null=.2), 1, "undecided"),  # the interval reaches over the value
    (replace(GOOD, null=.6), 1, "contradicted"), (replace(GOOD, null=.6), -1, "supported"),
    (replace(GOOD, low=-.1), 1, "undecided"),
    (replace(GOOD, low=.001, high=.019), 1, "supported, negligible"),
    (replace(GOOD, low=.001, high=.019), -1, "contradicted, negligible"),
    (replace(GOOD, low=.001, high=.019, margin=0.), 1, "supported"),  # where no margin is known
    (replace(GOOD, estimate=0., low=-.03, high=.03, error=.01), 1, "no effect"),  # 90%: 0.019
    (replace(GOOD, estimate=.002, low=-.03, high=.03, error=.01), 1, "undecided"),
    (replace(GOOD, per_seed=(.7, -.1, .3, .3)), 1, "supported"),  # no seed has a veto
    (replace(GOOD, seeds=1), 1, "not judged"), (replace(GOOD, seeds=0), 1, "supported"),
    (replace(GOOD, low=math.nan), 1, "not judged"),
])
def test_verdict(effect, expected, said): assert verdict(effect, expected) == said


def test_a_caption_warns_of_thin_data():
    assert "Thin" not in sample_note(5000, 60, 3)
    assert sample_note(documents=8, seeds=2).endswith("Thin data: documents below 30, seeds below 3.")
    assert asdict(GOOD)["per_seed"] == (.2, .4, .3, .3)
