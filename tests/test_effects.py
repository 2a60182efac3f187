"""Intervals cover, pairing helps, clusters count, and an effect stands where its interval lies."""
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from uat_repro.effects import (Effect, arm_gain, chance_jaccard, change, cluster_bootstrap, correct, correlation,
                               curriculum, effects_frame, gains, in_words, jaccard, overlap_effect, paired_effect,
                               sample_note, standing)
from uat_repro.results import runs_of
from uat_repro.workflow import load_profile


def arms(shift, n=40, seeds=2, seed=0, noise=.2):
    "Two arms on the same records, which differ in difficulty far more than the arms do."
    rng = np.random.default_rng(seed)
    hard = rng.normal(1.5, .6, n)
    row = lambda i, s, move: dict(record=f"r{i}", seed=s, nll=hard[i] + move + rng.normal(0, noise))
    return [pd.DataFrame([row(i, s, move) for s in range(seeds) for i in range(n)]) for move in (0., shift)]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits = [e.low <= -.1 <= e.high for e in (paired_effect(*arms(-.1, n=80, seed=s)) for s in range(400))]
    assert .92 <= np.mean(hits) <= .98


def test_nothing_is_found_about_as_rarely_as_the_p_value_says():
    ps = np.array([paired_effect(*arms(0., n=30, seed=s)).p for s in range(800)])
    assert .035 <= np.mean(ps <= .05) <= .065 and np.mean(ps <= .002) <= .0075  # for Holm multiplies small ones


def test_nothing_is_found_about_as_rarely_in_correlations():
    def p(seed):
        rng = np.random.default_rng(seed)
        record = np.arange(30).repeat(20)
        level = rng.normal(size=(2, 30))[:, record]  # tokens of a record have much in common
        x, y = level + rng.normal(size=level.shape)
        return correlation(pd.DataFrame(dict(record=record, x=x, y=y)), "x", "y", resamples=200).p
    assert .02 <= np.mean(np.array([p(s) for s in range(150)]) <= .05) <= .09


@pytest.mark.parametrize("profile", ["cpu", "cpu-full", "paper"])
def test_an_effect_can_be_found_among_as_many_as_a_profile_has(profile):
    "However many effects a family has, one that is ten standard errors large survives the correction."
    many = 8 * len(runs_of(load_profile(profile), "train"))
    effect = paired_effect(*arms(-.3, n=30))
    assert many > 8 and correct({k: effect if k == 0 else replace(effect, p=.5) for k in range(many)})[0] < .05


def test_the_detectable_effect_is_found_four_times_out_of_five():
    least = paired_effect(*arms(0., n=80)).detectable()
    found = [paired_effect(*arms(-least, n=80, seed=s)).p <= .05 for s in range(1, 300)]
    assert .7 <= np.mean(found) <= .9


def test_the_interval_is_that_of_theory_for_a_mean():
    x = np.random.default_rng(0).normal(size=400)
    found = cluster_bootstrap(lambda i: x[i].mean(-1), 400)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * x.std() / 20, rel=.06)
    assert found["error"] == pytest.approx(x.std() / 20, rel=.06)


def test_pairing_narrows_the_interval():
    a, b = arms(-.1)
    mixed = b.groupby("seed").nll.transform(lambda x: x.sample(frac=1, random_state=1).to_numpy())
    paired, apart = paired_effect(a, b), paired_effect(a, b.assign(nll=mixed))
    assert paired.estimate == pytest.approx(apart.estimate)
    assert apart.high - apart.low > 2 * (paired.high - paired.low)


def test_paired_effect_is_the_mean_of_differences_within_records_and_seeds():
    a, b = arms(.3, n=12, seeds=3)
    both = a.merge(b.sample(frac=1, random_state=0), on=["record", "seed"])  # the order of rows must not matter
    gap = both.nll_y - both.nll_x
    found = paired_effect(a, b.sample(frac=1, random_state=0))
    assert found.estimate == pytest.approx(gap.mean())
    assert found.per_seed == pytest.approx(tuple(gap.groupby(both.seed).mean()))
    assert (found.seeds, found.records) == (3, 12)
    each = gap.groupby(both.record).mean()
    assert found.size == pytest.approx(each.mean() / each.std())


@pytest.mark.parametrize("effect, text", [
    (Effect(-.001, -.3, .3), "0.00 [-0.30, 0.30]"),  # no negative zero
    (Effect(.5, math.nan, math.nan), "0.50 [no interval]"),
    (Effect(1., 1., 1.), "1.00 [1.00, 1.00]"),
    (Effect(.1, .1, .1000001), "0.100 [0.100, 0.100]"),
])
def test_an_effect_has_as_many_digits_as_its_interval_deserves(effect, text): assert str(effect) == text


def test_records_without_a_value_are_left_out_of_both_arms():
    a, b = arms(-.2)
    assert paired_effect(a, b.assign(nll=b.nll.where(b.record != "r7"))).records == 39
    with pytest.raises(ValueError, match="no record with a value of nll"): paired_effect(a, b.assign(nll=math.nan))


def test_where_nothing_was_trained_there_are_no_seeds():
    a, b = (x[x.seed == 0] for x in arms(-.2))
    found = paired_effect(a, b, seeds=None)
    assert (found.seeds, found.per_seed, found.records) == (0, (), 40)


def test_the_unit_is_that_of_the_measure_or_nats():
    unit = lambda column: paired_effect(*(x.rename(columns=dict(nll=column)) for x in arms(-.2)), column).unit
    assert [unit("accuracy"), unit("kl"), unit("half")] == ["share of tokens", "nats", "nats"]


def test_records_of_one_arm_only_are_named():
    a, b = arms(0.)
    with pytest.raises(ValueError, match=r"the arms differ: 4 rows .* only in the first and 0 only in the second"):
        paired_effect(a, b[~b.record.isin(["r1", "r2"])])
    with pytest.raises(ValueError, match="repeat"): paired_effect(a, pd.concat([b, b[:3]]))


def test_seeds_may_have_records_of_their_own():
    a, b = (x.assign(record=x.record + "/" + x.seed.astype(str)) for x in arms(-.2))
    found = paired_effect(a, b)
    assert (found.records, found.seeds) == (80, 2) and found.high < 0


def test_one_record_has_no_interval_and_is_not_judged():
    a, b = arms(-.2, n=1)
    found = paired_effect(a, b)
    assert math.isnan(found.low) and standing(found, -1) == "not judged" and "no interval" in str(found)
    assert in_words(found).endswith("(not judged)")


def tokens(records=40, each=50, seed=0):
    rng = np.random.default_rng(seed)
    level = rng.normal(size=records).repeat(each)
    noisy = lambda: (level + rng.normal(size=level.size)).round(1)
    return pd.DataFrame(dict(record=np.arange(records).repeat(each), token=np.arange(records * each), level=level,
                             x=noisy(), y=noisy()))


def test_correlation_is_spearmans_with_ties_and_missing_values():
    frame = tokens()
    frame.loc[::7, "x"] = math.nan
    kept = frame.dropna()
    assert correlation(frame, "x", "y", resamples=20).estimate == pytest.approx(spearmanr(kept.x, kept.y).statistic)


def test_resampled_correlations_equal_those_of_the_drawn_table():
    frame, seen = tokens(records=5, each=8), []
    rng = np.random.default_rng(0)
    for draw in rng.integers(0, 5, (200, 5)):
        drawn = pd.concat([frame[frame.record == i] for i in draw])
        seen.append(spearmanr(drawn.x, drawn.y).statistic)
    found = correlation(frame, "x", "y")
    assert [found.low, found.high] == pytest.approx(np.nanquantile(seen, [.025, .975]), abs=.08)


def test_partial_correlation_is_that_of_residual_ranks():
    frame = tokens()
    ranks = frame[["x", "y", "level"]].rank().to_numpy()
    left = [ranks[:, k] - np.polyval(np.polyfit(ranks[:, 2], ranks[:, k], 1), ranks[:, 2]) for k in (0, 1)]
    partial = correlation(frame, "x", "y", given="level", resamples=20).estimate
    assert partial == pytest.approx(np.corrcoef(*left)[0, 1])


def test_resampling_records_is_wider_than_resampling_tokens():
    by_record, by_token = (correlation(tokens(), "x", "y", cluster=c, resamples=300) for c in ("record", "token"))
    assert by_record.high - by_record.low > 2 * (by_token.high - by_token.low)
    assert by_record.seeds == 0 and by_record.records == 40


