"""The patching figure: lines, floors and the reference are where the curves say."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from evalkit.errors import UsageError
from evalkit.report.views.ioi import patching_figure


def curves(dictionary, kl, sizes=(0, 1, 4, 16), **more):
    """Rows of ``Results.rows`` for one dictionary; ``kl`` is (sizes, prompts)."""
    kl = np.asarray(kl, dtype=float)
    rows = [
        {
            "run": "r", "evaluation": "ioi", "dictionary": dictionary, "hook_point": "h", "config": "{}", "ranking": "acdc-fast",
            "seed": 0, "threshold": np.nan, "size": size, "prompt": prompt, "kl": kl[s, prompt], "edit": 0.5 * s + prompt, **more,
        }
        for s, size in enumerate(sizes)
        for prompt in range(kl.shape[1])
    ]  # fmt: skip
    return pd.DataFrame(rows)


FALLING = [[4.0, 2.0], [3.0, 1.0], [1.0, 1.0], [0.5, 0.1]]
FLAT = [[4.0, 2.0], [4.0, 2.0], [3.0, 2.0], [2.0, 1.0]]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws and returns the figure as well as its file."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (kept.append(self), save(self, *args, **more))[1])

    def draw(frame, name="patching.png", **more):
        patching_figure(frame, tmp_path / "new" / name, **more)
        return kept[-1], tmp_path / "new" / name

    return draw


def lines(ax):
    """Lines with more than one point that are neither floors nor references, as lists of points."""
    return [line.get_xydata().tolist() for line in ax.lines if line.get_linestyle() != ":" and len(line.get_xydata()) > 2]


def test_both_panels_show_the_mean_over_prompts(drawn):
    figure, path = drawn(pd.concat([curves("SAE", FALLING), curves("PCA", FLAT)]))
    left, right = figure.axes
    assert lines(left) == [[[1, 2.0], [4, 1.0], [16, pytest.approx(0.3)]], [[1, 3.0], [4, 2.5], [16, 1.5]]]
    assert lines(right)[0] == [[0.5, 3.0], [1.0, 2.0], [1.5, 1.0], [2.0, pytest.approx(0.3)]]
    assert left.get_xscale() == "log" and right.get_xscale() == "linear"
    assert path.stat().st_size > 10_000


def test_the_unpatched_kl_and_the_floors_are_lines(drawn):
    figure, _ = drawn(pd.concat([curves("SAE", FALLING), curves("PCA", FLAT)]))
    for ax in figure.axes:
        floors = [line.get_ydata() for line in ax.lines if line.get_linestyle() == ":"]
        assert [list(floor) for floor in floors] == [[pytest.approx(0.3)] * 2, [1.5, 1.5]]
        (reference,) = [line for line in ax.lines if list(line.get_xdata()) == [0, 1]]
        assert list(reference.get_ydata()) == [3.0, 3.0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["SAE", "PCA", "unpatched", "all patched"]


def test_without_the_error_term_the_reference_is_the_models_own_or_none(drawn):
    def references(figure):
        return [list(line.get_ydata()) for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]

    removed = curves("SAE", FALLING, config='{"keep_error": false}')
    figure, _ = drawn(removed, unpatched={("h", '{"keep_error": false}'): 5.0, ("later", "{}"): 6.0})
    assert references(figure) == [[5.0, 5.0]] and figure.axes[0].get_ylim()[1] > 5
    assert references(drawn(removed)[0]) == []
    assert references(drawn(curves("SAE", FALLING, config='{"keep_error": true}'))[0]) == [[3.0, 3.0]]


def test_the_band_holds_the_share_left_not_the_spread_of_the_prompts(drawn):
    # all prompts keep half of very different KLs: the share is certain
    figure, _ = drawn(curves("SAE", [[8.0, 2.0] * 3, [4.0, 1.0] * 3, [4.0, 1.0] * 3, [0.0, 0.0] * 3]))
    assert "band: 95% interval" in figure._supxlabel.get_text().replace("\u00a0", " ")
    (band,) = figure.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert set(np.round(heights, 9)) == {2.5, 0.0}


def test_few_prompts_have_no_band(drawn):
    figure, _ = drawn(curves("SAE", [[8.0, 2.0], [4.0, 1.0], [4.0, 1.0], [0.0, 0.0]]))
    (band,) = [*figure.axes[0].collections] or [None]
    assert band is None or not len(band.get_paths()) or np.isnan(band.get_paths()[0].vertices[:, 1]).all()
    assert "no band: fewer than 6 independent groups" in figure._supxlabel.get_text().replace("\u00a0", " ")


def test_one_row_for_each_hook_point_and_accepted_sets_are_left_out(drawn):
    frame = pd.concat(
        [curves("SAE", FALLING), curves("SAE", [row[:1] for row in FLAT], hook_point="later"), curves("SAE", FLAT, threshold=0.1)]
    )
    figure, _ = drawn(frame)
    assert len(figure.axes) == 4
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["h, 2 prompts", "", "later, 1 prompt", ""]
    assert "mean\u00a0over\u00a0prompts" in figure._supxlabel.get_text()
    assert lines(figure.axes[0]) == [[[1, 2.0], [4, 1.0], [16, pytest.approx(0.3)]]]


def test_the_first_ordering_is_drawn_unless_another_is_named(drawn):
    by_chance = [curves("SAE", FLAT, ranking="random", seed=seed) for seed in (0, 1)]
    frame = pd.concat([curves("SAE", FALLING), *by_chance])
    figure, _ = drawn(frame)
    assert lines(figure.axes[0])[0][0] == [1, 2.0]
    figure, _ = drawn(frame, ranking="random")
    assert lines(figure.axes[0])[0][0] == [1, 3.0] and "random,\u00a02\u00a0seeds" in figure._supxlabel.get_text()
    with pytest.raises(UsageError, match="'acdc'"):
        drawn(frame, ranking="acdc")


def test_a_dictionary_without_candidates_keeps_its_place(drawn):
    figure, _ = drawn(pd.concat([curves("mean", [[4.0, 2.0]], sizes=(0,)), curves("SAE", FALLING)]))
    assert len(lines(figure.axes[0])) == 1 and len(figure.legends[0].get_texts()) == 4


def test_wrong_input_is_one_message_and_no_file(drawn, tmp_path):
    with pytest.raises(UsageError, match="nothing to draw"):
        drawn(curves("SAE", FALLING).iloc[:0])
    with pytest.raises(UsageError, match="not patching curves"):
        drawn(curves("SAE", FALLING).drop(columns="edit"))
    with pytest.raises(UsageError, match=r"'\.gif'"):
        drawn(curves("SAE", FALLING), "figure.gif")
    assert not (tmp_path / "new").exists()


def test_matplotlibs_state_is_left_alone_and_vectors_can_be_written(drawn):
    before = dict(plt.rcParams)
    _, path = drawn(curves("SAE", FALLING), "figure.svg")
    assert "<svg" in path.read_text() and dict(plt.rcParams) == before and not plt.get_fignums()
