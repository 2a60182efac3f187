"""Claims are data, verdicts follow their rule, and identity is columns until the last line is written."""
import json, math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from uat_repro.claims import (NOT_MEASURED, TESTS, Claim, Finding, Judged, Measure, claims_table, compare_claims, gather,
                              judge, judge_folder, measure_effects, read_claims, read_judged, write_claims)
from uat_repro.effects import Effect, verdict
from uat_repro.results import write_json

CLAIMS = {c.id: c for c in read_claims()}
GOOD = Effect(.3, .1, .5, seeds=4, records=60, clusters=60, per_seed=(.2, .4, .3, .3), error=.07, df=6., p=.01)
OPEN, BAD = replace(GOOD, low=-.1), replace(GOOD, estimate=-.4, low=-.6, high=-.2)


def judged(claim, *settings):
    "A claim with the given effects, a tuple of them for each setting."
    found = [Finding(m, dict(model=f"m{n}", dataset="d"), e, verdict(e, m.expected))
             for n, effects in enumerate(settings) for m, e in zip(CLAIMS[claim].measures, effects)]
    return Judged(CLAIMS[claim], tuple(found))


@pytest.mark.parametrize("settings, expected", [
    ([(GOOD, GOOD)], "supported"), ([(GOOD, OPEN)], "1 supported; 1 undecided"),
    ([(BAD, OPEN), (GOOD, OPEN)], "1 supported; 2 undecided; 1 contradicted"), ([], NOT_MEASURED),
])
def test_a_verdict_counts_those_of_its_measures(settings, expected): assert judged("C8", *settings).verdict == expected


def test_what_is_undecided_is_never_called_a_failure():
    text = claims_table([judged("C8", (OPEN, OPEN)), judged("C9")])
    assert "reproduced" not in text and text.count("**undecided (") == 2 and text.count(NOT_MEASURED) == 1


def test_claims_come_back_as_they_were_written(tmp_path):
    lost = replace(GOOD, low=math.nan, high=math.nan, p=math.nan, error=math.nan, df=math.nan)
    found = [judged(c.id, [lost] * len(c.measures)) for c in CLAIMS.values()] + [judged("C3")]
    text, written = claims_table(found), json.loads(write_claims(found, tmp_path).read_text())["claims"]
    for claim in CLAIMS.values(): assert f"| {claim.id} | {claim.text}" in text
    assert "## Controls" in text and (tmp_path / "claims.md").read_text() == text
    assert len(written) == len(found) and written[0]["findings"][0]["effect"]["low"] is None
    assert claims_table(read_judged(tmp_path / "claims.json")) == text
    assert "**" not in compare_claims(tmp_path / "claims.json", found[:-1])


def test_display_text_is_made_last_and_is_not_stored(tmp_path):
    found = [judged("C3", (GOOD,))]
    file = write_claims(found, tmp_path, label=lambda x: f"<{x}|>")
    assert "<m0\\|>, <d\\|>" in (tmp_path / "claims.md").read_text() and "<m0" not in file.read_text()
    assert json.loads(file.read_text())["claims"][0]["findings"][0]["setting"] == dict(model="m0", dataset="d")
    assert read_judged(file) == found


def test_differences_beyond_the_intervals_are_marked():
    mine, near, far = (judged("C3", (e,)) for e in (GOOD, replace(GOOD, estimate=.4, low=.2, high=.6), BAD))
    assert "**" not in compare_claims([near], [mine])
    said = compare_claims([far], [mine], label=str.upper)
    assert "**1 of 1 effects differ**" in said and "**1 of 1 verdicts changed**" in said and "| M0, D |" in said
    assert "absent" in compare_claims([], [mine])
    other = Judged(mine.claim, tuple(replace(f, setting=dict(model="x", dataset="d")) for f in mine.findings))
    assert "no shared setting" in compare_claims([other], [mine])


def test_a_reference_of_another_version_is_not_compared(tmp_path):
    old = dict(claims=[dict(id="C1", findings=[dict(standing="supports")])])
    assert "No comparison" in compare_claims([judged("C3", (GOOD,))], write_json(tmp_path / "claims.json", old))


def held_out(shift, seed, n=40, seeds=4):
    "Records of one objective, whose loss is shifted."
    rng, hard = np.random.default_rng(seed), np.random.default_rng(0).normal(1.5, .6, n)
    row = lambda i, s: dict(record=f"r{i}", seed=s, nll=hard[i] + shift + rng.normal(0, .2), accuracy=.5)
    return pd.DataFrame([row(i, s) for s in range(seeds) for i in range(n)])


def records(shifts, regimes=("one_pass",), datasets="a", checkpoints=("best", "last")):
    "Records of several objectives, in and out of distribution."
    parts = [held_out(shift, k).assign(objective=o) for k, (o, shift) in enumerate(shifts.items())]
    places = [dict(model="m", trained_on=d, regime=g, checkpoint=c, role=r)
              for d in datasets for g in regimes for c in checkpoints for r in ("id", "ood")]
    return pd.concat([pd.concat(parts).assign(**w) for w in places])


def test_intervals_are_simultaneous_over_all_claims_and_apart_from_controls():
    "Holm: the smallest p times their number, the next times one less, never falling."
    shifts = dict(mle=0., masked_mle=-.02, document_masked_mle=.05, combined=-.3)
    everything = judge(CLAIMS.values(), records=records(shifts, datasets="ab"))
    found = [j for j in everything if j.findings and not j.claim.control]
    assert {j.claim.id for j in found} == {"C3", "C4", "C8"}  # C6 and C7 need the initial model
    findings = [f for j in found for f in j.findings]
    raw = [measure_effects(m, records=records(shifts, datasets="ab")) for j in found for m in j.claim.measures]
    pairs = zip((e.p for part in raw for _, e in part), (f.effect for f in findings))
    pairs, worst = sorted(pairs, key=lambda pair: pair[0]), 0
    for k, (p, effect) in enumerate(pairs):
        worst = max(worst, min(1, p * (len(pairs) - k)))
        assert effect.p == pytest.approx(worst) and (effect.p <= .05) == (effect.low > 0 or effect.high < 0)
    assert len(pairs) == 8 and pairs[0][1].level == pytest.approx(1 - .05 / 8)
    assert all(f.verdict == verdict(f.effect, f.measure.expected) for f in findings)


def test_a_regime_is_judged_at_its_own_checkpoint_only():
    (found,) = judge([CLAIMS["C3"]], records=records(dict(mle=0., masked_mle=-.1), ("one_pass", "repeated")))
    assert [(f.setting["regime"], f.setting["checkpoint"]) for f in found.findings] == [
        ("one_pass", "last"), ("repeated", "best")]


def test_the_damage_and_what_restores_it():
    "Masked MLE loses 0.2 nats out of distribution, and the combined objective restores about half of them."
    table = records(dict(masked_mle=.2, combined=.1))
    start = pd.concat([held_out(0., 9).assign(objective=o, model="m", trained_on="a", regime="one_pass", checkpoint="initial", role=r)
                       for o in ("masked_mle", "combined") for r in ("id", "ood")])
    found = {j.claim.id: j for j in judge(CLAIMS.values(), records=pd.concat([start, table])) if j.findings}
    assert found["C6"].verdict == found["C7"].verdict == "supported"
    share = found["C7"].findings[0].effect
    assert share.low < .5 < share.high and share.unit == "share of the loss"


def test_a_share_comes_back_with_its_bounds(tmp_path):
    table = records(dict(masked_mle=0., combined=0.))
    start = records(dict(masked_mle=.1, combined=.1), checkpoints=("initial",))  # training has lost nothing
    found = judge([CLAIMS["C7"]], records=pd.concat([start, table]))
    assert found[0].verdict == "undecided" and found[0].findings[0].effect.high == math.inf
    assert read_judged(write_claims(found, tmp_path)) == found


def followed(objective="mle", held=(False, True)):
    "Followed tokens whose log E falls by 1, and by 0.4 less for each standard deviation of the initial A."
    parts = []
    for seed, out in np.ndindex(4, len(held)):
        rng = np.random.default_rng([seed, out])
        a, record = rng.normal(size=160), np.arange(160) // 20
        names = [f"out/{r}" if held[out] else f"{seed}/{r}" for r in record]
        for step in (0, 5, 10):
            e = np.exp(-3 + (rng.normal(-1, .05) + .4 * a) * step / 10 + rng.normal(0, .3, 160))
            parts.append(pd.DataFrame(dict(
                model="m", trained_on="d", regime="one_pass", objective=objective, seed=seed, step=step, record=names,
                position=np.arange(160), held_out=held[out], epistemic=e, aleatoric=2 + a, aleatoric_initial=2 + a,
                loss=2 + a + rng.normal(size=160), selected=np.arange(160) % 4 == step % 2)))
    return pd.concat(parts, ignore_index=True)


def test_c9_needs_its_columns_and_finds_a_slower_fall():
    table = followed()
    found = {j.claim.id: j for j in judge(CLAIMS.values(), dynamics=table)}
    assert [f.setting["tokens"] for f in found["C9"].findings] == ["held out", "trained"]
    assert found["C9"].verdict == "supported"
    assert all(f.effect.low < .4 < f.effect.high and f.effect.seeds == 4 for f in found["C9"].findings)
    for column in ("held_out", "aleatoric_initial"):
        found = {j.claim.id: j for j in judge(CLAIMS.values(), dynamics=table.drop(columns=column))}
        assert found["C9"].verdict == NOT_MEASURED and found["C5a"].findings


def test_c10_finds_what_uncertainty_says_beyond_loss_and_entropy():
    rng, parts = np.random.default_rng(0), []
    hard = rng.normal(size=600)
    for seed in range(5):
        loss, entropy = hard + rng.normal(size=600), hard + rng.normal(size=600)
        e = .5 * loss + rng.normal(size=600)
        parts.append(pd.DataFrame(dict(
            model="m", dataset="d", seed=seed, record=np.arange(600) // 10, cluster=np.arange(600) // 20, epistemic=e,
            loss=loss, entropy=entropy, gain=.1 * loss + .05 * e + .3 * rng.normal(size=600))))
    table = pd.concat(parts, ignore_index=True)
    (there,), (absent,) = (judge([CLAIMS["C10"]], learnability=t) for t in (
        table, table.assign(gain=table.gain - .05 * table.epistemic)))
    effect = there.findings[0].effect
    assert there.verdict == "supported" and effect.low < .05 * table.epistemic.std() < effect.high
    assert (effect.seeds, effect.records, effect.clusters) == (5, 60, 30) and absent.verdict == "undecided"


def test_tables_are_gathered_from_runs_or_from_a_reference(tmp_path):
    run = tmp_path / "results" / "train" / "m-d-one_pass-mle"
    run.mkdir(parents=True)
    table = held_out(0., 0)
    table.to_parquet(run / "records.parquet")
    assert gather(tmp_path / "results") == {}  # not finished
    write_json(run / "result.json", dict(identity=dict(model="m", trained_on="d", regime="one_pass", objective="mle")))
    found = gather(tmp_path / "results")
    assert list(found) == ["records"] and set(found["records"].objective) == {"mle"}
    assert gather(tmp_path / "results", ["train/m-d-one_pass-mle"])["records"].equals(found["records"])
    assert gather(tmp_path / "results", ["uncertainty/m-d"]) == {}
    grid = dict(models=dict(m={}), datasets=dict(d={}), regimes=dict(one_pass={}), objectives=dict(mle={}), seeds=[0], figures={})
    write_json(tmp_path / "results/profile.json", grid | dict(train=dict(objectives=["combined"])) | dict(objectives=dict(combined={})))
    assert judge_folder(tmp_path / "results") == [], "its own run is not finished, and the one that is there is none of it"
    (tmp_path / "reference").mkdir()
    found["records"].to_parquet(tmp_path / "reference" / "records.parquet")
    assert gather(tmp_path / "reference")["records"].equals(found["records"])


def test_a_new_test_is_one_entry(monkeypatch):
    "A table, the columns of a setting, and a function of the measure and the table."
    def mean(m, table):
        values = table.groupby("dataset")[m.how["of"]].mean()
        return {(dataset,): replace(GOOD, estimate=value, p=math.nan) for dataset, value in values.items()}

    monkeypatch.setitem(TESTS, "mean", TESTS["gain"]._replace(table="tokens", columns=("dataset",), effects=mean))
    claim = Claim("X", "t", "w", (Measure("n", 1, 0., "mean", dict(of="loss")),))
    (found,) = judge([claim], tokens=pd.DataFrame(dict(dataset=["a", "b"], loss=[1., 2.])))
    assert [f.setting["dataset"] for f in found.findings] == ["a", "b"]
    assert [f.effect.estimate for f in found.findings] == [1., 2.] and found.verdict == "supported"


FILE = """assumptions: {}
claims: []
controls:
- {id: X, text: t, where: w, measures: [{name: n, test: gain, of: a, over: b, role: id, expect: '< 0'}]}
"""


def test_a_file_of_claims_is_checked_by_reading_it(tmp_path):
    "Every claim names a test that exists, and its assumptions; controls name their claim."
    for claim in CLAIMS.values():
        assert claim.where and (claim.control or claim.assumed)
        assert all(m.test in TESTS for m in claim.measures)
    (tmp_path / "claims.yaml").write_text(FILE)
    (claim,) = read_claims(tmp_path / "claims.yaml")
    assert claim.control and claim.measures[0] == Measure("n", -1, 0., "gain", dict(of="a", over="b", role="id"))
    (tmp_path / "claims.yaml").write_text(FILE.replace("gain", "gian"))
    with pytest.raises(ValueError, match="'n' has the test 'gian': take one of correlation, difference"):
        read_claims(tmp_path / "claims.yaml")
