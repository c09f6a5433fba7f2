"""The packaged judge itself: does it explain and simulate a feature anyone would recognise?"""

from __future__ import annotations

from pathlib import Path

import pytest

from evalkit.judges.base import JUDGES, Example, ExplainTask, RateTask, SimulateTask
from evalkit.judges.config import JudgeConfig
from evalkit.util.progress import Progress

FRAGMENTS = [
    ["In", " 1848", " there", " was", " a", " revolution", " in", " the", " city"],
    ["He", " wrote", " two", " books", " before", " 1921", " and", " one", " later"],
    [" nobody", " knew", " of", " it", " until", " 1902", ",", " he", " said"],
]


def is_year(token: str) -> bool:
    return token.strip().isdigit()


@pytest.mark.assets
@pytest.mark.timeout(900)
def test_the_packaged_judge_recognises_years(tmp_path: Path) -> None:
    with JUDGES.get("local")(JudgeConfig(), tmp_path, Progress(quiet=True)) as judge:
        examples = [Example(tokens, [6.0 if is_year(token) else 0.0 for token in tokens]) for tokens in FRAGMENTS]
        (said,) = judge.explain([ExplainTask(examples)])
        assert said.text is not None
        assert any(word in said.text.lower() for word in ("year", "date", "number"))
        answers = judge.simulate([SimulateTask("years", tokens) for tokens in FRAGMENTS])
        assert judge.identity["simulation"] == "slots"
        fires = [[is_year(token) for token in tokens] for tokens in FRAGMENTS]
        graded = {
            concept: [one.grade for one in judge.rate([RateTask(concept, *task) for task in zip(FRAGMENTS, fires, strict=True)])]
            for concept in ("years", "names of animals")
        }
    assert all(grade is not None and 0 <= grade <= 3 for grades in graded.values() for grade in grades)
    assert sum(graded["years"]) > sum(graded["names of animals"]) + 0.3
    years, others = [], []
    for tokens, answer in zip(FRAGMENTS, answers, strict=True):
        assert answer.expected is not None
        assert answer.mass is not None
        assert min(answer.mass) > 0
        for token, level in zip(tokens, answer.expected, strict=True):
            (years if is_year(token) else others).append(level)
    assert min(years) > sum(others) / len(others)
    assert sum(years) / len(years) > 1.5 * sum(others) / len(others)
