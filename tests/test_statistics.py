"""Intervals cover, pairing helps, clusters count, and verdicts follow their rule."""
import json, math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from uat_repro.statistics import (TESTS, Claim, Effect, Measure, chance_jaccard, claim_rows, claims_table, cluster_bootstrap, compare_claims, correct, judge,
                                  correlation, effects_frame, gains, jaccard, overlap_effect, paired_effect, read_claims, read_runs, sample_note, standing, verdict,
                                  write_claims, write_whole)

CLAIMS = {c.id: c for c in read_claims()}


def arms(shift, n=40, seeds=2, seed=0, noise=.2):
    "Two arms on the same records, which differ in difficulty far more than the arms do."
    rng = np.random.default_rng(seed)
    hard = rng.normal(1.5, .6, n)
    frame = lambda move: pd.DataFrame([dict(record=f"r{i}", seed=s, nll=hard[i] + move + rng.normal(0, noise)) for s in range(seeds) for i in range(n)])
    return frame(0.), frame(shift)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits = [e.low <= -.1 <= e.high for e in (paired_effect(*arms(-.1, n=80, seed=s)) for s in range(400))]
    assert .92 <= np.mean(hits) <= .98


def test_nothing_is_found_about_as_rarely_as_the_p_value_says():
    ps = np.array([paired_effect(*arms(0., n=30, seed=s)).p for s in range(800)])
    assert .035 <= np.mean(ps <= .05) <= .065 and np.mean(ps <= .002) <= .0075  # small ones too, for Holm multiplies them


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
    from uat_repro.workflow import grid, load_profile
    many = 8 * len(grid(load_profile(profile)))
    effect = paired_effect(*arms(-.3, n=30))
    assert correct({k: effect if k == 0 else replace(effect, p=.5) for k in range(many)})[0] < .05


def test_the_detectable_effect_is_found_four_times_out_of_five():
    least = paired_effect(*arms(0., n=80)).detectable()
    found = [paired_effect(*arms(-least, n=80, seed=s)).p <= .05 for s in range(1, 300)]
    assert .7 <= np.mean(found) <= .9


def test_the_interval_is_that_of_theory_for_a_mean():
    x = np.random.default_rng(0).normal(size=400)
    found = cluster_bootstrap(lambda i: x[i].mean(-1), 400)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=.06)
    assert found.error == pytest.approx(x.std() / 20, rel=.06)


def test_pairing_narrows_the_interval():
    a, b = arms(-.1)
    mixed = b.assign(nll=b.groupby("seed").nll.transform(lambda x: x.sample(frac=1, random_state=1).to_numpy()))
    paired, apart = paired_effect(a, b), paired_effect(a, mixed)
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
    assert math.isnan(found.low) and standing(found, Measure("x", -1)) == "untestable" and "no interval" in str(found)


def tokens(records=40, each=50, seed=0):
    rng = np.random.default_rng(seed)
    level = rng.normal(size=records).repeat(each)
    return pd.DataFrame(dict(record=np.arange(records).repeat(each), token=np.arange(records * each), level=level,
                             x=(level + rng.normal(size=level.size)).round(1), y=(level + rng.normal(size=level.size)).round(1)))


def test_correlation_is_spearmans_with_ties_and_missing_values():
    frame = tokens()
    frame.loc[::7, "x"] = math.nan
    kept = frame.dropna()
    assert correlation(frame, "x", "y", resamples=20).estimate == pytest.approx(spearmanr(kept.x, kept.y).statistic)


def test_resampled_correlations_equal_those_of_the_drawn_table():
    frame, seen = tokens(records=5, each=8), []
    correlation(frame, "x", "y", resamples=1000)
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
    assert correlation(frame, "x", "y", given="level", resamples=20).estimate == pytest.approx(np.corrcoef(*left)[0, 1])


def test_resampling_records_is_wider_than_resampling_tokens():
    by_record, by_token = (correlation(tokens(), "x", "y", cluster=c, resamples=300) for c in ("record", "token"))
    assert by_record.high - by_record.low > 2 * (by_token.high - by_token.low)
    assert by_record.seeds == 0 and by_record.records == 40


