"""dictionary_learning: ``trainer_N/ae.pt`` or ``checkpoints/ae_STEP.pt`` with ``config.json`` beside it or one folder up.

1. ``trainer.dict_class`` of the config names one of seven classes; without a config the tensors' names decide. AutoEncoderTopK
   and BatchTopKSAE files have the same names: these need the config.
2. nn.Linear weights are stored (out, in): encoder.weight (F, D) and decoder.weight (D, F) are transposed here. The classes
   with W_enc (D, F) and W_dec (F, D) are taken as they are.
3. AutoEncoderNew and JumpReluAutoEncoder do not subtract b_dec from the input; the others do.
4. AutoEncoderTopK keeps the k largest a token, whatever threshold the file has. BatchTopKSAE and MatryoshkaBatchTopKSAE
   compare with the threshold, which is -1 until training has set it; such files are refused, as they would be plain ReLU.
5. The plain weights are read. AutoEncoder.from_pretrained of the library by default (normalize_decoder=True) divides decoder
   directions by their norms and multiplies codes by them: the same reconstruction, other units of the codes. Call it with
   normalize_decoder=False to compare codes.
6. Written are ae.pt and config.json of the class that computes the same; reading them back is exact to the bit.

Source: dictionary_learning (https://github.com/saprmarks/dictionary_learning). The config is ``dictionary_learning_config``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evalkit.dictionaries.autoencoder import Autoencoder
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.formats.dictionary_learning import config as dictionary_learning_config
from evalkit.dictionaries.formats.dictionary_learning.config import CONFIG
from evalkit.dictionaries.formats.fields import Fields, plain
from evalkit.dictionaries.provenance import note
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError
from evalkit.util.registry import near_miss

WEIGHTS = "ae.pt"
_PATTERNS = (WEIGHTS, "checkpoints/ae_*.pt", "ae_*.pt", "trainer_*/ae.pt")


class Layout(NamedTuple):
    """How one of the library's classes stores its tensors."""

    kind: str
    """evalkit's kind."""
    names: dict[str, str]
    """evalkit's tensor names to the file's."""
    linear: bool
    """Encoder and decoder are nn.Linear weights, stored (out, in)."""
    subtract_b_dec: bool
    needs: tuple[str, ...] = ()
    """Buffers that every file of the class has."""
    may: tuple[str, ...] = ()
    """Buffers that newer files of the class have."""


def _linear(**more: str) -> dict[str, str]:
    return {"W_enc": "encoder.weight", "W_dec": "decoder.weight", **more}


_NAMED = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LAYOUTS = {
    "AutoEncoder": Layout("relu", _linear(b_enc="encoder.bias", b_dec="bias"), True, True),
    "AutoEncoderNew": Layout("relu", _linear(b_enc="encoder.bias", b_dec="decoder.bias"), True, False),
    "GatedAutoEncoder": Layout(
        "gated", _linear(b_gate="gate_bias", r_mag="r_mag", b_mag="mag_bias", b_dec="decoder_bias"), True, True
    ),
    "AutoEncoderTopK": Layout("topk", _linear(b_enc="encoder.bias", b_dec="b_dec"), True, True, (), ("k", "threshold")),
    "BatchTopKSAE": Layout("batchtopk", _linear(b_enc="encoder.bias", b_dec="b_dec"), True, True, ("threshold",), ("k",)),
    "MatryoshkaBatchTopKSAE": Layout("matryoshka", _NAMED, False, True, ("threshold", "group_sizes"), ("k",)),
    "JumpReluAutoEncoder": Layout("jumprelu", {**_NAMED, "threshold": "threshold"}, False, False),
}
"""The seven classes by the library's names."""

_ARCHITECTURE = ("architecture", "arch", "sae_type", "type", "class", "trainer_class", "name")
"""Fields in which a config of another tool names the architecture, where the tensors' names leave it open."""
_SHORT = {
    name: {layout.kind, name.lower(), f"{layout.kind}sae", f"{layout.kind}trainer", f"trainer{layout.kind}"}
    for name, layout in LAYOUTS.items()
}


