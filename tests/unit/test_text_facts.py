"""What text was read is in the results, and a dictionary made on text that was read otherwise has a note."""

from __future__ import annotations

import json

import pytest
from store_case import HOOK, RUN, write_run

from evalkit.activations.facts import disagreement, made_with
from evalkit.models.names import other_model
from evalkit.report.page.run_facts import run_facts
from evalkit.report.tables import paper_table
from evalkit.store.reader import open_results
from evalkit.store.writer import rebuild

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


def test_text_that_fell_short_is_noted_under_the_tables_and_on_the_page(tmp_path):
    journal = write_run(tmp_path)
    fit = {**ROW, "side": "fit", "tokens": 30_080}
    for hook in (HOOK, "blocks.5.hook_resid_post"):  # one text, read at several places
        journal.write_rows("texts", [{**row, "hook_point": hook} for row in (ROW, fit)])
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    note = (
        "The fitting text has 30,080 of the 60,000 tokens asked for: 48 documents gave no more windows of 128, and 3 more are "
        "shorter than a window."
    )
    with open_results(tmp_path / "evalkit.duckdb") as results:
        notes = results.table("reconstruction").attrs["notes"]
        assert [said for said in notes if "asked for" in said] == [note], "what one window leaves over is not short"
        sheet = run_facts(results, RUN).texts
        assert sheet is not None and sheet.notes.count(note) == 1
        assert results.texts()["tokens"].tolist() == [30_080, 59_904] * 2


MODEL = {"model": "openai-community/gpt2", "model_identity": "hub:openai-community/gpt2@abc:float32"}


@pytest.mark.parametrize(
    ("made_for", "name", "identity", "said"),
    [
        ("gpt2-small", "gpt2", "hub:gpt2@1:float32", ""),
        ("gpt2", "openai-community/GPT2", "hub:openai-community/GPT2@1:float32", ""),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", "hub:x@1:float32", ""),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m-deduped", "hub:x@1:float32", "EleutherAI/pythia-70m"),
        ("google/gemma-2-2b", "gpt2", "hub:gpt2@1:float32", "google/gemma-2-2b"),
        ("google/gemma-2-2b", "/models/models--google--gemma-2-2b/snapshots/ab", "folder:ab:float32", ""),
        ("", "gpt2", "hub:gpt2@1:float32", ""),
        ("hub:gpt2@1:float32", "gpt2", "hub:gpt2@2:bfloat16", ""),
        ("hub:gpt2@1:float32", "distilgpt2", "hub:distilgpt2@1:float32", "gpt2"),
        ("folder:ab:float32", "/models/a", "folder:ab:float32:random-0", ""),
        ("folder:ab:float32", "/models/a", "folder:cd:float32", "another one, by the checksum of its weights"),
        ("gguf:ab:float32", "/models/a", "folder:cd:float32", ""),
    ],
)
def test_the_model_a_file_names_is_held_against_the_one_that_is_read(made_for, name, identity, said):
    note = other_model("A", made_for, name, identity)
    assert note == (f"A was made for the model {said}; this run reads {name} ([model])." if said else "")


def test_another_model_is_noted_under_the_tables_and_on_the_page(tmp_path):
    journal = write_run(tmp_path)
    about = {"kind": "topk", "hook_point": HOOK, "d_in": 4, "n_features": 8, "details": "{}"}
    journal.write_rows("dictionaries", [{**about, "dictionary_id": "id-topk", "model": "google/gemma-2-2b"}])
    journal.write_rows("texts", [{**ROW, **MODEL}])
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    note = "topk was made for the model google/gemma-2-2b; this run reads openai-community/gpt2 ([model])."
    with open_results(tmp_path / "evalkit.duckdb") as results:
        assert results.table("reconstruction").attrs["notes"].count(note) == 1
        sheet = run_facts(results, RUN).dictionaries
    assert sheet is not None and sheet.notes.count(note) == 1


def test_a_run_without_such_rows_has_none(tmp_path):
    write_run(tmp_path)
    rebuild(tmp_path, tmp_path / "evalkit.duckdb")
    with open_results(tmp_path / "evalkit.duckdb") as results:
        assert run_facts(results, RUN).texts is None
        assert "was made on text" not in paper_table(results.table("reconstruction"))
