"""Matryoshka autoencoder: nested dictionaries in one (Bussmann et al. 2025, arXiv 2503.17547).

1. Features stand in groups. In training the first group, the first two, ... each have to reconstruct x alone, so that early
   features stay general.
2. At inference it is a BatchTopK autoencoder: codes = ReLU(pre) where pre > threshold, over all groups.
3. ``nested(n)`` is the dictionary of the first n groups, which has to stand on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.batchtopk import BatchTopK
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError


@DICTIONARIES.register("matryoshka")
class Matryoshka(BatchTopK):
    """A frozen Matryoshka BatchTopK autoencoder.

    Args:
        tensors: the weights, as BatchTopK's.
        groups: number of features of each group, first to last; they add up to F.
        wiring: how input and output are connected.
        where: ``hook_point``, ``model`` and ``details``.

    Raises:
        DictionaryError: as BatchTopK, or groups that do not add up.
    """

    kind = "matryoshka"
    own = ("groups",)

    def __init__(self, tensors: dict[str, torch.Tensor], groups: Any, wiring: Wiring | None = None, **where: Any) -> None:
        super().__init__(tensors, wiring, **where)
        # of any type, as settings of a file are
        whole = isinstance(groups, Sequence) and all(isinstance(size, int) and size > 0 for size in groups)
        self.groups = list(groups) if whole else []
        if sum(self.groups) != self.n_features:
            raise DictionaryError(
                f"groups {groups} do not add up to {self.n_features} features", where="groups", fix="check the group sizes"
            )

    def settings_of_one(self) -> dict[str, Any]:
        """One group of one feature."""
        return {**self.settings(), "groups": [1]}

    def nested(self, groups: int) -> Matryoshka:
        """The dictionary of the first ``groups`` groups alone."""
        if not 1 <= groups <= len(self.groups):
            raise DictionaryError(f"there are {len(self.groups)} groups, not {groups}", where="groups", fix="choose fewer")
        n = sum(self.groups[:groups])
        tensors = {
            **self._tensors,
            "W_enc": self.W_enc[:, :n].contiguous(),
            "b_enc": self._tensors["b_enc"][:n].contiguous(),
            "W_dec": self.W_dec[:n].contiguous(),
        }
        where = {"hook_point": self.hook_point, "model": self.model, "details": {**self.details, "nested": groups}}
        return Matryoshka(tensors, self.groups[:groups], self.wiring, **where)