def test_overlap():
    rng, i = np.random.default_rng(0), np.arange(4000)
    frame = pd.DataFrame(dict(record=i // 100, seed=i % 2, early=rng.random(4000) < .25, late=rng.random(4000) < .25))
    found = overlap_effect(frame, "early", "late")
    assert found.estimate == pytest.approx(jaccard(frame.early, frame.late))
    assert found.low < chance_jaccard(.25) < found.high
    assert found.per_seed[1] == pytest.approx(jaccard(*(frame.loc[frame.seed == 1, c] for c in ("early", "late"))))
    assert math.isnan(jaccard([0, 0], [0, 0])) and jaccard([1], [1]) == 1


def followed(**about):
    "Followed tokens of 12 documents at three steps; the loss falls, and the mask moves by one position."
    rng, rows = np.random.default_rng(0), []
    for step in (0, 5, 10):
        for seed, record, position in np.ndindex(2, 12, 30):
            rows.append(dict(about, step=step, seed=seed, record=f"r{record}", position=position,
                             selected=(position + record + step // 10) % 4 == 0,
                             epistemic=.3 - .01 * step + .05 * rng.normal()))
    return pd.DataFrame(rows)


def test_a_change_is_that_of_document_means_from_the_first_step_to_the_last():
    table = followed().sample(frac=1, random_state=0)  # the order of rows must not matter
    rows = table.position % 3 == 0
    ends = [table[rows & (table.step == s)].groupby(["seed", "record"]).epistemic.mean() for s in (0, 10)]
    found = change(table, "epistemic", rows)
    assert found.estimate == pytest.approx((ends[1] - ends[0]).mean()) and (found.seeds, found.records) == (2, 12)
    with pytest.raises(ValueError, match="not unique"): change(pd.concat([table, table]), "epistemic")


def test_a_curriculum_is_an_overlap_and_the_change_of_the_tokens_chosen_first():
    about = dict(model="m", trained_on="d", regime="r")
    table = pd.concat([followed(**about, objective=o) for o in ("mle", "masked_mle")])
    found = curriculum(table, null=.8)
    assert list(found) == [("m", "d", "r", "mle"), ("m", "d", "r", "masked_mle")]
    overlap, fall = found["m", "d", "r", "mle"]
    part = table[table.objective == "mle"].reset_index(drop=True)
    chosen = part.merge(part[part.step == 0][["seed", "record", "position", "selected"]], how="left",
                        on=["seed", "record", "position"], suffixes=("", "_first")).selected_first
    assert overlap.estimate == 0 and overlap.null == .8 and fall == change(part, "epistemic", chosen)


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


def test_a_gain_of_arms_is_that_of_their_rows_and_leaves_out_records_without_a_value():
    table = held_out().query("checkpoint == 'last' and role == 'id'").rename(columns=dict(nll="nll_hard"))
    table["nll_hard"] = table.nll_hard.where(table.record != "alpaca/r3")
    found = arm_gain(table, "masked_mle", "mle", "nll_hard", by="objective")
    ours, theirs = (table[table.objective == o].dropna(subset=["nll_hard"]) for o in ("masked_mle", "mle"))
    assert found == paired_effect(ours, theirs, "nll_hard") and found.records == 39
    with pytest.raises(ValueError, match="no measure 'loud'"): arm_gain(table, "masked_mle", "mle", "loud", "objective")


GOOD = Effect(.3, .1, .5, seeds=2, records=60, per_seed=(.2, .4))


@pytest.mark.parametrize("effect, expected, threshold, stands", [
    (GOOD, 1, 0, "supports"),
    (GOOD, -1, 0, "contradicts"),
    (GOOD, 1, .2, "inconclusive"),  # the interval reaches over the threshold
    (GOOD, 1, .6, "contradicts"),  # it lies wholly below
    (GOOD, -1, .6, "supports"),
    (replace(GOOD, low=-.1), 1, 0, "inconclusive"),
    (replace(GOOD, per_seed=(.7, -.1)), 1, 0, "inconclusive"),  # a seed disagrees
    (replace(GOOD, seeds=1, per_seed=(.3,)), 1, 0, "not judged"),
    (replace(GOOD, records=9), 1, 0, "not judged"),
    (replace(GOOD, seeds=0, per_seed=()), 1, 0, "supports"),  # nothing was trained, so no seed can disagree
    (replace(GOOD, low=math.nan), 1, 0, "not judged"),
])
def test_standing(effect, expected, threshold, stands): assert standing(effect, expected, threshold) == stands


def test_a_caption_warns_of_thin_data():
    assert "Thin" not in sample_note(5000, 60, 3)
    assert sample_note(documents=8, seeds=2).endswith("Thin data: documents below 30, seeds below 3.")
    assert asdict(GOOD)["per_seed"] == (.2, .4)
