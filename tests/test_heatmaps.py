"""Heat maps escape and can be read; the procedure follows its objective."""
import io, math, re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from uat_repro.heatmaps import (_layout, contrast, draw_procedure, heatmap_figure, heatmap_html, html_page,
                                score_colours, score_limits, text_colour)

AWKWARD = ("Ask", ":", " Is", " 1", " <", " 2", "?", "\n", "<script>", "alert('x')", "</script>", " $a$",
           " \"&amp;\"", "\n\n", "字", "\t", "")


def tokens(*words):
    words = words or AWKWARD
    scores = np.linspace(0, 9, len(words))
    loss = np.where(np.arange(len(words)) < 2, math.nan, scores)
    return pd.DataFrame(dict(token=words, loss=loss, entropy=scores / 3, selected=scores > 6))


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
    assert contrast("#6b6b6b", "white") >= 4.5  # prompts, which have no colour


def test_html_colours_selection_and_tooltips():
    frame = tokens()
    page = heatmap_html(frame, "loss", limits=(0, 3))
    assert page.count('class="sel"') == frame.selected.sum()
    assert len(re.findall("background:#", page)) - page.count("background:#fff") == frame.loss.notna().sum()
    assert page.count("<br>") == 3 and "↵↵" in page and "⇥" in page
    assert "entropy 3.000 nats" in page  # scores that are not coloured are in the tooltip
    assert "≥ 3 nats" in page


def test_masks_and_limits_may_differ_by_score():
    masks, limits = dict(loss="selected", entropy="other"), dict(entropy=(0, 1))
    page = heatmap_html(tokens().assign(other=False), ["loss", "entropy"], selected=masks, limits=limits)
    first, second = page.split("<figure>")[1:]
    assert 'class="sel"' in first and 'class="sel"' not in second and "≥ 1 nats" in second


def test_a_score_column_that_is_missing_is_named():
    missing = "no column epistemic; the table has token, loss"
    with pytest.raises(ValueError, match=missing): heatmap_html(tokens(), "epistemic")
    with pytest.raises(ValueError, match="no rows"): heatmap_figure(tokens()[:0], "loss")


def test_scores_without_a_value_have_no_colour():
    assert score_colours([math.nan, 1.], (0, 1))[0] is None
    assert score_limits([math.nan]) == (0, 1) and score_limits([2., 2.]) == (0, 2)
    frame = tokens().assign(loss=math.nan)
    page = heatmap_html(frame, "loss")
    assert len(re.findall("background:#", page)) == page.count("background:#fff")
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
    assert len(spots) == len(set(spots))  # no two letters in one place


def test_the_printed_map_fits_its_page():
    fig = heatmap_figure(tokens(*(f" word{i}" for i in range(300))), ["loss", "entropy"])
    fig.canvas.draw()
    for text in (text for ax in fig.axes for text in ax.texts):
        box = text.get_window_extent()
        assert -1 <= box.x0 and box.x1 <= fig.bbox.x1 + 1 and -1 <= box.y0 and box.y1 <= fig.bbox.y1 + 1


def test_the_printed_map_does_not_depend_on_settings():
    def picture():
        data = io.BytesIO()
        heatmap_figure(tokens(), "loss", title="A title").savefig(data, dpi=100)
        return data.getvalue()
    plain = picture()
    wild = {"font.size": 20, "font.family": ["DejaVu Serif"], "text.color": "red", "figure.facecolor": "red"}
    with mpl.rc_context(wild): assert picture() == plain


def test_procedure_follows_the_objective():
    strip = tokens().rename(columns=dict(loss="score"))
    def said(**settings): return " ".join(t.get_text() for t in draw_procedure(strip, **settings).axes[0].texts)
    assert "top 25%" in said() and "Initial model" in said()
    assert "top 10%" in said(keep=.1) and "documents" in said(granularity="document")
    assert "Initial" not in said(distill_weight=0.) and "Mask" not in said(keep=1.)
    assert "random 25%" in said(metric="random") and "whole" in said(distill_on="all")
    assert r"\tau" in said(temperature=2.)
    with pytest.raises(ValueError, match="nothing is trained"): said(keep=0., distill_weight=0.)


def test_heat_maps_leave_no_trace_in_pyplot():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    heatmap_figure(tokens(), "loss")
    draw_procedure(tokens().rename(columns=dict(loss="score")))
    assert plt.get_fignums() == before


def test_tokens_that_show_nothing_have_a_picture_all_the_same():
    assert heatmap_figure(pd.DataFrame(dict(token=["\r", "\r"], loss=[1., 2.])), "loss").get_figheight() > 0
