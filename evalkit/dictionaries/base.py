"""The contract every dictionary keeps, on one screen.

A dictionary turns activations x (..., D) into codes (..., F) and back. SAEs, PCA, ICA, neurons and random directions
are all dictionaries, and no evaluation can tell which it was given:

1. ``encode(x)`` gives codes; ``decode(codes)`` gives x_hat; ``reconstruct(x)`` is both, with x's own statistics where an
   input normalisation needs them.
2. ``encode_sparse(x)`` gives the active codes as (values, indices) where few are active.
3. ``directions`` (F, D): row f is what one more unit of feature f writes, so decode(c + e_f) - decode(c) = directions[f].
4. ``identity`` is a hash of the weights and of everything else that changes the function.

Codes of PCA and ICA are signed; ``signed`` says so instead of hiding it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int

from evalkit.hashing import tensors_hash


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
    """Base of all dictionaries; a frozen function once built. Tensors are float32 unless a subclass says otherwise.

    Subclasses set ``kind``, give ``tensors()`` and ``settings()`` (together they determine the function), and define
    ``encode``, ``decode`` and ``directions``.

    Attributes:
        kind: registered name of the class.
        signed: whether codes can be negative.
        hook_point: where its input activations come from.
        model: identity of the language model it was fitted on.
        details: JSON-able facts about how it came to be (training recipe, convergence); not part of the identity.
    """

    kind: ClassVar[str]
    signed: ClassVar[bool] = False

    def __init__(self, *, hook_point: str = "", model: str = "", details: dict[str, Any] | None = None) -> None:
        self.hook_point, self.model = hook_point, model
        self.details: dict[str, Any] = dict(details or {})
        self._hash: str | None = None

    @abstractmethod
    def encode(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch F"]:
        """Codes of activations ``x``."""

    @abstractmethod
    def decode(self, codes: Float[torch.Tensor, "*batch F"]) -> Float[torch.Tensor, "*batch D"]:
        """Activations written by ``codes``."""

    @property
    @abstractmethod
    def directions(self) -> Float[torch.Tensor, "F D"]:
        """Row f is what one unit of feature f writes."""

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

    def reconstruct(self, x: Float[torch.Tensor, "*batch D"]) -> Float[torch.Tensor, "*batch D"]:
        """x_hat: decode(encode(x)), with the input's own statistics where a normalisation needs them."""
        return self.decode(self.encode(x))

    def encode_sparse(self, x: Float[torch.Tensor, "*batch D"]) -> SparseCodes:
        """The non-zero codes of ``x``, padded to the widest row of the batch, largest magnitude first."""
        codes = self.encode(x)
        k = int((codes != 0).sum(-1).max().item()) if codes.numel() else 0
        indices = codes.abs().topk(k, dim=-1).indices  # (..., K)
        values = codes.gather(-1, indices)
        return SparseCodes(values, indices * (values != 0))

    @property
    def d_in(self) -> int:
        """Width D of the activations it reads."""
        return self.directions.shape[1]

    @property
    def n_features(self) -> int:
        """Number of features F."""
        return self.directions.shape[0]

    @property
    def identity(self) -> Identity:
        """Content hash, kind, hook point and model."""
        if self._hash is None:
            self._hash = tensors_hash(self.tensors(), {"kind": self.kind, "settings": self.settings()})
        return Identity(self._hash, self.kind, self.hook_point, self.model)
