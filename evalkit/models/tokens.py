"""Text as the model's token ids: the one place where text is tokenised for it.

1. Tokenizers in the manner of Llama 2 put a space before every text. Where the text begins with one itself, they would make a
   bare space of it that running text does not have; the tokenizer's own then stands for the text's.
2. Every id is held against the model's embeddings: tokens added without them would be read beyond their end.
3. A text is read behind the token that texts began with when the model was trained (BOS), where there is one: ``opened``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from evalkit.errors import ModelError
from evalkit.models.pretrained import seam
from evalkit.util.user_files import half_character

Bos = Literal["auto", "model", "none"]
"""What texts begin with: the BOS, or else the EOS, or else nothing ("auto"); the BOS; nothing."""

PROBES = (("b", "a"), ("of", "the"), ("7", "x"))
"""Pairs of words on which it is tried whether the tokenizer puts a space before a text."""


class Tokens:
    """A tokenizer held against a model.

    Args:
        tokenizer: of transformers, fast or slow.
        embedded: tokens that the model has embeddings for.
        label: the model's name, for messages.
        bos: what texts begin with.

    Attributes:
        bos: id of the token that every text begins with; None where there is none.

    Raises:
        ModelError: ``bos`` asks for a BOS and there is none, or the token has no embedding.
    """

    def __init__(self, tokenizer: Any, embedded: int, label: str, bos: Bos = "auto") -> None:
        self.tokenizer, self.embedded, self.label = tokenizer, embedded, label
        self._puts_space = any(self._doubles(one, two) for one, two in PROBES)
        own, end = (getattr(tokenizer, f"{which}_token_id", None) for which in ("bos", "eos"))
        if bos == "model" and own is None:
            raise ModelError(
                f"the tokenizer of {label} has no BOS", where="[corpus] bos", fix='write bos = "auto" or bos = "none"'
            )
        self.bos: int | None = None if bos == "none" else own if own is not None or bos == "model" else end
        if self.bos is not None and self.bos >= embedded:
            what = f"the token that texts begin with has the number {self.bos}, and {label} has embeddings for {embedded} tokens"
            raise ModelError(what, where="[corpus] bos", fix='write bos = "none"')

    def tokenise(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands in running text, without special tokens.

        Raises:
            ModelError: the tokenizer cannot read it, or makes a token without an embedding.
        """
        ids = self._ids(text[1:] if self._puts_space and text.startswith(" ") else text)
        self._check(ids)
        return ids

    def opened(self, text: str) -> list[int]:
        """The same behind the BOS, where there is one and the text does not spell it itself."""
        ids = self.tokenise(text)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def _doubles(self, one: str, two: str) -> bool:
        """Whether ``two`` alone is read as behind a space, and behind a space of its own as behind two."""
        alone = self._ids(two)
        return self._ids(f"{one} {two}") == self._ids(one) + alone and self._ids(f" {two}") != alone

    def _ids(self, text: str) -> list[int]:
        with seam(f"the tokenizer of {self.label} cannot read a text", repr(text[:60]), "leave the text out, or mend it"):
            if half := half_character(text):
                raise ValueError(f"it holds half of a character ({half}), or bytes that are not UTF-8")
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _check(self, ids: Sequence[int]) -> None:
        if ids and max(ids) >= self.embedded:
            token = next(token for token in ids if token >= self.embedded)
            raise ModelError(
                f"the token {self.tokenizer.convert_ids_to_tokens(int(token))!r} has the number {token}, and {self.label} has "
                f"embeddings for {self.embedded:,} tokens",
                where="the tokenizer, which does not fit the model",
                fix="take the token out of the text, or resize the model's embeddings to the tokenizer and save both again",
            )
