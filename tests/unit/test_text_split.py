"""Fitting and scoring text never share a text, and a document's side depends on nothing but itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.errors import CorpusError
from evalkit.text.corpora import Document
from evalkit.text.split import check_disjoint, split_documents

TEXTS = [f"document number {i}" for i in range(500)]


def test_a_shared_source_is_divided_near_the_share() -> None:
    split = split_documents(TEXTS, [TEXTS], share=0.2, seed=1)
    assert len(split.fit) + len(split.score) == 500
    assert 65 <= len(split.score) <= 135  # 100 expected, standard deviation 9
    assert split != split_documents(TEXTS, [TEXTS], share=0.2, seed=2)


def test_more_documents_do_not_move_the_others() -> None:
    few = {d.text for d in split_documents(TEXTS[:300], [TEXTS[:300]]).score}
    many = {d.text for d in split_documents(TEXTS, [TEXTS]).score}
    assert few == many & set(TEXTS[:300])


def test_sources_of_one_side_stay_whole_and_copies_leave_the_fitting_side() -> None:
    split = split_documents(["a", "b", "c"], [["b", "x"], ["b", "x"], ["y"]])
    assert [d.text for d in split.fit] == ["a", "c"]
    assert sorted(d.text for d in split.score) == ["b", "x", "y"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12), st.integers(0, 50), st.floats(0.01, 0.99))
def test_no_text_on_both_sides_and_none_lost(texts: list[str], seed: int, share: float) -> None:
    if len(set(texts)) == 1:
        with pytest.raises(CorpusError, match="no document is left"):
            split_documents(texts, [texts], share, seed)
        return
    split = split_documents(texts, [texts], share, seed)
    fit, score = [d.text for d in split.fit], [d.text for d in split.score]
    assert fit and score and not set(fit) & set(score)
    assert sorted(fit + score) == sorted(texts)


def test_refusals() -> None:
    with pytest.raises(CorpusError, match="to fit on"):
        split_documents(["a"], [["a", "b"]])
    with pytest.raises(CorpusError, match="to score on"):
        split_documents(["a"], [])
    with pytest.raises(CorpusError, match="share"):
        split_documents(TEXTS, [TEXTS], share=1.0)
    with pytest.raises(CorpusError, match="same text"):
        check_disjoint([Document("one", "t")], [Document("two", "t")])
