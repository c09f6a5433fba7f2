"""Text as tokens: in its place, behind the BOS, and no id that the model has no embedding for."""

from __future__ import annotations

import pytest
from tokenizers_case import byte_level, space_before
from transformers import PreTrainedTokenizerFast

from evalkit.errors import ModelError
from evalkit.models.tokens import Tokens


def of(tokenizer: PreTrainedTokenizerFast, **more) -> Tokens:
    return Tokens(tokenizer, more.pop("embedded", len(tokenizer)), "tiny", **more)


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_space_that_a_tokenizer_puts_before_a_text_stands_for_the_texts_own():
    tokenizer = space_before()
    tokens = of(tokenizer)
    whole = plain(tokenizer, "the cat saw Mary")
    assert tokens.tokenise("the cat") + tokens.tokenise(" saw Mary") == whole
    assert len(plain(tokenizer, " saw Mary")) == len(tokens.tokenise(" saw Mary")) + 1
    # a second space is the text's
    assert tokens.tokenise("the") + tokens.tokenise("  cat") == plain(tokenizer, "the  cat")
    assert tokens.tokenise("") == [] and tokens.tokenise("the") == plain(tokenizer, "the")


def test_other_tokenizers_read_a_text_as_it_is():
    tokenizer = byte_level(eos_token="<end>")
    for text in (" the cat", "the cat", "  the", "\nthe"):
        assert of(tokenizer).tokenise(text) == plain(tokenizer, text)


def test_texts_begin_with_the_bos_or_the_eos_or_nothing():
    both, end, neither = byte_level(bos_token="<bos>", eos_token="<end>"), byte_level(eos_token="<end>"), byte_level()
    assert of(both).bos == of(both, bos="model").bos == both.bos_token_id
    assert of(end).bos == end.eos_token_id
    assert of(neither).bos is of(both, bos="none").bos is None
    assert of(both).opened("the") == [both.bos_token_id, *of(both).tokenise("the")]
    assert of(both).opened("<bos>the") == of(both).tokenise("<bos>the"), "no second one"
    assert of(neither).opened("the") == of(neither).tokenise("the")
    with pytest.raises(ModelError, match="has no BOS"):
        of(end, bos="model")


def test_a_token_without_an_embedding_is_named():
    tokenizer = byte_level(eos_token="<end>")
    known = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokens = of(tokenizer, embedded=known)
    assert max(tokens.tokenise("the cat")) < known
    with pytest.raises(ModelError, match=rf"'<extra>' has the number {known}, and tiny has embeddings for {known}"):
        tokens.tokenise("the <extra> cat")


def test_half_of_a_character_is_no_text():
    with pytest.raises(ModelError, match=r"half of a character \(\\ud83d\)"):
        of(byte_level()).tokenise("rain \ud83d")
