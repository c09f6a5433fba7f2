"""HoagyC's sparse_coding (the code of Cunningham et al. 2023, arXiv 2309.08600): ``learned_dicts.pt``.

1. The file is a pickled list of (dictionary object, hyperparameters). It is read by ``legacy_pickle``, which runs nothing of it.
2. A list of several is a sweep. ``{"index": N}`` in a file ``evalkit.json`` beside it says which one is meant; without it the
   entries are listed and nothing is read.
3. TiedSAE: codes = ReLU(E centre(x) + b), with the rows of E divided by their length where ``norm_encoder`` says so, and
   x_hat = uncentre(D^T codes) with D the rows of E divided by their length.
4. centre(x) = (R (x - t)) * s, and uncentre its inverse for a rotation R. Where R and s change nothing this is a tied
   autoencoder with a centre; otherwise R and s are folded into encoder and decoder, which is exact.
5. UntiedSAE: codes = ReLU(E x + b), x_hat = D^T codes with D the decoder's rows divided by their length; no decoder bias.
6. TopKLearnedDict: the k largest of E x, ReLU, x_hat = E^T codes.

The writer's ``encode`` takes what its ``center`` gives; here both are one step, as in its ``predict``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats import legacy_pickle
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.formats.legacy_pickle import Record
from evalkit.dictionaries.formats.single_file import naming, one_file
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.tied import UNIT_TOLERANCE, Tied
from evalkit.dictionaries.topk import TopK

CHOICE = "evalkit.json"
"""File beside a sweep that says which of its dictionaries is meant."""

FILES = ("learned_dicts.pt", "*.pt", "*.pth", "*.pkl")
"""Names a file may have; the first is the writer's own."""

SHOWN = 12
"""Entries of a sweep that a message lists."""

_MODULES = ("autoencoders.learned_dict.", "autoencoders.topk_encoder.")


class Entry(NamedTuple):
    """One dictionary of the list."""

    record: Record
    """The object, as stored."""
    hyperparameters: dict[str, Any]
    """The plain values of what it was trained with."""

    @property
    def kind(self) -> str:
        """Name of the object's class."""
        return self.record.name.rsplit(".", 1)[-1]


