"""Two runs into one results folder at once: both finish, with the numbers each has alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import tables
from suite_case import tiny_suite
from warm import STORE, Warm, said

import evalkit
from evalkit.report.tables import paper_table
from evalkit.store.writer import rebuild


def of_run(folder: Path, suite: str) -> str:
    """The tables of the latest run of ``suite``."""
    with evalkit.open_results(folder / STORE) as results:
        run = results.run_id(suite)
        return "\n".join(paper_table(results.table(name, run)).replace(run, "RUN") for name in results.evaluations(run))


@pytest.mark.timeout(600)
def test_both_finish_with_the_numbers_each_has_alone(warm: Warm, tmp_path: Path) -> None:
    one = tiny_suite(tmp_path / "case")
    two = one.with_name("two.toml")
    two.write_text(one.read_text().replace('name = "tiny"', 'name = "two"').replace("null_fragments = 1", "null_fragments = 2"))
    for suite in (one, two):
        assert warm.run(suite, tmp_path / "alone") == 0, said(tmp_path / "alone")
    expected = {name: of_run(tmp_path / "alone", name) for name in ("tiny", "two")}
    suites = {"tiny": one, "two": two}
    # both capture, fit and publish the same folders; the last pair writes into one journal, too
    for number, names in enumerate([("tiny", "two"), ("two", "tiny"), ("tiny", "tiny")]):
        folder = tmp_path / f"together-{number}"
        children = [warm.start(suites[name], folder, meet=letter) for name, letter in zip(names, "ab", strict=True)]
        assert [warm.wait(child) for child in children] == [0, 0], said(folder)
        met = {path.name for path in (tmp_path / f"{folder.name}.meeting").iterdir()}
        assert {"a-1", "b-1", "a-2", "b-2"} <= met  # each came to its renames while the other was at work
        for name in names:
            assert of_run(folder, name) == expected[name]
        assert not [path for path in folder.rglob(".*")]
        before = tables(folder)
        rebuild(folder, folder / STORE)
        assert tables(folder) == before
