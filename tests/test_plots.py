"""Heat maps escape and can be read; figures come with their numbers."""
import math, re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from uat_repro.plots import (OBJECTIVES, contrast, draw_procedure, heatmap_figure, heatmap_html, html_page, look, plot_correlations, plot_dynamics, plot_effects, plot_gains, plot_posteriors,
                             plot_tradeoff, save_figure, score_colours, score_limits, text_colour)
from uat_repro.plots import _layout


def tokens(*words):
    words = words or ("Ask", ":", " Is", " 1", " <", " 2", "?", "\n", "<script>", "alert('x')", "</script>", " $a$", " \"&amp;\"", "\n\n", "字", "\t", "")
    scores = np.linspace(0, 9, len(words))
    return pd.DataFrame(dict(token=words, loss=np.where(np.arange(len(words)) < 2, math.nan, scores), entropy=scores / 3, selected=scores > 6))


def test_markup_in_tokens_is_escaped():
    page = html_page("<script>", heatmap_html(tokens(), ["loss", "entropy"], title="<b>"))
    assert "<script" not in page and "&lt;script&gt;" in page
    inside = re.findall(r"<span[^>]*>(.*?)</span>", page)
    assert not any("<" in text for text in inside if "<i style" not in text)


@pytest.mark.parametrize("cmap", ["viridis", "cividis", "magma", "vlag", "Greys"])
def test_text_can_be_read_on_every_colour(cmap):
    import seaborn  # registers vlag
    colours = score_colours(np.linspace(0, 1, 256), (0, 1), cmap)
    assert min(contrast(text_colour(c), c) for c in colours) >= 4.5


def test_text_can_be_read_on_all_colours_there_are():
    assert min(contrast(text_colour(c), c) for c in np.random.default_rng(0).random((5000, 3))) >= 4.5
    assert contrast("#6b6b6b", "white") >= 4.5                          # prompts, which have no colour


def test_html_colours_selection_and_tooltips():
    frame = tokens()
    page = heatmap_html(frame, "loss", limits=(0, 3))
    assert page.count('class="sel"') == frame.selected.sum()
    assert len(re.findall("background:#", page)) - page.count("background:#fff") == frame.loss.notna().sum()
    assert page.count("<br>") == 3 and "↵↵" in page and "⇥" in page
    assert "entropy 3.000 nats" in page                                 # scores that are not coloured are in the tooltip
    assert "≥ 3 nats" in page


def test_masks_and_limits_may_differ_by_score():
    frame = tokens().assign(other=False)
    page = heatmap_html(frame, ["loss", "entropy"], selected=dict(loss="selected", entropy="other"), limits=dict(entropy=(0, 1)))
    first, second = page.split("<figure>")[1:]
    assert 'class="sel"' in first and 'class="sel"' not in second and "≥ 1 nats" in second


def test_a_score_column_that_is_missing_is_named():
    with pytest.raises(ValueError, match="no column epistemic; the table has token, loss"): heatmap_html(tokens(), "epistemic")
    with pytest.raises(ValueError, match="no rows"): heatmap_figure(tokens()[:0], "loss")


def test_scores_without_a_value_have_no_colour():
    assert score_colours([math.nan, 1.], (0, 1))[0] is None
    assert score_limits([math.nan]) == (0, 1) and score_limits([2., 2.]) == (0, 2)
    frame = tokens().assign(loss=math.nan)
    assert len(re.findall("background:#", heatmap_html(frame, "loss"))) == heatmap_html(frame, "loss").count("background:#fff")
    heatmap_figure(frame, "loss")


def test_lines_are_filled_and_never_overfull():
    rng = np.random.default_rng(0)
    words = ["x" * n for n in rng.integers(0, 30, 200)] + ["y" * 75, "\n", "z"]
    pieces = _layout(words, 20)
    assert max(column + len(text) for _, _, column, text in pieces) <= 20
    joined = {i: "" for i in range(len(words))}
    for i, _, _, text in pieces: joined[i] += text
    assert [joined[i] for i in range(200)] == [w or "∅" for w in words[:200]] and joined[200] == words[200]
    spots = [(line, column + k) for _, line, column, text in pieces for k in range(len(text))]
    assert len(spots) == len(set(spots))                                # no two letters in one place


def test_the_printed_map_fits_its_page():
    fig = heatmap_figure(tokens(*(f" word{i}" for i in range(300))), ["loss", "entropy"])
    fig.canvas.draw()
    for ax in fig.axes:
        for text in ax.texts:
            box = text.get_window_extent()
            assert -1 <= box.x0 and box.x1 <= fig.bbox.x1 + 1 and -1 <= box.y0 and box.y1 <= fig.bbox.y1 + 1


def effects(**more):
    return pd.DataFrame([dict(trained_on="alpaca", regime="repeated", checkpoint=c, objective=o, estimate=e, low=e - .1, high=e + .1, per_seed=(e, e + .05), **more)
                         for c in ("best", "last") for e, o in ((.1, "mle"), (-.2, "combined"), (.3, "my_rival"))])


def test_every_seed_and_interval_is_drawn():
    fig = plot_gains(effects())
    for ax in fig.axes:
        points = [line for line in ax.lines if line.get_markersize() == 2.6]
        assert [len(p.get_xdata()) for p in points] == [2, 2, 2]
        bars = [line.get_xdata() for line in ax.lines if line.get_linewidth() == 9]
        assert np.diff(bars[0])[0] == pytest.approx(.2)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["MLE", "combined", "my rival"]


def test_objectives_are_told_apart_without_colour():
    assert len({l.marker for l in OBJECTIVES.values()}) == len({l.colour for l in OBJECTIVES.values()}) == len(OBJECTIVES)
    assert look("combined").label == "combined"


def test_procedure_follows_the_objective():
    strip = tokens().rename(columns=dict(loss="score"))
    said = lambda **settings: " ".join(t.get_text() for t in draw_procedure(strip, **settings).axes[0].texts)
    assert "top 25%" in said() and "Initial model" in said()
    assert "top 10%" in said(keep=.1) and "documents" in said(granularity="document")
    assert "Initial" not in said(distill_weight=0.) and "Mask" not in said(keep=1.)
    assert "random 25%" in said(metric="random") and "whole" in said(distill_on="all") and r"\tau" in said(temperature=2.)
    with pytest.raises(ValueError, match="nothing is trained"): said(keep=0., distill_weight=0.)


def test_lines_of_effects_have_their_intervals():
    frame = pd.DataFrame([dict(trained_on="a", x=x, kind=k, estimate=x, low=x - .1, high=x + .3) for x in (.1, .5, 1.) for k in ("high", "low")])
    ax = plot_effects(frame, "x", "kind").axes[0]
    bars = ax.containers[0].lines[2][0].get_segments()
    assert [list(b[:, 1]) for b in bars] == [pytest.approx([x - .1, x + .3]) for x in (.1, .5, 1.)]
    with pytest.raises(ValueError, match="no column distance"): plot_effects(frame, "distance", "kind")


def test_a_harmful_posterior_is_pale_and_the_chosen_one_bold():
    row = lambda name, inflation, **more: dict(model="m", dataset="d", posterior=name, pair="p", estimate=.5, low=.4, high=.6, inflation=inflation, max_inflation=.02, spearman=.3, jaccard=.2, chosen=False) | more
    left = plot_posteriors(pd.DataFrame([row("mild", .01, chosen=True), row("harsh", .5)])).axes[0]
    assert {t.get_text(): t.get_weight() for t in left.get_yticklabels()} == {"harsh": "normal", "mild": "bold"}
    assert sorted(line.get_alpha() for line in left.lines if line.get_marker() == "o") == [.3, 1]


def test_chosen_and_other_tokens_are_told_apart():
    frame = pd.DataFrame([dict(model="m", trained_on="d", objective="mle", seed=s, step=t, chosen=c, loss=1. + c) for s in (0, 1) for t in (0, 8) for c in (True, False)])
    lines = plot_dynamics(frame, ["loss"]).axes[0].lines
    assert {(line.get_linestyle(), line.get_ydata()[0]) for line in lines} == {("-", 2.), ("--", 1.)} and len(lines) == 6


def test_figures_leave_no_trace_in_pyplot_or_settings():
    import matplotlib.pyplot as plt
    before, size = plt.get_fignums(), mpl.rcParams["font.size"]
    plot_gains(effects())
    plot_tradeoff(pd.DataFrame([dict(trained_on="a", regime="r", checkpoint="last", objective=o, seed=s, id=.1 * s, ood=-.1) for o in ("mle", "combined") for s in (0, 1)]))
    plot_correlations(pd.DataFrame([dict(model="m", dataset="d", uncertainty="total", score="loss", estimate=.1, low=0., high=.2)]))
    assert plt.get_fignums() == before and mpl.rcParams["font.size"] == size


def test_a_picture_is_saved_with_its_numbers(tmp_path):
    frame = effects()
    path = save_figure(plot_gains(frame), tmp_path / "figures" / "fig3.png", frame)
    assert sorted(p.name for p in path.parent.iterdir()) == ["fig3.csv", "fig3.png"]
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and b"Software" not in data and str(tmp_path).encode() not in data
    back = pd.read_csv(path.with_suffix(".csv"))
    assert back.estimate.to_numpy() == pytest.approx(frame.estimate.to_numpy())
    assert [float(v) for v in back.per_seed[0].split()] == pytest.approx(frame.per_seed[0])
    assert save_figure(plot_gains(frame), tmp_path / "again.png", frame).read_bytes() == data
    with pytest.raises(ValueError, match="does not end in .png"): save_figure(plot_gains(frame), tmp_path / "x.svg", frame)
