"""Every evaluation's rows are those that were recorded: a guard against changes nobody meant, not a proof that they are right.

A wanted change of rows is recorded by ``python tests/golden/record.py``; the difference of the files is then part of the review.
"""

from __future__ import annotations

import pytest
from golden_case import run_suites
from golden_tables import differences, load, read_tables, recorded

from evalkit.evaluations.base import EVALUATIONS

SHOWN = 12
"""Differences that the message of a table holds."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return read_tables(run_suites(tmp_path_factory.mktemp("golden")))


def test_every_evaluation_has_a_unit_that_is_done(tables):
    columns = tables["units"].columns
    evaluation, status = columns.index("evaluation"), columns.index("status")
    assert {row[evaluation] for row in tables["units"].rows if row[status] == "done"} == set(EVALUATIONS.names())


def test_every_table_is_recorded(tables):
    assert sorted(tables) == recorded()


@pytest.mark.parametrize("name", recorded())
def test_rows_are_the_recorded_ones(tables, name):
    found = list(differences(name, load(name), tables[name]))
    assert not found, "\n".join([f"{len(found)} rows of {name} differ", *found[:SHOWN]])
