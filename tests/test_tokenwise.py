"""Statistics of tokens count clusters and runs, not tokens."""
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from uat_repro.effects import verdict
from uat_repro.tokenwise import (chance_jaccard, change, coefficient, correlation, correlation_difference, curriculum,
                                 jaccard, run_effect, slope_effect)


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


def test_the_error_is_that_of_drawn_tables():
    frame, seen, rng = tokens(records=12, each=8), [], np.random.default_rng(1)
    for draw in rng.integers(0, 12, (200, 12)):
        drawn = pd.concat([frame[frame.record == i] for i in draw])
        seen.append(spearmanr(drawn.x, drawn.y).statistic)
    assert correlation(frame, "x", "y").error == pytest.approx(np.std(seen) * (12 / 11)**.5, rel=.15)


def test_the_error_of_few_clusters_is_not_too_small():
    "It is the spread of the estimates of many tables of four clusters."
    rng = np.random.default_rng(0)
    def found(n):
        x = rng.normal(size=n * 40)
        frame = pd.DataFrame(dict(record=np.arange(n * 40) // 40, x=x, y=x * rng.choice([-1, 1], n).repeat(40) + rng.normal(size=n * 40)))
        return correlation(frame, "x", "y", resamples=300)
    effects = [found(4) for _ in range(150)]
    assert np.mean([e.error**2 for e in effects])**.5 == pytest.approx(np.std([e.estimate for e in effects]), rel=.15)


def test_nothing_is_found_about_as_rarely_as_the_p_value_says():
    "100 simulations have a standard error of 2.2 points."
    def p(seed):
        rng = np.random.default_rng(seed)
        record = np.arange(30).repeat(20)
        level = rng.normal(size=(2, 30))[:, record]  # tokens of a record have much in common
        x, y = level + rng.normal(size=level.shape)
        return correlation(pd.DataFrame(dict(record=record, x=x, y=y)), "x", "y", resamples=100).p
    assert np.mean(np.array([p(s) for s in range(100)]) <= .05) <= .05 + 3 * .022


def test_partial_correlation_is_that_of_residual_ranks():
    frame = tokens().assign(more=lambda d: d.level + d.token % 7)
    for given in (["level"], ["level", "more"]):
        ranks = frame[["x", "y", *given]].rank().to_numpy()
        held = np.column_stack([np.ones(len(ranks)), ranks[:, 2:]])
        left = ranks[:, :2] - held @ np.linalg.lstsq(held, ranks[:, :2], rcond=None)[0]
        partial = correlation(frame, "x", "y", given, resamples=20).estimate
        assert partial == pytest.approx(np.corrcoef(left.T)[0, 1])


def test_a_column_that_does_not_vary_takes_nothing_out():
    frame = tokens().assign(one=1.)
    a, b = (correlation(frame, "x", "y", given, resamples=20) for given in (["level"], ["level", "one"]))
    assert a == b and abs(a.estimate) < .1
    learnt = pd.concat([frame.assign(seed=s, gain=lambda d: d.x + .1 * s * d.y) for s in range(3)])
    a, b = (coefficient(learnt, "gain", "x", given) for given in (["level"], ["level", "one"]))
    assert b.estimate == pytest.approx(a.estimate) and b.error == pytest.approx(a.error)


def test_where_the_other_columns_say_it_all_nothing_is_judged():
    frame = tokens().assign(same=lambda d: np.exp(d.x), line=lambda d: 3 * d.x + 1, one=1.)
    for given in (["x"], ["same"], ["level", "line"]):
        assert verdict(correlation(frame, "x", "y", given, resamples=20)) == "not judged"
    learnt = pd.concat([frame.assign(seed=s, gain=lambda d: d.y + .1 * s * d.x) for s in range(3)])
    assert verdict(coefficient(learnt, "gain", "line", ["x"])) == verdict(coefficient(learnt, "gain", "one")) == "not judged"
    assert correlation(frame, "x", "y", ["level", "level"], resamples=20).estimate == pytest.approx(
        correlation(frame, "x", "y", ["level"], resamples=20).estimate), "which of two alike is held does not matter"


def test_resampling_records_is_wider_than_resampling_tokens():
    by_record, by_token = (correlation(tokens(), "x", "y", cluster=c, resamples=300) for c in ("record", "token"))
    assert by_record.high - by_record.low > 2 * (by_token.high - by_token.low)
    assert (by_record.seeds, by_record.records, by_record.clusters) == (0, 40, 40)


def test_templates_are_resampled_whole():
    frame = tokens().assign(cluster=lambda d: d.record // 2)
    found, alone = correlation(frame, "x", "y"), correlation(frame, "x", "y", cluster="record")
    assert (found.records, found.clusters, found.df) == (40, 20, 19) and found.estimate == alone.estimate


def test_a_difference_uses_the_same_resamples():
    frame = tokens().assign(z=lambda d: d.y + .1 * np.sin(d.token))
    apart = [correlation(frame, "x", c, resamples=200) for c in "yz"]
    found = correlation_difference(frame, ("x", "y"), ("x", "z"), resamples=200)
    assert found.estimate == pytest.approx(apart[0].estimate - apart[1].estimate)
    assert found.error < .2 * apart[0].error


def test_a_coefficient_is_that_of_least_squares_and_counts_seeds_and_clusters():
    from statsmodels.regression.linear_model import OLS
    rng = np.random.default_rng(0)
    frame = pd.concat([tokens().assign(seed=s, gain=lambda d: .2 * d.x + .1 * d.y + s + rng.normal(size=len(d)))
                       for s in range(4)], ignore_index=True)
    z = (frame[["x", "y"]] - frame[["x", "y"]].mean()) / frame[["x", "y"]].std(ddof=0)
    fit = OLS(frame.gain.to_numpy(), np.column_stack([z, pd.get_dummies(frame.seed).to_numpy(float)])).fit()
    found = coefficient(frame, "gain", "x", ["y"])
    assert found.estimate == pytest.approx(fit.params[0]) and (found.seeds, found.clusters) == (4, 40)
    assert found.low < .2 * frame.x.std(ddof=0) < found.high
    doubled = coefficient(pd.concat([frame, frame]), "gain", "x", ["y"])  # the same tokens twice are no more evidence
    assert doubled.error == pytest.approx(found.error)


def test_tokens_without_a_cluster_are_not_left_out_of_a_coefficient():
    frame = tokens().assign(seed=0, gain=1., cluster=np.nan)
    with pytest.raises(ValueError, match="tokens have no cluster: give one for each"): coefficient(frame, "gain", "x")


def test_a_coefficient_that_is_not_there_is_rarely_found():
    "100 simulations have a standard error of 2.2 points."
    def missed(seed):
        rng = np.random.default_rng(seed)
        s, r = np.indices((5, 20, 10))[:2].reshape(2, -1)
        level = rng.normal(size=20)[r]
        x = level + rng.normal(size=20 * 10)[np.arange(len(s)) % 200]
        y = .3 * rng.normal(size=20)[r] + .2 * rng.normal(size=5)[s] * x + rng.normal(size=len(s))
        return coefficient(pd.DataFrame(dict(seed=s, record=r, x=x, y=y)), "y", "x").p <= .05
    assert np.mean([missed(k) for k in range(100)]) < .05 + 3 * .022 + .02


def test_overlap():
    assert math.isnan(jaccard([0, 0], [0, 0])) and jaccard([1], [1]) == 1 and chance_jaccard(.25) == pytest.approx(1 / 7)
    with pytest.raises(ValueError, match="masks of shapes"): jaccard([1, 0], [1])


def test_one_run_is_not_judged():
    alone = run_effect([.5], "Jaccard", null=.8)
    assert math.isnan(alone.low) and verdict(alone, -1) == "not judged"
    assert verdict(run_effect([.5, .52, .49], "Jaccard", null=.8), -1) == "supported"


def followed(**about):
    "Followed tokens of 12 documents at three steps; the loss falls, and the mask moves by one position."
    rng, rows = np.random.default_rng(0), []
    for step in (0, 5, 10):
        for seed, record, position in np.ndindex(2, 12, 30):
            rows.append(dict(about, step=step, seed=seed, record=f"r{record}", position=position, aleatoric=.7,
                             selected=(position + record + step // 10) % 4 == 0,
                             epistemic=.3 - .01 * step + .05 * rng.normal()))
    return pd.DataFrame(rows)


def test_a_change_is_that_of_document_means_from_the_first_step_to_the_last():
    table = followed().sample(frac=1, random_state=0)  # the order of rows must not matter
    rows = table.position % 3 == 0
    ends = [table[rows & (table.step == s)].groupby(["seed", "record"]).epistemic.mean() for s in (0, 10)]
    found = change(table, "epistemic", rows)
    gap = (ends[1] - ends[0]).groupby("seed").mean()
    assert found.estimate == pytest.approx(gap.mean()) and found.per_seed == pytest.approx(tuple(gap))
    assert (found.seeds, found.records, found.df) == (2, 24, 1)
    with pytest.raises(ValueError, match="not unique"): change(pd.concat([table, table]), "epistemic")


def test_a_fall_of_the_entropy_is_no_fall_of_the_epistemic_share():
    table = followed()
    halved = np.where(table.step == 10, .5, 1)
    start = table.drop_duplicates(["seed", "record", "position"]).set_index(["seed", "record", "position"]).epistemic
    same = start.loc[pd.MultiIndex.from_frame(table[["seed", "record", "position"]])].to_numpy()
    both = table.assign(epistemic=same * halved, aleatoric=.7 * halved)
    assert change(both, "epistemic").estimate < -.1 and change(both, "share").estimate == pytest.approx(0)


def test_a_curriculum_is_an_overlap_and_the_change_of_the_tokens_chosen_first():
    about = dict(model="m", trained_on="d", regime="r")
    table = pd.concat([followed(**about, objective=o) for o in ("mle", "masked_mle")])
    found = curriculum(table, null=.8)
    assert list(found) == [("m", "d", "r", "mle"), ("m", "d", "r", "masked_mle")]
    overlap, fall = found["m", "d", "r", "mle"]
    part = table[table.objective == "mle"].reset_index(drop=True)
    chosen = part.merge(part[part.step == 0][["seed", "record", "position", "selected"]], how="left",
                        on=["seed", "record", "position"], suffixes=("", "_first")).selected_first
    assert overlap.estimate == 0 and overlap.null == .8 and fall == change(part, "share", chosen)
    out = table.assign(held_out=True, selected=True, record="out/" + table.record)  # held-out tokens are no part of it
    assert repr(curriculum(pd.concat([table.assign(held_out=False), out]), null=.8)) == repr(found)  # NaN is not NaN


def course(seed, slower, seeds=3, documents=6, each=20, noise=.3):
    "log E falls by 1 over training, slower where the initial A is high; documents have rates of their own."
    rng, rows = np.random.default_rng(seed), []
    for s in range(seeds):
        record = np.arange(documents * each) // each
        a, run = rng.normal(size=documents * each), rng.normal(0, .05)
        rate = rng.normal(-1, .2, documents)[record] + (slower + run) * a
        for step in (0, 5, 10):
            e = np.exp(-3 + rate * step / 10 + rng.normal(0, noise, len(a)))
            rows.append(pd.DataFrame(dict(seed=s, step=step, record=[f"{s}/{r}" for r in record], epistemic=e,
                                          position=np.arange(len(a)), loss=1 + a + rng.normal(size=len(a)),
                                          aleatoric_initial=2 + a)))
    return pd.concat(rows, ignore_index=True)


def test_documents_that_do_not_differ_have_a_standard_error():
    runs = [course(seed, 0., seeds=1, noise=.6).assign(seed=seed) for seed in (18, 19)]
    error = slope_effect(pd.concat(runs)).error  # a variance of 18 is zero, where gradients lead to no standard error
    assert .05 < error < .15


def noisy_start(seed, apart):
    "Every token's E falls by the same factor; A before training says something of E, which is measured with noise."
    rng, n = np.random.default_rng(seed), 160
    a = rng.normal(size=n)
    level, record = -3 + .8 * a + .6 * rng.normal(size=n), np.arange(n) // 20
    log_e = lambda step: level - step / 10 + rng.normal(0, .5, n)
    noisy, more = a + rng.normal(size=n), dict(epistemic_initial=np.exp(log_e(0))) if apart else {}
    return pd.concat([pd.DataFrame(dict(seed=seed, step=step, record=[f"{seed}/{r}" for r in record], position=np.arange(n), loss=noisy,
                                        epistemic=np.exp(log_e(step)), aleatoric_initial=2 + a, **more)) for step in (0, 5, 10)])


def test_noise_at_the_first_step_is_no_slope_where_it_was_measured_apart():
    found = {apart: slope_effect(pd.concat([noisy_start(s, apart) for s in range(5)])) for apart in (True, False)}
    assert verdict(found[True]) == "undecided" and found[True].estimate < found[False].estimate / 2


def test_a_slope_that_is_not_there_is_not_found():
    absent = slope_effect(course(1, 0.))
    assert verdict(absent) == "undecided" and abs(absent.estimate) < .1 and absent.df == 2