class DictionaryLearning(Format):
    """Reader and writer of dictionary_learning's files."""

    name = "dictionary_learning"
    title = "dictionary_learning: ae.pt + config.json"
    writes = ("relu", "gated", "topk", "batchtopk", "matryoshka", "jumprelu")
    facts = dictionary_learning_config.FACTS
    training = dictionary_learning_config.TRAINING

    def recognise(self, place: Place) -> bool:
        """By the name ae.pt or ae_STEP.pt, or a config with trainer.dict_class, and by keys where these can be read."""
        path = place.find(*_PATTERNS)
        if path is None and place.file is not None and place.file.suffix == ".pt":
            try:
                path = place.file if "dict_class" in dictionary_learning_config.find(place.file).get("trainer", {}) else None
            except DictionaryError:
                return False
        if path is None:
            return False
        keys = _weights(place, path, quiet=True).keys()
        return not keys or any(set(layout.names.values()) - {"decoder.weight"} <= set(keys) for layout in LAYOUTS.values())

    def read(self, place: Place) -> Dictionary:
        """The dictionary; ``details["writer"]`` is the config's "trainer", with its "buffer" inside.

        Raises:
            DictionaryError: see the base class.
        """
        path = self._file(place)
        config = self._config(place, path)
        trainer, buffer = config.part("trainer"), config.part("buffer")
        if buffer.get("io") == "in_and_out":
            self.refuse(
                path,
                "this is a transcoder: it writes to another place than it reads from; evalkit takes autoencoders",
                "choose an SAE of the same model and layer",
            )
        stored = _weights(place, path)
        name = self._class(stored, trainer, path)
        layout = LAYOUTS[name]
        tensors = self._tensors(stored, layout, trainer, path)
        writer: dict[str, Any] = {**trainer, "dict_class": name, "buffer": dict(buffer)}
        details: dict[str, Any] = {"format": self.name, "writer": writer}
        if not trainer:
            what = f"no {CONFIG} says which class wrote it: read as {name} ({layout.kind}), the one that its tensors' names fit"
            note(details, f"{what}; a TopK or another rule under the same names would be another function")
        settings: dict[str, Any] = {"subtract_b_dec": layout.subtract_b_dec}
        if layout.kind in ("topk", "batchtopk", "matryoshka"):
            k = self._k(stored, trainer, path, required=layout.kind == "topk")
            writer |= {} if k is None else {"k": k}
        if layout.kind == "topk":
            settings["k"] = k
            if "threshold" in stored:
                writer["threshold"] = float(matrix(stored, "threshold", (), path))
        elif layout.kind == "matryoshka":
            settings["groups"] = _integers(stored, "group_sizes", path)
        try:
            return DICTIONARIES.get(layout.kind).build(
                tensors,
                settings,
                hook_point=dictionary_learning_config.hook_point(trainer, buffer),
                model=str(trainer.get("lm_name") or ""),
                details=details,
            )
        except DictionaryError as error:
            where = f"{path}: {error.where}" if error.where else str(path)
            raise DictionaryError(error.what, where=where, fix=error.fix) from error

    def _config(self, place: Place, path: Path) -> Fields:
        """The config beside the weights, or else the one inside their file."""
        found = dictionary_learning_config.find(path)
        if not found:
            inside = place.inside(path)
            inside.asked.update(inside)  # accounted for below, as numbers and words
            there = {name: plain(value) for name, value in inside.items()}
            found = there if isinstance(there.get("trainer"), dict) else {"trainer": there} if there else {}
        return place.track(found)

    def _file(self, place: Place) -> Path:
        if place.file is not None:
            return place.file
        found = next((paths for pattern in _PATTERNS if (paths := sorted(place.folder.glob(pattern)))), [])
        if len(found) != 1:
            listed = ", ".join(str(path.relative_to(place.folder)) for path in found)
            what = f"there are several SAEs: {listed}" if found else f"there is no {WEIGHTS}"
            self.refuse(place, what, f"name one file, or the folder that holds one {WEIGHTS}")
        return found[0]

    def _class(self, stored: Mapping[str, Any], trainer: Mapping[str, Any], path: Path) -> str:
        """The library's class: as declared, else the only one whose files have these names."""
        keys = set(stored)
        declared = trainer.get("dict_class")
        if declared is not None:
            if not isinstance(declared, str) or declared not in LAYOUTS:
                self.refuse(path, f"evalkit has no dictionary_learning class '{declared}'", near_miss(str(declared), LAYOUTS))
            layout = LAYOUTS[declared]
            allowed = {*layout.names.values(), *layout.needs, *layout.may}
            if strange := sorted(keys - allowed):
                self.refuse(
                    path,
                    f"the config says {declared}, whose files have no {', '.join(strange)}",
                    f"check that {CONFIG} belongs to this file",
                )
            return declared
        fitting = [
            name
            for name, (_, names, _, _, needs, may) in LAYOUTS.items()
            if {*names.values(), *needs} <= keys <= {*names.values(), *needs, *may}
        ]
        if not fitting:
            self.refuse(
                path,
                f"these are the tensors of none of dictionary_learning's classes: {', '.join(sorted(keys))}",
                f"known: {', '.join(LAYOUTS)}",
            )
        if len(fitting) > 1:
            named = {str(trainer.get(field)).lower().replace("_", "") for field in _ARCHITECTURE if trainer.get(field)}
            fitting = [name for name in fitting if named & _SHORT[name]] or fitting
        if len(fitting) > 1:
            self.refuse(
                path,
                f"this file can be {' or '.join(fitting)}: their tensors have the same names, but they compute different codes",
                f'put a {CONFIG} beside it that says which: {{"trainer": {{"dict_class": "{fitting[0]}"}}}} '
                "(--format does not tell them apart)",
            )
        return fitting[0]

    def _tensors(
        self, stored: Mapping[str, Any], layout: Layout, trainer: Mapping[str, Any], path: Path
    ) -> dict[str, torch.Tensor]:
        """The weights under evalkit's names and in its orientation, sizes checked against the config."""
        names = layout.names
        bias = next(name for name in ("b_enc", "b_gate") if name in names)
        D, F = (matrix(stored, names[name], (-1,), path).shape[0] for name in ("b_dec", bias))
        for name, size in (("activation_dim", D), ("dict_size", F)):
            if name in trainer and number(trainer, name, path) != size:
                what = f"the config says {name} = {trainer[name]}, the weights say {size}"
                self.refuse(path, what, f"check that {CONFIG} belongs to these weights")
        shapes: dict[str, tuple[int, ...]] = {name: (F,) for name in names} | {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
        tensors = {}
        for name, theirs in names.items():
            turned = layout.linear and name in ("W_enc", "W_dec")
            tensor = matrix(stored, theirs, shapes[name][::-1] if turned else shapes[name], path)
            tensors[name] = tensor.T.contiguous() if turned else tensor
        for name in layout.needs:
            if name not in stored:
                what = "the threshold was never tracked" if name == "threshold" else "its groups are not known"
                self.refuse(path, f"the file lacks '{name}': {what}", "take a later checkpoint, or train with a newer version")
        if "threshold" in layout.needs:
            tensors["threshold"] = matrix(stored, "threshold", (), path)
        return tensors

    def _k(self, stored: Mapping[str, Any], trainer: Mapping[str, Any], path: Path, required: bool) -> int | None:
        """k, in new files beside the weights, in the oldest only in the config."""
        declared = trainer.get("k")
        if "k" in stored:
            k = _integers(stored, "k", path)[0]
            if declared is not None and number(trainer, "k", path) != k:
                self.refuse(path, f"the config says k = {declared}, the file says {k}", "correct the one that is wrong")
            return number({"k": k}, "k", path)
        if declared is None and required:
            self.refuse(
                path,
                "this is a TopK SAE, and neither the file nor a config says k",
                f'put a {CONFIG} beside it: {{"trainer": {{"dict_class": "AutoEncoderTopK", "k": ...}}}}',
            )
        return None if declared is None else number(trainer, "k", path)

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """``ae.pt`` and ``config.json`` into ``folder``.

        Raises:
            DictionaryError: none of the library's classes computes what the dictionary computes.
        """
        if not isinstance(dictionary, Autoencoder) or dictionary.kind not in self.writes:
            self.refuse(folder, f"dictionary_learning has no '{dictionary.kind}'", f"kinds it has: {', '.join(self.writes)}")
        wiring = dictionary.wiring
        more = sorted(set(wiring.changed()) - {"subtract_b_dec"})
        fitting = [
            name
            for name, layout in LAYOUTS.items()
            if layout.kind == dictionary.kind and layout.subtract_b_dec == wiring.subtract_b_dec
        ]
        if more or not fitting:
            what = more[0] if more else "subtract_b_dec"
            self.refuse(
                f"{what} = {getattr(wiring, what)!r}",
                f"dictionary_learning has no '{dictionary.kind}' SAE with this setting",
                "keep it in evalkit's own format, or fold the setting into weights and biases where that is exact",
            )
        name, layout = fitting[0], LAYOUTS[fitting[0]]
        config = dictionary_learning_config.describe(dictionary, name)
        ours, trainer = dictionary.tensors(), config["trainer"]
        state: dict[str, torch.Tensor] = {}
        if "k" in layout.may:
            state["k"] = torch.tensor(trainer["k"], dtype=torch.int32)
        if layout.kind == "topk":
            tracked = trainer.get("threshold")
            state["threshold"] = torch.tensor(float(tracked) if isinstance(tracked, int | float) else -1.0)
        elif "threshold" in layout.needs:
            state["threshold"] = ours["threshold"]
        if "group_sizes" in layout.needs:
            state["group_sizes"] = torch.tensor(trainer["group_sizes"])
        for mine, theirs in layout.names.items():
            state[theirs] = ours[mine].T if layout.linear and mine in ("W_enc", "W_dec") else ours[mine]
        text = json.dumps(config, indent=4, allow_nan=False) + "\n"
        torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(text, encoding="utf-8")


def _integers(stored: Mapping[str, Any], name: str, path: Path) -> list[int]:
    """The whole numbers of the buffer ``name``."""
    value = stored[name]
    found = value.reshape(-1).tolist() if isinstance(value, torch.Tensor) else [value]
    if not found or not all(isinstance(item, int) and not isinstance(item, bool) for item in found):
        raise DictionaryError(f"'{name}' holds no whole numbers", where=str(path), fix="fetch the file again")
    return found


def _weights(place: Place, path: Path, quiet: bool = False) -> dict[str, Any]:
    """What ``path`` holds; the decoder that one branch of the library stored as a bare (F, D) parameter under its usual name."""
    try:
        stored = place.weights(path)
    except DictionaryError:
        if quiet:
            return {}
        raise
    bare = stored.get("decoder")
    if isinstance(bare, torch.Tensor) and bare.ndim == 2 and "decoder.weight" not in stored:
        stored["decoder.weight"] = stored.pop("decoder").T
    return stored


FORMATS.register(DictionaryLearning.name)(DictionaryLearning())
