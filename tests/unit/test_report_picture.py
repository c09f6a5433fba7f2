"""Letters, names and files of figures: no library has anything to complain about."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.figure import Figure
from test_report_tables import long_frame

from evalkit.errors import UsageError
from evalkit.report import picture
from evalkit.report.figures import score_figure
from evalkit.report.picture import caption, named, plain, save

NAMES = [
    "日本語の辞書", "a$b_c$d^{2}", "_hidden", "[h] x", "\u202eabc", "\x1b[31mred", "a\nb", "🙂🙂", "x" * 400, "many words " * 40,
    "\\frac{", "", "שלום عربى",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_anywhere_is_drawn_without_a_warning(name, tmp_path):
    """Warnings are errors in these tests: a missing glyph, a layout that finds no room, a label left out of the key."""
    rows = [{"dictionary": f"{name}{i}", "hook_point": f"{name}{h}", "title": name, "judge": name, "config": name, "run": name,
             "null_mean": 0.1, "null_metric": name or "z"} for i in (1, 2) for h in (1, 2)]  # fmt: skip
    for suffix in ("png", "svg"):
        score_figure(long_frame(rows), tmp_path / f"a.{suffix}")
        assert (tmp_path / f"a.{suffix}").stat().st_size > 1000


def test_letters_that_no_font_has_are_boxes_and_nothing_is_mathematics():
    assert plain("naïve ✓ \x1b \ue123") == "naïve ✓ □ □"
    assert plain("a$b$\nc") == "a\\$b\\$\nc"


def test_an_installed_font_for_other_letters_is_used(monkeypatch, tmp_path):
    other = picture.FT2Font(picture.findfont("STIXGeneral")).get_charmap()  # comes with matplotlib too
    odd = next(chr(c) for c in other if chr(c).isprintable() and plain(chr(c)) == "□")
    caches = (picture._further, picture._letters)
    monkeypatch.setattr(picture, "FURTHER", ("No Such Font", "STIXGeneral"))
    for cache in caches:
        cache.cache_clear()
    try:
        assert plain(odd) == odd
        figure = Figure()
        figure.text(0.5, 0.5, plain(odd))
        save(figure, tmp_path / "a.png")
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
    assert plain(odd) == "□" and matplotlib.rcParams["font.family"] == ["sans-serif"]


def test_names_fit_and_keep_both_ends():
    long = "topk features=2304 " + "x" * 200 + " k=32"
    lines = named(long, 26).splitlines()
    assert len(lines) <= 2 and max(map(len, lines)) <= 26
    assert lines[0].startswith("topk") and lines[-1].endswith("k=32") and "…" in "".join(lines)
    assert named("short", 26) == "short"


def test_captions_break_between_facts():
    assert caption(["one two", "", "three four"], 12).replace("\xa0", " ") == "one two;\nthree four"
    assert max(map(len, caption(["y" * 300], 72).splitlines())) <= 72


def test_intervals_that_are_withheld_are_said(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("evalkit.report.figures.save", lambda figure, _: kept.append(figure))
    nan = float("nan")
    few = {"low": nan, "high": nan, "no_interval": "fewer than 6 independent groups"}
    for rows in ([{}, few], [few, few]):
        score_figure(long_frame([{"dictionary": str(i), **row} for i, row in enumerate(rows)]), tmp_path / "a.png")
    mixed, none = (" ".join(figure.get_supxlabel().replace("\xa0", " ").split()) for figure in kept)
    assert "95% intervals, none where there are fewer than 6 independent groups" in mixed
    assert "no intervals: fewer than 6 independent groups" in none and "95%" not in none
    assert [len(figure.axes[0].lines) for figure in kept] == [3, 2]  # two means, one interval


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the figure cannot be written"):
        score_figure(long_frame([{}]), tmp_path / "file" / "a.png")
