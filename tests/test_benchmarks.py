"""The benchmark compares what is equal, and the README quotes it as it was measured."""
import json, sys
from pathlib import Path

import pytest, torch

pytest.importorskip("trl", reason="the benchmark compares with TRL: pip install trl")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench, variants


def losses(name: str) -> list[float]:
    "Two steps of a variant, on two layers under a small vocabulary."
    model, tokenizer = variants.make_model("wide-300")
    work = variants.Work(tokenizer, variants.make_rows(tokenizer, 300, 2, [9, 14, 14] if "dropout" not in name else [12, 12], .7), 4)
    step = variants.VARIANTS[name](model, work)
    variants.perturb(work.trained or model, 1)
    return [float(step(batch)) for batch in work.batches]


@pytest.mark.parametrize("same", [[v for v in group if "compiled" not in v] for group in bench.SAME], ids=lambda g: g[0])
def test_variants_with_the_same_objective_have_the_same_loss(same):
    found = {v: losses(v) for v in same}
    assert not bench.check_losses({v: dict(loss=x) for v, x in found.items()})
    assert all(x > 0 and torch.isfinite(torch.tensor(x)) for xs in found.values() for x in xs)


def test_a_different_loss_is_noticed():
    assert bench.check_losses(dict(trainer_mle=dict(loss=[1.0]), ours_mle=dict(loss=[1.001])))


def test_everything_compared_exists():
    named = {v for group, _ in bench.WORKLOADS.values() for v in group} | {v for g in bench.GOALS for v in (g[1], *g[2])}
    assert named <= set(variants.VARIANTS) and {v for g in bench.GOALS for v in (g[1], *g[2])} <= set(bench.NAMES)


def test_readme_quotes_what_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    table = (ROOT / "benchmarks" / "results.md").read_text(encoding="utf-8")
    assert table == bench.summary(result) and table in (ROOT / "README.md").read_text(encoding="utf-8")
    assert result["ratios"] == bench.ratios(result["workloads"])
