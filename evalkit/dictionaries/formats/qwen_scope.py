"""Qwen Scope: TopK autoencoders of the residual stream, ``layerN.sae.pt`` in a repository ``SAE-Res-MODEL-W32K-L0_50``.

1. pre = x @ W_enc^T + b_enc; codes = ReLU of the k largest; x_hat = codes @ W_dec^T + b_dec. b_dec is not subtracted before,
   and nothing is normalised.
2. W_enc is stored as (F, D) and W_dec as (D, F): transposed against what other trainers mean by these names.
3. k is in no file: it is the L0 in the repository's name, which has to be part of the path, or ``{"k": N}`` in a file
   ``evalkit.json`` beside the weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.formats.single_file import folders_of, naming, one_file
from evalkit.dictionaries.topk import TopK

FILES = ("layer*.sae.pt",)
"""Names of the weights."""

CHOICE = "evalkit.json"
"""File beside the weights that says k where the path does not."""

_NEEDED = {"W_enc", "b_enc", "W_dec", "b_dec"}
_REPOSITORY = re.compile(r"SAE-Res-(.+?)-W(\d+)K-L0_(\d+)")


class QwenScope(Format):
    """Reader of Qwen Scope."""

    name = "qwen_scope"
    title = "Qwen Scope: layerN.sae.pt"

    def recognise(self, place: Place) -> bool:
        return place.keys(place.find(*FILES)) >= _NEEDED

    def read(self, place: Place) -> Dictionary:
        path = one_file(self, place, *FILES)
        with naming(path):
            return self._read(place, path)

    def _read(self, place: Place, path: Path) -> Dictionary:
        weights = place.weights(path)
        encoder = matrix(weights, "W_enc", (-1, -1), place)  # (F, D)
        features, width = encoder.shape
        tensors = {
            "W_enc": encoder.T.contiguous(),
            "b_enc": matrix(weights, "b_enc", (features,), place),
            "W_dec": matrix(weights, "W_dec", (width, features), place).T.contiguous(),
            "b_dec": matrix(weights, "b_dec", (width,), place),
        }
        repository = _REPOSITORY.search("/".join(folders_of(path))) or _REPOSITORY.search("/".join(path.parts))
        k = self._k(place, repository)
        if repository is not None and int(repository.group(2)) * 1024 != features:
            what = f"the repository's name says W{repository.group(2)}K, the weights have {features} features"
            self.refuse(place, what, "check that the file is in the folder of its own repository")
        layer = re.match(r"layer(\d+)\.", path.name)
        writer: dict[str, Any] = {"file": path.name, "k": k, **({"repository": repository.group(0)} if repository else {})}
        return TopK(
            tensors,
            k,
            Wiring(subtract_b_dec=False),
            hook_point=f"blocks.{layer.group(1)}.hook_resid_post" if layer else "",
            model=f"Qwen/{repository.group(1)}" if repository else "",
            details={"format": self.name, "writer": writer},
        )

    def _k(self, place: Place, repository: re.Match[str] | None) -> int:
        config = place.config(CHOICE)
        if config:
            return number(config, "k", place)
        if repository is None:
            self.refuse(
                place,
                "k, the number of active features, is in no file of this format, and the path has no SAE-Res-...-L0_K",
                f'keep the file in a folder called as its repository, or write {{"k": N}} into {CHOICE} beside it',
            )
        return int(repository.group(3))


FORMATS.register(QwenScope.name)(QwenScope())
