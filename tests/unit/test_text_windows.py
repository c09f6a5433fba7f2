"""Windows: exact length, inside one document, spread over documents, made of the tokens of the whole text."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers_case import space_before

from evalkit.errors import CorpusError
from evalkit.models.tokens import Tokens
from evalkit.text.corpora import Document
from evalkit.text.windows import PIECE, _pieces, cut_windows


def characters(text: str) -> list[int]:
    return [ord(c) for c in text]


def prose(seed: int, words: int) -> str:
    generator = random.Random(seed)
    parts = ["the", "cat", "  spaced", "12", "a.b", "caf\u00e9", "end.\n\nNew", "don't", "word"]
    return " ".join(generator.choice(parts) for _ in range(words))


def test_windows_come_from_one_document_each_and_do_not_overlap() -> None:
    documents = [Document(f"d{i}", chr(97 + i) * (40 + i)) for i in range(5)]
    windows = cut_windows(documents, characters, context=10, max_tokens=10_000, seed=3)
    assert windows.tokens.shape == (20, 10) and windows.tokens.dtype == torch.int64
    for row, owner in zip(windows.tokens, windows.document, strict=True):
        letter = chr(97 + int(windows.names[owner][1:]))
        assert set(row.tolist()) == {ord(letter)}
    assert windows.document.bincount().tolist() == [4] * 5


def test_every_position_is_used_at_most_once_and_nearly_all_are() -> None:
    text = "".join(chr(0x4E00 + i) if i % 7 else " a b " for i in range(9000))
    values = {}
    for i, c in enumerate(c for c in text if c > "\u4e00"):
        values[c] = i
    windows = cut_windows([Document("d", text)], characters, context=50, max_tokens=10**6, seed=1)
    seen = [v for v in windows.tokens.flatten().tolist() if chr(v) in values]
    assert len(seen) == len(set(seen)) and len(seen) > len(values) - 100


def test_takes_turns_over_documents_and_more_tokens_only_add() -> None:
    documents = [Document(f"d{i}", prose(i, 2000)) for i in range(6)]
    few = cut_windows(documents, characters, context=64, max_tokens=64 * 6 + 63, seed=5)
    many = cut_windows(documents, characters, context=64, max_tokens=64 * 40, seed=5)
    assert len(few.tokens) == 6 and sorted(few.document.tolist()) == list(range(6))
    assert torch.equal(many.tokens[:6], few.tokens)
    assert few.identity == cut_windows(documents, characters, 64, 64 * 6 + 63, 5).identity
    assert few.identity != cut_windows(documents, characters, 64, 64 * 6 + 63, 6).identity


def test_only_as_much_text_as_needed_is_tokenised() -> None:
    read = []

    def counting(text: str) -> list[int]:
        read.append(len(text))
        return characters(text)

    documents = [Document(f"d{i}", prose(i, 20_000)) for i in range(4)]
    cut_windows(documents, counting, context=100, max_tokens=400, seed=0)
    assert sum(read) < 4 * 3 * PIECE < sum(len(d.text) for d in documents) / 4


def test_a_small_sample_is_not_all_openings() -> None:
    text = "OPENING " + prose(0, 20_000)
    windows = cut_windows([Document(str(i), text) for i in range(20)], characters, 100, 2000, seed=0)
    openings = sum(row[:7].tolist() == characters("OPENING") for row in windows.tokens)
    assert openings < 5


def test_pieces_give_the_tokens_of_the_whole_text() -> None:
    text = prose(1, 8000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=350, show_progress=False))
    pieces = _pieces(text)
    assert len(pieces) > 5 and "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_short_documents_are_counted_and_limits_kept() -> None:
    documents = [Document("short", "x"), Document("long", "y" * 100)]
    windows = cut_windows(documents, characters, context=10, max_tokens=1000, seed=0, windows_per_document=3)
    assert windows.skipped == 1 and windows.names == ["long"] and len(windows.tokens) == 3


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(CorpusError, match="none of the 1 documents holds 10 tokens"):
        cut_windows([Document("short", "x")], characters, context=10, max_tokens=100, seed=0)
    with pytest.raises(CorpusError, match="do not make one window"):
        cut_windows([Document("long", "y" * 100)], characters, context=10, max_tokens=9, seed=0)


def test_a_window_begins_with_the_bos_once_and_the_rest_is_the_text() -> None:
    bos = 7
    text = "".join(chr(0x4E00 + i) for i in range(95))
    windows = cut_windows([Document("d", text)], characters, context=10, max_tokens=1000, seed=1, bos=bos)
    assert (
        windows.tokens.shape == (10, 10) and (windows.tokens[:, 0] == bos).all() and windows.bos == bos and windows.opening == 1
    )
    assert windows.tokens[:, 1:].flatten().tolist() == characters(text)[:90]
    assert (windows.asked, windows.skipped) == (1000, 0)
    spelled = cut_windows([Document("d", "\x07" + text)], characters, context=10, max_tokens=1000, seed=1, bos=bos)
    assert torch.equal(spelled.tokens, windows.tokens), "no second one"
    plain = cut_windows([Document("d", text)], characters, context=10, max_tokens=1000, seed=1)
    assert plain.opening == 0 and plain.tokens.flatten().tolist() == characters(text)[:90]


def test_the_same_tokens_with_and_without_a_bos_are_two_things() -> None:
    document = Document("d", "\x07abcdefghi")
    plain = cut_windows([document], characters, context=10, max_tokens=10, seed=0)
    behind = cut_windows([document], characters, context=10, max_tokens=10, seed=0, bos=7)
    assert torch.equal(plain.tokens, behind.tokens) and plain.identity != behind.identity


def test_what_the_tokenizer_joins_over_a_cut_is_not_cut() -> None:
    """Tokens of up to three words, as tokenizers that merge over spaces make them."""
    known: dict[str, int] = {}

    def triples(text: str) -> list[int]:
        words = text.split(" ")
        return [known.setdefault(" ".join(words[at : at + 3]), len(known)) for at in range(0, len(words), 3)]

    text = " ".join(f"w{chr(97 + n % 26)}x" for n in range(1800))
    assert len(_pieces(text)) > 2
    windows = cut_windows([Document("d", text)], triples, context=20, max_tokens=10_000, seed=2)
    assert windows.tokens.flatten().tolist() == triples(text)[:600]


def test_a_space_before_every_text_stands_at_no_cut() -> None:
    tokenizer = space_before()
    tokens = Tokens(tokenizer, len(tokenizer), "tiny")
    text = " ".join(["the cat sat on the mat and the zebra ran"] * 200)
    windows = cut_windows([Document("d", text)], tokens.tokenise, context=16, max_tokens=10**6, seed=1, bos=tokens.bos)
    whole = "".join(chr(0x100 + i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(windows.tokens) > 100
    for row in windows.tokens.tolist():
        assert row[0] == tokens.bos and "".join(chr(0x100 + i) for i in row[1:]) in whole