def test_overlap():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(record=np.arange(4000) // 100, seed=np.arange(4000) % 2, early=rng.random(4000) < .25, late=rng.random(4000) < .25))
    found = overlap_effect(frame, "early", "late")
    assert found.estimate == pytest.approx(jaccard(frame.early, frame.late))
    assert found.low < chance_jaccard(.25) < found.high
    assert found.per_seed[1] == pytest.approx(jaccard(*(frame.loc[frame.seed == 1, c] for c in ("early", "late"))))
    assert math.isnan(jaccard([0, 0], [0, 0])) and jaccard([1], [1]) == 1


GOOD = Effect(.3, .1, .5, seeds=2, records=60, per_seed=(.2, .4))


@pytest.mark.parametrize("effect, measure, expected", [
    (GOOD, Measure("x"), "for"),
    (GOOD, Measure("x", -1), "against"),
    (GOOD, Measure("x", 1, .2), "open"),                              # the interval reaches over the threshold
    (GOOD, Measure("x", 1, .6), "against"),                           # it lies wholly below
    (GOOD, Measure("x", -1, .6), "for"),
    (replace(GOOD, low=-.1), Measure("x"), "open"),
    (replace(GOOD, per_seed=(.7, -.1)), Measure("x"), "open"),        # a seed disagrees
    (replace(GOOD, seeds=1, per_seed=(.3,)), Measure("x"), "untestable"),
    (replace(GOOD, records=9), Measure("x"), "untestable"),
    (replace(GOOD, seeds=0, per_seed=()), Measure("x"), "for"),       # nothing was trained, so no seed can disagree
    (replace(GOOD, low=math.nan), Measure("x"), "untestable"),
])
def test_standing(effect, measure, expected): assert standing(effect, measure) == expected


@pytest.mark.parametrize("standings, expected", [
    (["for"], "reproduced"), (["for", "for", "untestable"], "reproduced"), (["for", "open"], "partly"), (["for", "against"], "partly"),
    (["open"], "not reproduced"), (["against", "untestable"], "not reproduced"), (["untestable"], "not testable at this scale"), ([], "not testable at this scale"),
])
def test_verdict(standings, expected): assert verdict(standings) == expected


def test_a_claim_on_two_things_needs_both():
    c8 = CLAIMS["C8"]
    assert {r["verdict"] for r in claim_rows(c8, {"a": (GOOD, GOOD)})} == {"reproduced"}
    rows = claim_rows(c8, {"a": (GOOD, replace(GOOD, low=-.1)), "b": (GOOD, GOOD)})
    assert [(r["standing"], r["holds"]) for r in rows] == [("for", "open"), ("open", "open"), ("for", "for"), ("for", "for")]
    assert {r["verdict"] for r in rows} == {"partly"}


def test_the_eight_claims_are_there_and_written(tmp_path):
    rows = [r for c in CLAIMS.values() for r in claim_rows(c, {"a | b": tuple(replace(GOOD, low=math.nan) for _ in c.measures)})]
    text = claims_table(rows)
    for claim in CLAIMS.values(): assert f"| {claim.id} | {claim.text}" in text
    assert "a \\| b" in text and "## Controls" in text
    read = json.loads(write_claims(rows, tmp_path).read_text())
    assert read[0]["effect"]["low"] is None and len(read) == len(rows)
    assert (tmp_path / "claims.md").read_text() == text
    assert "**" not in compare_claims(tmp_path / "claims.json", rows)


def test_differences_beyond_the_intervals_are_marked():
    rows = lambda e: claim_rows(CLAIMS["C3"], {"a": (e,)})
    near, far = replace(GOOD, estimate=.4, low=.2, high=.6), replace(GOOD, estimate=-.4, low=-.6, high=-.2, per_seed=(-.4, -.4))
    assert "**" not in compare_claims(rows(near), rows(GOOD))
    said = compare_claims(rows(far), rows(GOOD))
    assert "**1 of 1 effects differ**" in said and "**verdict changed**" in said
    assert "absent" in compare_claims([], rows(GOOD))
    assert "no shared setting" in compare_claims(claim_rows(CLAIMS["C3"], {"b": (GOOD,)}), rows(GOOD))


def test_p_values_are_corrected_within_a_family(tmp_path):
    "Holm: the smallest times their number, the next times one less, never falling."
    records = pd.concat([arms(shift, seed=k)[1].assign(objective=o, accuracy=.5) for k, (o, shift) in enumerate([("mle", 0.), ("masked_mle", -.02), ("document_masked_mle", .05), ("combined", -.3)])])
    records = pd.concat([records.assign(model="m", trained_on=d, regime="r", checkpoint="last", role=r) for d in "ab" for r in ("id", "ood")])
    rows = [r for r in judge(CLAIMS.values(), tokens=pd.DataFrame(columns=["model", "dataset"]), records=records) if r["effect"]]
    family = [r for r in rows if not r["control"]]
    assert {r["id"] for r in family} == {"C3", "C4", "C7", "C8"}  # C6 asks for the initial model
    raw, worst = sorted((r["effect"]["p"], r["p"]) for r in family), 0
    for k, (p, corrected) in enumerate(raw):
        worst = max(worst, min(1, p * (len(raw) - k)))
        assert corrected == pytest.approx(worst)


def test_a_file_of_claims_is_checked_by_reading_it(tmp_path):
    "Every claim names a test that exists, and its assumptions; controls name their claim."
    for claim in CLAIMS.values():
        assert claim.family and claim.where and all(m.test in TESTS for m in claim.measures) and (claim.control or claim.assumed)
    (tmp_path / "claims.yaml").write_text("assumptions: {}\nclaims: []\ncontrols:\n- {id: X, text: t, where: w, family: f, measures: [{name: n, test: gain, of: a, over: b, role: id, expect: '< 0'}]}\n")
    (claim,) = read_claims(tmp_path / "claims.yaml")
    assert claim.control and claim.measures[0] == Measure("n", -1, 0., "gain", dict(of="a", over="b", role="id"))


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    write_whole(tmp_path / "x.txt", "old")
    def full(self, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"): write_whole(tmp_path / "x.txt", "new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"] and (tmp_path / "x.txt").read_text() == "old"


def runs(folder, objectives=("mle", "masked_mle"), shift=-.2):
    a, b = arms(shift)
    for objective, frame in zip(objectives, (a, b)):
        out = folder / "train" / f"tiny-alpaca-repeated-{objective}"
        out.mkdir(parents=True)
        rows = [frame.assign(checkpoint=c, dataset=d, role=r, accuracy=lambda x: -x.nll)
                for c in ("initial", "best", "last") for d, r in (("alpaca", "id"), ("alpaca", "validation"), ("gsm8k", "ood"), ("sharegpt", "ood"))]
        pd.concat(rows).to_parquet(out / "records.parquet")
        (out / "result.json").write_text(json.dumps(dict(model="tiny", dataset="alpaca", regime="repeated", objective=objective)))


def test_runs_are_read_and_compared(tmp_path):
    runs(tmp_path)
    frame = read_runs(tmp_path)
    found = gains(frame, "masked_mle")
    assert set(found) == {("tiny", "alpaca", "repeated", c, r) for c in ("best", "last") for r in ("id", "ood")}
    assert found["tiny", "alpaca", "repeated", "last", "id"].estimate == pytest.approx(.2, abs=.1)
    assert found["tiny", "alpaca", "repeated", "last", "ood"].records == 80                  # both sets, told apart by name
    assert all(e.estimate == 0 for e in gains(frame, "masked_mle", over="initial").values())
    assert gains(frame, "masked_mle", value="accuracy")["tiny", "alpaca", "repeated", "last", "id"].estimate > 0
    assert len(effects_frame(found, objective="masked_mle")) == 4
    assert read_runs(tmp_path, runs=["train/tiny-alpaca-repeated-mle"]).objective.unique().tolist() == ["mle"]
    with pytest.raises(FileNotFoundError, match="1 of 2 runs are missing"):
        read_runs(tmp_path, runs=[f"train/tiny-alpaca-repeated-{o}" for o in ("mle", "none")])


def test_a_caption_warns_of_thin_data():
    assert "Thin" not in sample_note(5000, 60, 3)
    assert sample_note(documents=8, seeds=2).endswith("Thin data: documents below 30, seeds below 3.")
    assert asdict(GOOD)["per_seed"] == (.2, .4) and isinstance(CLAIMS["C1"], Claim)
