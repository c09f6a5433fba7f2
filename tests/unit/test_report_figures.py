"""Figures: what is drawn is what the frame says."""

from __future__ import annotations

import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from test_report_tables import long_frame

from evalkit.errors import UsageError
from evalkit.report.figures import CHANCE, NULL, SCORE, score_figure

NAN = float("nan")
ROWS = [
    {"dictionary": "topk", "mean": 0.5, "low": 0.4, "high": 0.6, "n": 50, "judge": "tiny", "chance": 0.0, "null_mean": 0.02,
     "null_low": -0.03, "null_high": 0.07, "null_metric": "shuffled"},
    {"dictionary": "pca", "mean": 0.2, "low": 0.1, "high": 0.3, "n": 48, "failed": 2, "judge": "tiny", "chance": 0.0,
     "null_mean": 0.01, "null_low": -0.04, "null_high": 0.06, "null_metric": "shuffled"},
    {"dictionary": "ica", "mean": NAN, "low": NAN, "high": NAN, "n": 0, "units_failed": 1, "chance": 0.0},
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws and returns the figure as well as its file."""
    kept = []
    save = Figure.savefig

    def keep(self, *args, **more):
        kept.append(self)
        return save(self, *args, **more)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(frame, name="figure.png", **more):
        score_figure(frame, tmp_path / "new" / name, **more)
        return kept[-1], tmp_path / "new" / name

    return draw


def lines(ax, color, marker):
    """x of every line drawn so."""
    chosen = [line for line in ax.lines if (line.get_color(), line.get_marker()) == (color, marker)]
    return [[round(float(x), 6) for x in line.get_xdata()] for line in chosen]


def test_points_intervals_nulls_and_chance_are_where_they_belong(drawn):
    figure, path = drawn(long_frame(ROWS))
    (ax,) = figure.axes
    assert lines(ax, SCORE, "o") == [[0.5], [0.2]]
    assert lines(ax, SCORE, "None") == [[0.4, 0.6], [0.1, 0.3]]
    assert lines(ax, NULL, "D") == [[0.02], [0.01]]
    assert lines(ax, NULL, "None") == [[-0.03, 0.07], [-0.04, 0.06]]
    assert lines(ax, CHANCE, "None") == [[0.0, 0.0]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["topk (n=50)", "pca (n=48, 2 missing)", "ica (n=0)"]
    assert [text.get_text() for text in ax.texts] == ["unit failed"]
    assert ax.yaxis_inverted()
    assert ax.get_xlabel() == "M (higher is better)"
    caption = figure.get_supxlabel().replace("\u00a0", " ")
    assert "judge tiny" in caption
    assert "run r" in caption
    assert "95% intervals" in caption
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_nothing_is_cut_off(drawn):
    figure, _ = drawn(long_frame([{**row, "dictionary": f"{row['dictionary']} with a long name"} for row in ROWS]))
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


def test_a_panel_for_each_hook_point_in_order(drawn):
    figure, _ = drawn(long_frame([{**row, "hook_point": hook} for hook in ("h9", "h1") for row in ROWS[:2]]))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["h9", "h1"]


def test_the_main_metric_is_drawn_unless_another_is_named(drawn):
    frame = long_frame([{"metric": "side", "title": "Side", "main": False}, {"metric": "m", "title": "M", "better": "lower"}])
    assert drawn(frame)[0].axes[0].get_xlabel() == "M (lower is better)"
    assert drawn(frame, metric="side")[0].axes[0].get_xlabel() == "Side (higher is better)"
    assert drawn(frame[frame["metric"] == "side"])[0].axes[0].get_xlabel().startswith("Side")
    with pytest.raises(UsageError, match="no metric called 'sode'") as caught:
        drawn(frame, metric="sode")
    assert "did you mean 'side'?" in str(caught.value)


def test_wide_ranges_get_a_logarithmic_axis(drawn):
    wide = [{"dictionary": str(m), "mean": m, "low": 0.9 * m, "high": 1.1 * m} for m in (10.0, 5000.0)]
    assert drawn(long_frame(wide))[0].axes[0].get_xscale() == "log"
    assert drawn(long_frame(ROWS))[0].axes[0].get_xscale() == "linear"


def test_svg_and_refused_suffixes(drawn, tmp_path):
    _, path = drawn(long_frame(ROWS), "figure.svg")
    assert re.match(r"<\?xml", path.read_text())
    with pytest.raises(UsageError, match="'.jpeg'"):
        drawn(long_frame(ROWS), "figure.jpeg")
    with pytest.raises(UsageError, match="nothing to draw"):
        drawn(long_frame([]))


def test_no_global_state(drawn):
    before = dict(matplotlib.rcParams)
    drawn(long_frame(ROWS))
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []
