"""The AI Safety Foundation's sparse_autoencoder: a pickled ``SparseAutoencoderState`` (``sae-model-state.pt``).

1. The file is a pydantic object (config, state_dict) or the bare state_dict of one component. The object is read by
   ``legacy_pickle``, which runs nothing of it.
2. codes = ReLU((x - tied_bias) @ encoder.weight^T + encoder.bias); x_hat = codes @ decoder.weight^T + tied_bias: a ReLU
   autoencoder (Bricken et al. 2023).
3. The tied bias is stored three times (itself, and as the reference of the layer before the encoder and of the one after the
   decoder); the three must agree.
4. Trained on several components of a model at once, every tensor has a first axis C. One component is read; several are
   refused, with the way to split them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats import legacy_pickle
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.formats.legacy_pickle import Record
from evalkit.dictionaries.formats.single_file import naming, one_file
from evalkit.dictionaries.relu import ReLU

STATE = "sparse_autoencoder.autoencoder.model.SparseAutoencoderState"
"""The pickled class."""

FILES = ("sae-model-state.pt", "*.pt", "*.pth")
"""Names a file may have; the first is the writer's own."""

_NEEDED = {"tied_bias", "encoder.weight", "encoder.bias", "decoder.weight"}
_COPIES = ("pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")


class AISafety(Format):
    """Reader of the AI Safety Foundation's model states."""

    name = "ai_safety"
    title = "ai-safety-foundation/sparse_autoencoder: sae-model-state.pt"

    def recognise(self, place: Place) -> bool:
        path = place.find(*FILES)
        return path is not None and (STATE in legacy_pickle.globals_of(path) or place.keys(path) >= _NEEDED)

    def read(self, place: Place) -> Dictionary:
        path = one_file(self, place, *FILES)
        with naming(path):
            return self._read(place, path)

    def _read(self, place: Place, path: Path) -> Dictionary:
        stored, weights = self._parts(place, path)
        config = place.track(stored)
        weights = self._one_component(place, config, weights)
        encoder = matrix(weights, "encoder.weight", (-1, -1), place)  # (F, D)
        features, width = encoder.shape
        for name, want in (("n_input_features", width), ("n_learned_features", features)):
            if config and number(config, name, place) != want:
                self.refuse(
                    place, f"the config says {name} = {config[name]}, the encoder's weights {want}", "fetch the file again"
                )
        bias = matrix(weights, "tied_bias", (width,), place)
        for name in _COPIES:
            if name in weights and not torch.equal(matrix(weights, name, (width,), place), bias):
                self.refuse(place, f"'{name}' is not the tied bias that it refers to", "fetch the file again")
        tensors = {
            "W_enc": encoder.T.contiguous(),
            "b_enc": matrix(weights, "encoder.bias", (features,), place),
            "W_dec": matrix(weights, "decoder.weight", (width, features), place).T.contiguous(),
            "b_dec": bias,
        }
        return ReLU(tensors, Wiring(), details={"format": self.name, "writer": stored})

    def _parts(self, place: Place, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Config and weights by name."""
        if STATE not in legacy_pickle.globals_of(path):
            return {}, place.weights(path)
        fields = _fields(legacy_pickle.load(path))
        config, weights = _fields(fields.get("config")), fields.get("state_dict")
        if not config or not isinstance(weights, dict):
            self.refuse(place, "the saved state lacks its config or its state_dict", "fetch the file again")
        return {str(name): value for name, value in config.items() if type(value) in (int, str, type(None))}, weights

    def _one_component(self, place: Place, config: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
        encoder = weights.get("encoder.weight")
        axis = encoder.shape[0] if isinstance(encoder, torch.Tensor) and encoder.ndim == 3 else None
        declared = config.get("n_components", axis)
        if declared != axis:
            self.refuse(place, f"the config says n_components = {declared}, the encoder's weights {axis}", "fetch the file again")
        if axis is None:
            return weights
        if axis != 1:
            self.refuse(
                place,
                f"the file holds the autoencoders of {axis} components of a model (0 to {axis - 1}); evalkit takes one at a time",
                "for each i, torch.save(SparseAutoencoder.get_single_component_state_dict(state, i), FILE) and import FILE",
            )
        for name, tensor in weights.items():
            if not isinstance(tensor, torch.Tensor) or tensor.ndim < 1 or tensor.shape[0] != 1:
                self.refuse(place, f"'{name}' has no axis of one component, the encoder's weights have", "fetch the file again")
        return {name: tensor[0] for name, tensor in weights.items()}


def _fields(record: Any) -> dict[str, Any]:
    """The fields of a pydantic object as stored; {} for anything else."""
    fields = record.state.get("__dict__") if isinstance(record, Record) else None
    return fields if isinstance(fields, dict) else {}


FORMATS.register(AISafety.name)(AISafety())
