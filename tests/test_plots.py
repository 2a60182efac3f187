"""Charts show every seed and interval, and come with their numbers."""
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from uat_repro.plots import (OBJECTIVES, look, plot_correlations, plot_dynamics, plot_effects, plot_gains,
                             plot_tradeoff, save_figure)


def effects(**more):
    return pd.DataFrame([dict(trained_on="alpaca", regime="repeated", checkpoint=c, objective=o,
                              estimate=e, low=e - .1, high=e + .1, per_seed=(e, e + .05), **more)
                         for c in ("best", "last") for e, o in ((.1, "mle"), (-.2, "combined"), (.3, "my_rival"))])


def test_every_seed_and_interval_is_drawn():
    fig = plot_gains(effects())
    for ax in fig.axes:
        points = [line for line in ax.lines if line.get_markersize() == 2.6]
        assert [len(p.get_xdata()) for p in points] == [2, 2, 2]
        bars = [line.get_xdata() for line in ax.lines if line.get_linewidth() == 9]
        assert np.diff(bars[0])[0] == pytest.approx(.2)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["MLE", "combined", "my rival"]


def test_a_panel_without_a_run_says_so():
    frame = effects()
    frame.loc[frame.checkpoint == "best", "regime"] = "one_pass"
    fig = plot_gains(frame, rows=("regime",), columns=("checkpoint",))
    said = [[t.get_text() for t in ax.texts] for ax in fig.axes]
    assert said == [[], ["no run"], ["no run"], []]


def test_a_table_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no column low"): plot_gains(effects().drop(columns="low"))
    with pytest.raises(ValueError, match="no rows"): plot_gains(effects()[:0])


def test_objectives_are_told_apart_without_colour():
    markers, colours = ({getattr(how, part) for how in OBJECTIVES.values()} for part in ("marker", "colour"))
    assert len(markers) == len(colours) == len(OBJECTIVES)
    assert look("combined").label == "combined"


def test_lines_of_effects_have_their_intervals():
    frame = pd.DataFrame([dict(trained_on="a", x=x, kind=k, estimate=x, low=x - .1, high=x + .3)
                          for x in (.1, .5, 1.) for k in ("high", "low")])
    ax = plot_effects(frame, "x", "kind").axes[0]
    bars = ax.containers[0].lines[2][0].get_segments()
    assert [list(b[:, 1]) for b in bars] == [pytest.approx([x - .1, x + .3]) for x in (.1, .5, 1.)]
    with pytest.raises(ValueError, match="no column distance"): plot_effects(frame, "distance", "kind")


def test_chosen_and_other_tokens_are_told_apart():
    frame = pd.DataFrame([dict(model="m", trained_on="d", objective="mle", seed=s, step=t, chosen=c, loss=1. + c)
                          for s in (0, 1) for t in (0, 8) for c in (True, False)])
    lines = plot_dynamics(frame, ["loss"]).axes[0].lines
    found = {(line.get_linestyle(), line.get_ydata()[0]) for line in lines}
    assert found == {("-", 2.), ("--", 1.)} and len(lines) == 6


def test_figures_leave_no_trace_in_pyplot_or_settings():
    import matplotlib.pyplot as plt
    before, size = plt.get_fignums(), mpl.rcParams["font.size"]
    plot_gains(effects())
    plot_tradeoff(pd.concat([effects().assign(role=role) for role in ("id", "ood")]))
    one = dict(model="m", dataset="d", uncertainty="total", score="loss", estimate=.1, low=0., high=.2)
    plot_correlations(pd.DataFrame([one]))
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
    with pytest.raises(ValueError, match="does not end in .png"): save_figure(None, tmp_path / "x.svg", frame)


def test_the_margin_is_a_grey_band():
    lines = pd.DataFrame([dict(trained_on="a", x=x, kind="k", estimate=x, low=x - .1, high=x + .3, margin=.02)
                          for x in (.1, .5)])
    for fig, ends in ((plot_gains(effects(margin=.02)), lambda b: (b.get_x(), b.get_width())),
                      (plot_effects(lines, "x", "kind"), lambda b: (b.get_y(), b.get_height()))):
        assert [ends(b) for ax in fig.axes for b in ax.patches] == [pytest.approx((-.02, .04))] * len(fig.axes)
    assert not plot_gains(effects()).axes[0].patches
