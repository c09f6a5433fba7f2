"""Concepts by name as a picture, and steered replies side by side: what is shown is what the rows say."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from matplotlib.figure import Figure

from evalkit.cli import main
from evalkit.errors import UsageError
from evalkit.report.draw import draw_run
from evalkit.report.views import steering as replies
from evalkit.report.views.concepts import concepts_figure
from evalkit.report.views.steering import replies_text
from evalkit.report.views.steering import summary as steering
from evalkit.store.journal import Journal
from evalkit.store.reader import open_results
from evalkit.store.writer import rebuild

ARMS = [(arm, mode) for mode in ("clamp", "steer") for arm in ("feature", "random_feature")] + [("random_direction", "steer")]
HOOK, RUN = "blocks.4.hook_resid_post", "told-1"
AUROC = {"SAE": {"names": 0.7, "dates": 0.9}, "PCA": {"names": 0.6, "dates": 0.55}}
STATE = {"suite": "told", "evalkit_version": "0.1.0", "packages": "{}", "machine": "{}", "suite_toml": "", "at": "2026-03-01"}


def unit(key, evaluation, dictionary, config):
    return {
        "unit_key": key, "evaluation": evaluation, "evaluation_version": 2, "dictionary": dictionary, "dictionary_id": dictionary,
        "hook_point": HOOK, "seed": 0, "judge": None, "config": config, "status": "done", "error": None, "seconds": 1.0,
        "at": "2026-03-01T12:00:01",
    }  # fmt: skip


def told(values):
    """Rows of concept_features: the best and a better second place, the neuron, the probe and four draws by chance."""
    for concept, auroc in values.items():
        about = {"concept": concept, "texts": 24, "feature": 3, "sign": 1, "auroc_chosen": 0.95}
        yield {**about, "source": "feature", "place": 1, "auroc": auroc, "p": 0.001, "p_holm": 0.01 if auroc > 0.8 else 0.3}
        yield {**about, "source": "feature", "place": 2, "auroc": 0.99, "p": 0.001, "p_holm": 0.01}
        yield {**about, "source": "neuron", "place": 1, "auroc": 0.65, "p": 0.2, "p_holm": 0.9}
        yield {**about, "source": "probe", "place": 1, "auroc": 1.0, "p": 0.001, "p_holm": 0.01}
        for place, chance in enumerate((0.3, 0.4, 0.6, 0.7), start=1):
            yield {**about, "source": "null", "place": place, "auroc": chance, "p": 0.5, "p_holm": 1.0}


def texts():
    """Rows of steering_texts: one feature of a concept and one that was drawn, two strengths, greedy and sampled."""
    for concept, feature in (("places", 7), (None, 9)):
        about = {"feature": feature, "concept": concept, "words": ["Rome", "York"], "maximum": 2.5, "prompt": "Tell me about"}
        for draw in (0, 1):
            plain = {
                "mode": None,
                "strength": None,
                "arm": "none",
                "shift": None,
                "cost": 0.0,
                "named": False,
                "named_judge": 0.2 if concept else None,
                "distinct_tokens": 1.0,
            }
            yield {**about, **plain, "draw": draw, "text": " the weather.\nAgain"}
            for strength in (1.0, 2.0):
                for arm, mode in ARMS:
                    said = f" New York and rome, {feature} {mode} {strength:g}" if arm == "feature" else " Romeo" * 30
                    said = " New York twice" if feature == 9 and arm == "feature" else said
                    yield {
                        **about, "mode": mode, "strength": strength, "arm": arm, "draw": draw, "text": said,
                        "shift": (strength if arm == "feature" else 0.25) if draw == 0 else None, "cost": 0.5,
                        "named": arm == "feature", "distinct_tokens": 0.75,
                        "named_judge": (0.5 if arm == "feature" else 0.49) if concept and (draw, mode) != (1, "steer") else None,
                    }  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    journal = Journal(folder / "runs" / RUN)
    journal.write_rows("runs", [{**STATE, "status": "started"}])
    metric = {"evaluation": "concepts", "evaluation_version": 2, "metric": "auroc", "position": 0, "title": "AUROC", "main": True,
              "better": "higher", "has_interval": True, "digits": 3, "null_metric": "", "transform": "", "note": ""}  # fmt: skip
    journal.write_rows("metrics", [metric])
    score = {"metric": "auroc", "kind": "concept", "weight": 1.0, "cluster": None, "n": 48, "seed": 0, "status": "ok"}
    for name, values in AUROC.items():
        rows = [{**score, "item": item, "value": value} for item, value in enumerate(values.values())]
        journal.write_unit(unit(f"c-{name}", "concepts", name, "{}"), rows, {"concept_features": list(told(values))})
    rows = list(texts())
    for judge in (True, False):
        own = {"steering_texts": [row for row in rows if bool(row["concept"]) == judge]}
        config = json.dumps({"reported": 2.0, "judge": judge})
        journal.write_unit(unit(f"s{judge}", "steering", "SAE", config), [], own)
    journal.write_rows("runs", [{**STATE, "status": "done"}])
    rebuild(folder, folder / "evalkit.duckdb")
    return folder / "evalkit.duckdb"


@pytest.fixture(scope="module")
def store(home):
    with open_results(home) as store:
        yield store


def test_the_picture_has_the_best_feature_by_name(store, tmp_path, monkeypatch):
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (kept.append(self), save(self, *args, **more))[1])
    drawn = draw_run(store, "concepts", RUN, tmp_path)
    assert [path.name for path in drawn] == [f"{RUN}-concepts.png", f"{RUN}-by-concept.png"]
    (ax,) = kept[-1].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dates", "names", "mean"]  # the first dictionary's order
    marks = {(line.get_marker(), round(line.get_ydata()[0])): line for line in ax.lines if line.get_marker() not in ("None", "|")}
    assert [marks["o", y].get_xdata()[0] for y in range(3)] == pytest.approx([0.9, 0.7, 0.8])
    assert [marks["D", y].get_xdata()[0] for y in range(3)] == pytest.approx([0.55, 0.6, 0.575])
    assert [marks["s", y].get_xdata()[0] for y in range(3)] == pytest.approx([0.65] * 3)
    hollow = {key for key, line in marks.items() if line.get_markerfacecolor() == "white"}
    assert hollow == {("o", 1), ("D", 0), ("D", 1), ("s", 0), ("s", 1)}  # 0.9 alone is significant; means are not tested
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
    assert len(bands) == 3 and all(low == pytest.approx(1 - high) and 0.3 <= low < 0.4 for low, high in bands)
    assert max(line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2) == 1.0  # the probe


def test_the_surface_has_a_cross_where_it_was_measured(store, tmp_path, monkeypatch):
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (kept.append(self), save(self, *args, **more))[1])
    frame = store.rows("concept_features", "concepts")
    probe = frame[frame["source"] == "probe"]
    for rows, crosses in ((frame, []), (pd.concat([frame, probe.assign(source="surface", auroc=0.7)]), [0.7] * 3)):
        concepts_figure(rows, tmp_path / "surface.png")
        (ax,) = kept[-1].axes
        assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "x"] == pytest.approx(crosses)
        assert [text.get_text() for text in kept[-1].legends[0].get_texts()].count("surface") == bool(crosses)


def test_several_hook_points_and_formats(store, tmp_path):
    frame = store.rows("concept_features", "concepts")
    two = pd.concat([frame, frame.assign(hook_point="blocks.9.hook_resid_post")])
    for suffix in ("png", "svg", "pdf"):
        concepts_figure(two, tmp_path / f"two.{suffix}")
        assert (tmp_path / f"two.{suffix}").stat().st_size > 2000


def test_what_cannot_be_drawn_is_said(store, tmp_path):
    frame = store.rows("concept_features", "concepts")
    for wrong, path, words in (
        (frame, "x.gif", "cannot be written as"), (frame.iloc[:0], "x.png", "nothing to draw"),
        (store.table("concepts"), "x.png", "not features of concepts"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            concepts_figure(wrong, tmp_path / path)


def test_replies_stand_side_by_side_with_their_numbers(store):
    text = replies_text(store)
    assert "places: feature 7 of SAE" in text and "\nfeature 9 of SAE" in text
    measured = ["2.00", "(0.25)", "1.00", "(0.00)", "0.50", "(0.50)", "0.75", "(0.75)"]
    judged, plain = (line.split()[3:] for line in text.splitlines() if line.startswith("  clamp 2 times"))
    assert judged == [*measured[:4], "1.00", "(0.00)", *measured[4:]] and plain == measured
    assert text.count("6 of 22 texts have no rating") == 1
    assert "unchanged" in text and "the weather.\u21b5Again" in text
    assert "New \u00bbYork\u00ab and \u00bbrome\u00ab, 7 clamp 2" in text and "\u00bbRome\u00abo" not in text  # whole words
    assert "7 clamp 1" not in text  # the reported strength alone
    assert text.count("New \u00bbYork\u00ab twice") == 1 and text.count("(as clamped)") == 3  # 9, and both other features
    assert max(map(len, text.splitlines())) <= 140


def test_one_concept_feature_or_dictionary_in_full(store, home, capsys):
    whole = replies_text(store, "places")
    assert "7 clamp 1" in whole and "7 clamp 2" in whole and "feature 9" not in whole
    assert "feature 9" in replies_text(store, "9") and "feature 7" in replies_text(store, "SAE")
    with pytest.raises(UsageError, match="nothing called 'place' was steered"):
        replies_text(store, "place")
    assert main(["show", "steering", "places", "--results", str(home)]) == 0
    assert capsys.readouterr().out.strip() == whole.strip()
    assert main(["show", "steering", "--run", "nowhere", "--results", str(home)]) == 2


def test_words_that_no_text_is_looked_through_for_are_said_to_be_none(store, monkeypatch):
    """Words stand there whatever their length: that none of them counts is told from texts that were not looked through."""
    rows = replies.steered(store)
    part = rows[rows["feature"] == 7]
    assert replies.UNNAMED not in replies_text(store, "places") and steering(part).unnamed == ""
    # replaced at the source of both, the rows
    monkeypatch.setattr(replies, "steered", lambda *_: rows.assign(named=None, words=[["7", ","]] * len(rows)))
    nameless = replies.steered(store)
    assert f"its words: 7, , ({replies.UNNAMED})" in replies_text(store, "places")
    assert steering(nameless[nameless["feature"] == 7]).unnamed == replies.UNNAMED
    assert steering(nameless[nameless["feature"] == 7].assign(words=[[]] * len(part))).unnamed == ""
    monkeypatch.setattr(replies, "steered", lambda *_: rows.iloc[:0])
    with pytest.raises(UsageError, match="no replies were written"):
        replies_text(store)
