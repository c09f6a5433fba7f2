"""Views: the report names no evaluation, and one from outside the package gets its figure and its card on the page."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from suite_case import tiny_suite

from evalkit import report
from evalkit.errors import UsageError
from evalkit.evaluations.base import EVALUATIONS
from evalkit.report.draw import draw_run
from evalkit.report.page.write import page
from evalkit.report.views.base import VIEWS, showing
from evalkit.runs.run import run
from evalkit.store.reader import open_results
from evalkit.util.progress import Progress

TOGETHER = {"stories", "training"}
"""Views of several evaluations, and of none."""
PLUGIN = '''
"""Peaks: the largest activation of single features."""

from dataclasses import dataclass

from evalkit.evaluations.base import EVALUATIONS, Evaluation, Metric, Result, Score
from evalkit.report.html import filled
from evalkit.report.views.base import VIEWS, Block, Card, RunFigure, View


@dataclass(frozen=True)
class PeaksConfig:
    features: int = 3
    """The first of the dictionary."""


@EVALUATIONS.register("peaks")
class Peaks(Evaluation):
    """Largest activation of each feature on the held-out text."""

    name = "peaks"
    version = 1
    config = PeaksConfig
    metrics = {"peak": Metric("peak", "neither", main=True, note="Largest activation on the held-out text.")}

    def run(self, bench, dictionary, config):
        text = bench.score()
        acts = dictionary.encode(text.x[text.keep])
        return Result([Score("peak", float(acts[:, i].max()), i, "feature") for i in range(config.features)], {})


@VIEWS.register("peaks")
class PeaksView(View):
    """The scores, the same as a text file, and a line in the card of a feature."""

    lists_scores = True

    def figures(self):
        yield from super().figures()
        yield RunFigure(lambda path: self.draw(path, "peak"), "again", "drawn again")

    def feature_rows(self):
        return {"peaks": self.results.features(self.evaluation, "peak", self.run)}

    def feature_card(self, feature):
        if "peaks" not in feature.rows:
            return None
        peak = float(feature.rows["peaks"]["value"].iloc[0])
        block = Block(filled("<h4>Peaks at {}</h4>", f"{peak:.2f}"))
        return Card([("peak", f"<{peak:.2f}>")], filled("peaks at {}", f"{peak:.2f}"), ["summit"], [block])
'''


def test_the_report_names_no_evaluation():
    home = Path(report.__file__).parent
    names = re.compile(rf"\b({'|'.join(EVALUATIONS.names())})\b")
    named = [
        f"{path.relative_to(home)}:{number}: {line.strip()}"
        for path in [*home.rglob("*.py"), *home.rglob("*.html"), *home.rglob("*.js"), *home.rglob("*.css")]
        if path.relative_to(home).parts[0] not in ("views", "case_studies")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if names.search(line)
    ]
    assert named == []


def test_every_view_is_of_an_evaluation():
    assert set(VIEWS.names()) - TOGETHER <= set(EVALUATIONS.names())
    assert showing("feature") == "inputs" and showing("steering") == "steering"
    with pytest.raises(UsageError, match="'featur' cannot be shown") as caught:
        showing("featur")
    assert "did you mean 'feature'?" in caught.value.fix


def test_an_evaluation_of_ones_own_has_its_figure_and_its_card(tmp_path, monkeypatch):
    assert len(PLUGIN.strip().splitlines()) < 60
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (EVALUATIONS, VIEWS):
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    monkeypatch.delitem(sys.modules, "own_peaks", raising=False)
    (tmp_path / "own_peaks.py").write_text(PLUGIN)
    importlib.import_module("own_peaks")
    suite = tiny_suite(tmp_path / "suite", extra='[[evaluation]]\nname = "peaks"\n')
    results = tmp_path / "results.duckdb"
    assert run(suite, results, only="peaks", progress=Progress(quiet=True)).exit_code == 0
    with open_results(results) as store:
        name = store.run_id()
        drawn = draw_run(store, "peaks", name, tmp_path)
        assert [path.name for path in drawn] == [f"{name}-peaks.png", f"{name}-again.png"]
        html = page(store, name, features=4)
    assert ">peaks</figcaption>" in html and ">peaks: drawn again</figcaption>" in html
    assert "4 of 6 features of this run are shown" in html  # three of each dictionary
    assert len(re.findall(r"<h4>Peaks at \d+\.\d\d</h4>", html)) == 4 and "<dt>peak</dt><dd><bdi>&lt;" in html
    assert html.count('<span class="hint">peaks at ') == 4 and html.count("summit") == 4
    assert html.count('<tr><td>peaks</td><th scope="row">peak</th>') == 4
