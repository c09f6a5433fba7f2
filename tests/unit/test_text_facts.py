"""What text was read is in the results, and a dictionary made on text that was read otherwise has a note."""

from __future__ import annotations

import json

import pytest
from store_case import HOOK, RUN, write_run

from evalkit.report.run_facts import run_facts
from evalkit.report.tables import paper_table
from evalkit.store.reader import open_results
from evalkit.store.writer import rebuild
from evalkit.text_facts import disagreement, made_with

ROW = {
    "side": "score", "hook_point": HOOK, "bos": "", "context": 128, "asked": 60_000, "tokens": 59_904, "documents": 48,
    "too_short": 3, "kept": 58_900, "left_bos": 0, "left_first": 936, "left_massive": 68,
    "norm_limit": 240.0, "norm_median": 120.0, "massive_variance": 0.21, "high_variance": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "bos", "said"),
    [
        ({"prepend_bos": True}, "", "A was made on text that was read behind a BOS, here without one ([corpus] bos)."),
        ({"prepend_bos": False}, "<s>", "A was made on text that was read without a BOS, here with '<s>' ([corpus] bos)."),
        ({"prepend_bos": True, "context_size": 128}, "<s>", ""),
        ({"prepend_bos": None, "context_size": None}, "", ""),
        ({}, "", ""),
    ],
)
def test_what_a_file_says_is_held_against_what_was_read(file, bos, said):
    assert disagreement("A", file, bos, 128) == said


def test_another_context_is_said_too():
    assert "in windows of 64, here of 128 ([corpus] context)" in disagreement("A", {"context_size": 64}, "", 128)
    assert made_with({"made_with": {"prepend_bos": True}}) == {"prepend_bos": True} and made_with({"made_with": "x"}) == {}


def test_the_table_and_the_page_say_it(tmp_path):
    journal = write_run(tmp_path)
    about = {"kind": "topk", "hook_point": HOOK, "model": "tiny", "d_in": 4, "n_features": 8}
    journal.write_rows("dictionaries", [
        {**about, "dictionary_id": "id-topk", "details": json.dumps({"made_with": {"prepend_bos": True}})}
    ])  # fmt: skip
    for _ in range(2):  # a run that was gone on with says it again
        journal.write_rows("texts", [ROW, {**ROW, "side": "fit", "left_massive": 12, "high_variance": 0.3}])
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    with open_results(tmp_path / "evalkit.duckdb") as results:
        table = paper_table(results.table("reconstruction"))
        assert table.count("topk was made on text that was read behind a BOS, here without one") == 1
        limit = f"Massive positions at {HOOK}: norm above 240, 2.0 times the median of the scoring text; 68 of 58,968, with 21.0%"
        assert table.count(limit) == 1 and table.count("have 30% of the kept variance of the fitting text") == 1
        sheet = run_facts(results, RUN).texts
    assert sheet is not None
    cells = {column.heading: [cell.text for cell in column.cells] for column in sheet.columns}
    assert cells["text"] == ["fitting text", "scoring text"] and cells["begins with"] == ["-", "-"]
    assert cells["tokens asked for"] == ["60,000"] * 2 and cells["tokens"] == ["59,904"] * 2
    assert cells["too short"] == ["3", "3"] and cells["massive"] == ["12", "68"] and cells["first"] == ["936", "936"]


def test_a_run_without_such_rows_has_none(tmp_path):
    write_run(tmp_path)
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    with open_results(tmp_path / "evalkit.duckdb") as results:
        assert run_facts(results, RUN).texts is None
        assert "was made on text" not in paper_table(results.table("reconstruction"))