class HoagyC(Format):
    """Reader of HoagyC's pickled dictionaries."""

    name = "hoagyc"
    title = "HoagyC/sparse_coding: learned_dicts.pt"
    facts = {
        "layer": "layer",
        "layer_loc": "hook_point",
        "model_name": "model",
        "dataset_name": "dataset",
        "max_length": "context_size",
    }
    training = (
        r"l1_.*|dict_size|.*_alpha|n_feats|n_dict_components|activation_(size|dim)|sparsity|tied.*|bias_decay|dict_ratio|.*_ratio",
    )

    def recognise(self, place: Place) -> bool:
        path = place.find(*FILES)
        if path is None:
            return False
        # the writer's own name is enough: a file that is not what it says is then refused with the reason
        return path.name == FILES[0] or any(name.startswith(_MODULES) for name in legacy_pickle.globals_of(path))

    def read(self, place: Place) -> Dictionary:
        path = one_file(self, place, *FILES)
        with naming(path):
            return self._read(place, path)

    def _read(self, place: Place, path: Path) -> Dictionary:
        entries = self._entries(place, legacy_pickle.load(path))
        index = self._index(place, entries)
        entry = entries[index]
        writer = {"class": entry.kind, "index": index, "of": len(entries), "hyperparameters": entry.hyperparameters}
        where = {"details": {"format": self.name, "writer": writer}}
        place.track(entry.hyperparameters)
        state = place.track(entry.record.state)
        match entry.kind:
            case "TiedSAE":
                return self._tied(place, state, where)
            case "UntiedSAE":
                return self._untied(place, state, where)
            case "TopKLearnedDict":
                return self._topk(place, state, where)
        self.refuse(
            place,
            f"a {entry.kind} changes its codes before it decodes them, so that features write no fixed direction",
            "choose a TiedSAE or an UntiedSAE of the sweep",
        )

    def _entries(self, place: Place, found: Any) -> list[Entry]:
        items = found if isinstance(found, list) else [(found, {})]
        entries = []
        for item in items:
            record, settings = item if isinstance(item, tuple) and len(item) == 2 else (item, {})
            if not isinstance(record, Record) or not record.name.startswith(_MODULES) or not isinstance(settings, dict):
                self.refuse(
                    place,
                    f"the file holds a {type(record).__name__} where (dictionary, hyperparameters) should be",
                    "give the learned_dicts.pt of a sweep",
                )
            entries.append(Entry(record, {str(n): v for n, v in settings.items() if _plain(v)}))
        if not entries:
            self.refuse(place, "the list of dictionaries is empty", "give the learned_dicts.pt of a later step of the sweep")
        return entries

    def _index(self, place: Place, entries: list[Entry]) -> int:
        config = place.config(CHOICE)
        if not config and len(entries) == 1:
            return 0
        lines = [
            f"{index}: {entry.kind} {', '.join(f'{n} = {v}' for n, v in entry.hyperparameters.items())}".strip()
            for index, entry in enumerate(entries[:SHOWN])
        ]
        more = [f"and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
        listing, fix = "; ".join(lines + more), f'write {{"index": N}} into a file {CHOICE} beside it, N one of the numbers'
        if not config:
            self.refuse(place, f"the file holds {len(entries)} dictionaries: {listing}", fix)
        index = number(config, "index", place, least=0)
        if index >= len(entries):
            self.refuse(place, f"{CHOICE} says index {index}, but the file holds {len(entries)}: {listing}", fix)
        return index

    def _tied(self, place: Place, state: dict[str, Any], where: dict[str, Any]) -> Dictionary:
        encoder = matrix(state, "encoder", (-1, -1), place)  # (F, D)
        features, width = encoder.shape
        bias = matrix(state, "encoder_bias", (features,), place)
        if not isinstance(state.get("norm_encoder"), bool):
            self.refuse(
                place,
                "the TiedSAE does not say whether its encoder is normalised at use (norm_encoder)",
                "set the attribute as the version of the code that trained it did, and save it again",
            )
        normed = _unit_rows(encoder)
        used = normed if state["norm_encoder"] else encoder
        shift = self._centring(place, state, "center_trans", torch.zeros(width))
        rotation = self._centring(place, state, "center_rot", torch.eye(width))
        scale = self._centring(place, state, "center_scale", torch.ones(width))
        plain = torch.equal(rotation, torch.eye(width)) and torch.equal(scale, torch.ones(width))
        unit = bool(((normed.norm(dim=1) - 1).abs() <= UNIT_TOLERANCE).all())
        if plain and unit and torch.equal(used, normed):
            return Tied(normed, bias, shift if shift.any() else None, **where)
        # the inverse that the writer applies is R^T, whatever R is: fold that one
        turn, stretch = rotation.double(), scale.double()  # (D, D), (D,)
        tensors = {
            "W_enc": ((used.double() * stretch) @ turn).T.float().contiguous(),
            "b_enc": bias,
            "W_dec": ((normed.double() / stretch) @ turn).float().contiguous(),
            "b_dec": shift,
        }
        return ReLU(tensors, Wiring(), **where)

    def _centring(self, place: Place, state: dict[str, Any], name: str, absent: torch.Tensor) -> torch.Tensor:
        return absent if state.get(name) is None else matrix(state, name, tuple(absent.shape), place)

    def _untied(self, place: Place, state: dict[str, Any], where: dict[str, Any]) -> Dictionary:
        encoder = matrix(state, "encoder", (-1, -1), place)  # (F, D)
        tensors = {
            "W_enc": encoder.T.contiguous(),
            "b_enc": matrix(state, "encoder_bias", (encoder.shape[0],), place),
            "W_dec": _unit_rows(matrix(state, "decoder", tuple(encoder.shape), place)),
            "b_dec": torch.zeros(encoder.shape[1]),
        }
        return ReLU(tensors, Wiring(subtract_b_dec=False), **where)

    def _topk(self, place: Place, state: dict[str, Any], where: dict[str, Any]) -> Dictionary:
        rows = matrix(state, "dict", (-1, -1), place)  # (F, D)
        features, width = rows.shape
        tensors = {
            "W_enc": rows.T.contiguous(),
            "b_enc": torch.zeros(features),
            "W_dec": rows,
            "b_dec": torch.zeros(width),
        }
        return TopK(tensors, number(state, "sparsity", place), Wiring(subtract_b_dec=False), **where)


def _plain(value: Any) -> bool:
    """Whether a hyperparameter can be written down as JSON."""
    return type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def _unit_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)


FORMATS.register(HoagyC.name)(HoagyC())
