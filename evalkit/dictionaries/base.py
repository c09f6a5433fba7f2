"""The contract every dictionary keeps, on one screen.

A dictionary turns activations x (..., D) into codes (..., F) and back. SAEs, PCA, ICA, neurons and random directions
are all dictionaries, and no evaluation can tell which it was given:

1. ``encode(x)`` gives codes; ``decode(codes)`` gives x_hat; ``reconstruct(x)`` is both.
2. ``encode_sparse(x)`` gives the active codes as (values, indices) and ``decode_sparse`` takes them, so that where few features
   are active no (tokens, features) array is ever built. ``sparse`` says whether few are.
3. Some dictionaries normalise or centre each token by its own statistics. ``decode`` then writes in normalised units, and
   ``restore`` puts x's statistics back: reconstruct(x) = restore(decode(encode(x)), x). Elsewhere ``restore`` changes nothing.
4. ``directions`` (F, D): row f is what one more unit of feature f writes, so decode(c + e_f) - decode(c) = directions[f].
5. ``edit_directions`` (F, D): row f is what one unit of feature f is in the activation, so that x - c_f edit_directions[f] is x
   without it. It is ``directions`` where a dictionary was fitted with what it writes. A read-out whose common scale was fitted
   afterwards (``fitting.read_out``) serves reconstruction alone and moves no edit.
6. ``identity`` is a hash of the function: weights and everything else that changes what is computed, in a canonical form, so
   that one SAE read from two file formats has one identity.

Codes of PCA and ICA are signed; ``signed`` says so instead of hiding it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from evalkit.errors import DictionaryError
from evalkit.util.batching import block_rows
from evalkit.util.hashing import tensors_hash

WIDE, CROWDED = 4096, 8
"""From so many features on, and with more than one in ``CROWDED`` kept a token, the dense product is faster (measured)."""


class SparseCodes(NamedTuple):
    """Codes of the active features only. Padding entries have value 0 and index 0."""

    values: Float[torch.Tensor, "*batch K"]
    """Activation of each kept feature."""
    indices: Int[torch.Tensor, "*batch K"]
    """Which feature each value belongs to."""


class Identity(NamedTuple):
    """What a dictionary is, for keys and tables."""

    hash: str
    """sha256 over weights, kind and settings: same hash, same function."""
    kind: str
    """Registered kind: topk, tied, pca, ica, neurons, random, ..."""
    hook_point: str
    """TransformerLens name of the place whose activations it reads."""
    model: str
    """Identity of the language model it was fitted on."""


class Dictionary(ABC):
    """Base of all dictionaries; a frozen function once built, in float32.

    Subclasses set ``kind``, give ``tensors()`` and ``settings()`` (together they determine the function), and define
    ``encode``, ``decode`` and ``directions``.

    Attributes:
        kind: registered name of the class.
        signed: whether codes can be negative.
        sparse: whether few of its features are active on a token, so that sparse codes are the cheaper form.
        hook_point: where its input activations come from.
        model: identity of the language model it was fitted on.
        details: JSON-able facts about how it came to be (training recipe, convergence); not part of the identity.
    """

    kind: ClassVar[str]
    signed: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    def __init__(self, *, hook_point: str = "", model: str = "", details: dict[str, Any] | None = None) -> None:
        self.hook_point, self.model = hook_point, model
        self.details: dict[str, Any] = dict(details or {})
        self._hash: str | None = None
        self._constant: torch.Tensor | None = None

    @abstractmethod
    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """Codes (float32) of activations ``x`` of any floating type.

        Raises:
            DictionaryError: ``x`` has another width.
        """

    @abstractmethod
    def decode(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch D"]:
        """Activations written by ``codes``."""

    @property
    @abstractmethod
    def directions(self) -> Float[torch.Tensor, "F D"]:
        """Row f is what one unit of feature f writes."""

    @property
    def encoders(self) -> Float[torch.Tensor, "F D"] | None:
        """Row f is the direction feature f reads, of any length, in the units of ``decode``; None where features do not read
        one direction each."""
        return None

    @property
    def edit_directions(self) -> Float[torch.Tensor, "F D"]:
        """Row f is what ablations, clamps and patches add for one unit of feature f, in the units of ``decode``."""
        return self.directions

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name: with ``settings`` they rebuild the dictionary exactly."""

    def settings(self) -> dict[str, Any]:
        """JSON-able settings that change the function (k, a rectification); nothing else."""
        return {}

    @classmethod
    @abstractmethod
    def build(cls, tensors: dict[str, torch.Tensor], settings: dict[str, Any], **where: Any) -> Dictionary:
        """The inverse of ``tensors`` and ``settings``; ``where`` holds hook_point, model and details."""

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` in float32, its width checked."""
        if x.shape[-1] != self.d_in:
            raise DictionaryError(
                f"this dictionary reads vectors of width {self.d_in}, not {x.shape[-1]}",
                where=self.hook_point,
                fix="give it activations of the model and hook point it was trained on",
            )
        return x.float()

    def canonical(self) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
        """Kind, tensors and settings that are hashed: another kind's, where this is a special case of that one."""
        return self.kind, self.tensors(), self.settings()

    def restore(
        self, x_hat: Float[torch.Tensor, "*batch D"], x: Float[torch.Tensor, "*batch D"]
    ) -> Float[torch.Tensor, "*batch D"]:
        """``x_hat`` as decoded, in the units of ``x``: the same, unless each token is normalised by its own statistics."""
        return x_hat

    def reconstruct(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat: decode(encode(x)), with the input's own statistics where a normalisation needs them."""
        if self.sparse:
            return self.restore(self.decode_sparse(self.encode_sparse(x)), x)
        return self.restore(self.decode(self.encode(x)), x)

    def encode_sparse(self, x: Float[torch.Tensor, "*batch D"]) -> SparseCodes:
        """The non-zero codes of ``x``, largest magnitude first, padded to the row that has most.

        Only a block of dense codes is held at a time, however many tokens there are.
        """
        flat = x.reshape(-1, x.shape[-1])
        blocks = [self._active(part) for part in flat.split(block_rows(self.n_features))]
        widest = max(block.values.shape[-1] for block in blocks)
        values, indices = (
            torch.cat([F.pad(part, (0, widest - part.shape[-1])) for part in parts]) for parts in zip(*blocks, strict=True)
        )
        shape = (*x.shape[:-1], widest)
        return SparseCodes(values.reshape(shape), indices.reshape(shape))

    def _active(self, x: Float[torch.Tensor, "B D"]) -> SparseCodes:
        """``encode_sparse`` of one block."""
        codes = self.encode(x)
        k = int((codes != 0).sum(-1).max()) if codes.numel() else 0
        indices = codes.abs().topk(k, dim=-1).indices  # (B, K)
        values = codes.gather(-1, indices)
        return SparseCodes(values, indices * (values != 0))

    def encode_feature(self, x: Float[torch.Tensor, "*batch D"], feature: int) -> Float[torch.Tensor, "*batch"]:
        """Codes of one feature: ``encode(x)[..., feature]``."""
        if not self.sparse:
            return self.encode(x)[..., feature]
        codes = self.encode_sparse(x)
        return (codes.values * (codes.indices == feature)).sum(-1)

    def decode_sparse(self, codes: SparseCodes) -> Float[torch.Tensor, "*batch D"]:
        """Activations written by sparse codes: ``decode`` of the same codes, from the active directions only, unless they are
        many."""
        if self._constant is None:
            self._constant = self.decode(self.directions.new_zeros(self.n_features))  # (D,)
        constant, k = self._constant, codes.values.shape[-1]
        if k == 0 or codes.values.numel() == 0:
            return constant.expand(*codes.values.shape[:-1], -1).clone()
        bags, weights = codes.indices.reshape(-1, k), codes.values.reshape(-1, k)
        if self.n_features >= WIDE and k * CROWDED > self.n_features:
            rows = block_rows(self.n_features)
            blocks = zip(bags.split(rows), weights.split(rows), strict=True)
            dense = [self.decode(v.new_zeros(len(v), self.n_features).scatter_add_(-1, i, v)) for i, v in blocks]
            return torch.cat(dense).reshape(*codes.values.shape[:-1], -1)
        written = F.embedding_bag(bags, self.directions, per_sample_weights=weights, mode="sum")
        return written.reshape(*codes.values.shape[:-1], -1) + constant

    @property
    def d_in(self) -> int:
        """Width D of the activations it reads."""
        return self.directions.shape[1]

    def check_width(self, width: int, hook_point: str) -> None:
        """Refuse a hook point whose activations have another width.

        Raises:
            DictionaryError: ``width`` is not ``d_in``.
        """
        if self.d_in != width:
            raise DictionaryError(
                f"the dictionary reads activations of width {self.d_in}; {hook_point} has {width}",
                where=self.hook_point,
                fix="use it at the hook point it was fitted on",
            )

    @property
    def n_features(self) -> int:
        """Number of features F."""
        return self.directions.shape[0]

    @property
    def identity(self) -> Identity:
        """Content hash, kind, hook point and model."""
        if self._hash is None:
            kind, tensors, settings = self.canonical()
            self._hash = tensors_hash(tensors, {"kind": kind, "settings": settings})
        return Identity(self._hash, self.kind, self.hook_point, self.model)
