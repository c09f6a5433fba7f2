"""Progress: lines where there is no terminal, bars where there is one, nothing when quiet."""

import pytest

from evalkit.util import progress as module
from evalkit.util.progress import Progress, clock


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3725, "1 h 02 min"), (-3, "0 s")])
def test_clock(seconds, said):
    assert clock(seconds) == said


def test_lines_name_the_stage_the_count_and_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress(terminal=False).stage("training", total=100, unit="steps") as stage:
        for _ in range(4):
            now[0] += 15
            stage.advance(25, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training ..."
    assert lines[1] == "training: 25/100 steps, loss 0.5, 45 s left"
    assert lines[-1] == "training: done in 1 min 00 s, 100 steps, loss 0.5"


def test_what_an_earlier_start_did_says_nothing_about_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Progress(terminal=False).stage("training", total=100) as stage:
        stage.go_on(80)
        assert stage.remaining is None
        now[0] += 15
        stage.advance(5)
    assert capsys.readouterr().err.splitlines()[1] == "training: 85/100 steps, 45 s left"
    bars = Progress(terminal=True)
    with bars.stage("bars", total=100) as stage:
        stage.go_on(80)
        assert bars._bars is not None and bars._bars.tasks[0].completed == 80
        now[0] += 15
        stage.advance(5)
        assert stage.remaining == 45


def test_lines_are_throttled(capsys, monkeypatch):
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    with Progress(terminal=False).stage("fast", total=1000) as stage:
        for _ in range(1000):
            stage.advance()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_quiet_says_nothing(capsys):
    quiet = Progress(quiet=True)
    with quiet.stage("training", total=2) as stage:
        stage.advance(2)
    quiet.say("news")
    assert capsys.readouterr() == ("", "")


def test_bars_name_the_stage_and_end_with_a_line(capsys):
    bars = Progress(terminal=True)
    with bars.stage("outer", total=2) as outer:
        with bars.stage("inner", total=4, unit="tokens") as inner:
            inner.advance(4)
        outer.advance(2)
    said = capsys.readouterr().err
    assert "inner: done in 0 s, 4 tokens" in said
    assert "outer: done in 0 s, 2 steps" in said


@pytest.mark.parametrize("columns", [70, 80, 109, 110, 160])
def test_where_the_terminal_is_narrow_the_words_give_way_and_no_number(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    bars = Progress(terminal=True)
    with bars.stage("training 8 SAEs", total=60416, unit="tokens") as stage:
        shown = bars._bars
        assert shown is not None
        for words, fits in (("FVU 0.25", True), ("FVU 0.25, " * 30, False)):
            stage.advance(12345, words)
            with shown.console.capture() as captured:
                shown.console.print(shown.get_renderable())
            (line,) = captured.get().splitlines()
            assert len(line) <= columns
            assert f"{stage.done:.0f}/60416" in line and "left" in line and "training 8 SAEs" in line
            assert (words in line) == fits
            assert ("tokens" in line) == (columns >= 110)


def test_an_error_inside_a_stage_leaves_the_terminal_in_order(capsys):
    bars = Progress(terminal=True)
    with pytest.raises(RuntimeError), bars.stage("broken", total=2):
        raise RuntimeError
    assert bars._bars is None
    with bars.stage("next", total=1) as stage:
        stage.advance()
    assert "next: done" in capsys.readouterr().err
