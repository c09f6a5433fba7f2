"""The density figure: every bar is where, and as high as, the densities say."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from evalkit.errors import UsageError
from evalkit.report.views.geometry import BIN, density_figure


def densities(dictionary, values, **more):
    """Rows of ``Results.features`` for one dictionary."""
    usual = {
        "run": "r", "evaluation": "geometry", "metric": "density", "dictionary": dictionary, "hook_point": "h", "config": "{}",
        "feature": range(len(values)), "value": values, "status": "ok", "n": 10_000, "seed": 0,
    }  # fmt: skip
    return pd.DataFrame({**usual, **more})


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws and returns the figure as well as its file."""
    kept = []
    save = Figure.savefig

    def keep(self, *args, **more):
        kept.append(self)
        return save(self, *args, **more)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(frame, name="density.png"):
        density_figure(frame, tmp_path / "new" / name)
        return kept[-1], tmp_path / "new" / name

    return draw


def bars(ax, hollow=False):
    """(left edge, height) of the bars that are not empty."""
    chosen = [bar for bar in ax.patches if bool(bar.get_hatch()) is hollow and bar.get_height() > 0]
    return [(round(bar.get_x(), 6), pytest.approx(bar.get_height())) for bar in chosen]


def words(ax):
    return ax.get_title(loc="left"), ax.get_title(loc="right")


def test_bars_stand_where_the_densities_are(drawn):
    # exact decades belong to the bin they begin, and 1 to the last one
    values = [1e-3, 1e-3, 0.0, 0.0, 0.0, 0.1, 1.0, 10**-2.5]
    figure, path = drawn(densities("topk", values))
    (ax,) = figure.axes
    assert bars(ax) == [(-3.0, 2 / 8), (-2.6, 1 / 8), (-1.0, 1 / 8), (-BIN, 1 / 8)]
    ((left, height),) = bars(ax, hollow=True)
    assert height == 3 / 8
    assert left < -3.0
    assert words(ax) == ("topk", "8 features, 38% never fire")
    figure.draw_without_rendering()
    assert [label.get_text().replace("\u2212", "-") for label in ax.get_xticklabels()] == ["never", "-3", "-2", "-1", "0"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["38%"]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["density.png"]


def test_every_feature_is_in_one_bar(drawn):
    values = np.round(10 ** np.random.default_rng(0).uniform(-4, 0, 500) * 10_000) / 10_000
    values[:50] = 0
    figure, _ = drawn(densities("d", values))
    (ax,) = figure.axes
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(1)


def test_one_token_is_the_dotted_line(drawn):
    figure, _ = drawn(densities("d", [1e-4, 0.5], n=10_000))
    (line,) = figure.axes[0].lines
    assert line.get_xdata()[0] == pytest.approx(-4)
    assert "dotted" in figure.get_supxlabel()
    figure, _ = drawn(densities("d", [0.5, 0.6]))  # far off to the left
    assert not figure.axes[0].lines
    assert "dotted" not in figure.get_supxlabel()


def test_a_panel_for_each_dictionary_and_hook_point_in_order(drawn):
    frames = [densities(name, [0.1, 0.2], hook_point=hook) for hook in ("h9", "h1") for name in ("sae", "pca")]
    figure, _ = drawn(pd.concat(frames))
    assert [words(ax)[0] for ax in figure.axes] == ["h9\nsae", "pca", "h1\nsae", "pca"]
    figure, _ = drawn(pd.concat(frames[:2]))
    assert [words(ax)[0] for ax in figure.axes] == ["sae", "pca"]
    assert "h9" in figure.get_supxlabel()


def test_several_configurations_are_drawn_once(drawn):
    figure, _ = drawn(pd.concat([densities("d", [0.1, 0.2, 0.0], config=config) for config in ("{}", '{"against": "x"}')]))
    (ax,) = figure.axes
    assert words(ax) == ("d", "3 features, 33% never fire")


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [1e-7, 1.0]])
@pytest.mark.parametrize(
    "name", ["d", "a very long name of a dictionary with its architecture, its width and its sparsity, seed 0"]
)
def test_nothing_is_cut_off_in_extreme_cases(drawn, values, name):
    figure, _ = drawn(densities(name, values, n=10**7))
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01
    title, facts = (text.get_window_extent() for text in (figure.axes[0]._left_title, figure.axes[0]._right_title))
    labels = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in zip(labels, labels[1:], strict=False))
    assert name != "d" or title.x1 < facts.x0


def test_what_cannot_be_drawn_is_refused(drawn, tmp_path):
    with pytest.raises(UsageError, match="'.jpeg'"):
        drawn(densities("d", [0.1]), "density.jpeg")
    with pytest.raises(UsageError, match="nothing to draw"):
        drawn(densities("d", []))
    with pytest.raises(UsageError, match="not densities"):
        drawn(densities("d", [0.1, 1.5]))
    with pytest.raises(UsageError, match="not densities"):
        drawn(densities("d", [0.1]).drop(columns="n"))
    assert not list(tmp_path.rglob("*.*"))


def test_svg_and_no_global_state(drawn):
    before = dict(matplotlib.rcParams)
    _, path = drawn(densities("d", [0.1]), "density.svg")
    assert path.read_text().startswith("<?xml")
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []
