"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, final files and training checkpoints, versions 1 to 6.

1. W_enc (D, F), W_dec (F, D), b_enc (F,), b_dec (D,); gated has b_gate, b_mag, r_mag (F,) for b_enc; jumprelu has threshold
   (F,), in old checkpoints log_threshold; a batchtopk or matryoshka checkpoint has the scalar topk_threshold.
2. x is normalised, b_dec subtracted where apply_b_dec_to_input; pre = x @ W_enc + b_enc; with rescale_acts_by_decoder_norm pre
   is multiplied by ||W_dec||, and codes are divided by it before they are decoded.
3. SAELens exports batchtopk and matryoshka as a jumprelu of equal thresholds whose metadata names the training architecture:
   they are read as what they were trained as; a matryoshka whose group widths were not kept is read as batchtopk.
4. expected_average_only_in multiplies x by a factor that stands in a checkpoint's activation_scaler.json alone (final files
   have it folded in and say "none"). SAELens leaves it out where it loads such a checkpoint for inference; here it is applied.
5. covariance_whitening, z = (x - mean) @ M, is affine and folded into the weights in float64. An old scaling_factor (F,)
   multiplies codes before decoding: it becomes part of the decoder's rows.
6. Written is version 6; batchtopk and matryoshka as SAELens exports them, or, where codes are rescaled by decoder norms, as a
   training checkpoint. Reading it back is exact to the bit.

Source: SAELens (https://github.com/decoderesearch/SAELens). The config is ``saelens_config``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from evalkit.dictionaries.autoencoder import Autoencoder
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix
from evalkit.dictionaries.formats.saelens import config as saelens_config
from evalkit.dictionaries.formats.saelens.config import BATCH, CONFIG, Description
from evalkit.dictionaries.registry import DICTIONARIES
from evalkit.errors import DictionaryError

WEIGHTS, SCALER, WHITENING = "sae_weights.safetensors", "activation_scaler.json", "activation_whitening.safetensors"
_FINETUNED = ("scaling_factor", "finetuning_scaling_factor")


class SAELens(Format):
    """Reader and writer of SAELens' files."""

    name = "saelens"
    title = "SAELens: cfg.json + sae_weights.safetensors"
    writes = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
    facts = saelens_config.FACTS
    training = saelens_config.TRAINING

    def recognise(self, place: Place) -> bool:
        """By the two files' names, and W_enc or W_dec among the keys where these can be read."""
        if place.file is not None and place.file.name not in (WEIGHTS, CONFIG):
            return False
        path, config = place.beside(WEIGHTS), place.beside(CONFIG)
        if path is None or config is None:
            return False
        keys = place.keys(path)
        return not keys or bool(keys & {"W_enc", "W_dec"})

    def read(self, place: Place) -> Dictionary:
        """The dictionary; ``details["writer"]`` is the config, and ``details["reads"]`` is there for attention heads.

        An input scale that only SAELens' directory knows (``Place.scale``) is used as SAELens uses it.

        Raises:
            DictionaryError: see the base class.
        """
        path = place.beside(WEIGHTS)
        if path is None:
            self.refuse(place, f"there is no {WEIGHTS}", f"give the folder that holds {CONFIG} and {WEIGHTS}")
        says = saelens_config.read(place)
        tensors = self._tensors(place, path, says)
        normalise, scale = says.normalise, 1.0
        decoder_norm = "codes" if says.rescale else "none"
        if normalise == "constant":
            scale = self._scale(place)
            normalise = "none" if scale == 1.0 else normalise
        elif normalise == "whitening":
            tensors = self._fold_whitening(place, tensors, says)
            normalise, decoder_norm = "none", "none"
        settings = {"subtract_b_dec": says.subtract_b_dec, "normalise": normalise, "scale": scale, "centre": says.centre}
        kind, own, tensors = _kind(says, tensors)
        details = {"format": self.name, **says.details, **({"reads": says.reads} if says.reads else {})}
        if scale != 1.0:
            details["made_with"] = {"scaling_factor": scale}
        try:
            return DICTIONARIES.get(kind).build(
                tensors,
                {**settings, "decoder_norm": decoder_norm, **own},
                hook_point=says.hook_point,
                model=says.model,
                details=details,
            )
        except DictionaryError as error:
            where = f"{path}: {error.where}" if error.where else str(path)
            raise DictionaryError(error.what, where=where, fix=error.fix) from error

    def _tensors(self, place: Place, path: Path, says: Description) -> dict[str, torch.Tensor]:
        """The weights under evalkit's names, shapes checked against the config, old factors folded."""
        stored = place.weights(path)
        D, F = says.d_in, says.d_sae
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag") if says.architecture == "gated" else ("b_enc",), (F,))
        if says.architecture == "jumprelu":
            shapes["log_threshold" if "log_threshold" in stored and "threshold" not in stored else "threshold"] = (F,)
        elif says.architecture in BATCH:
            shapes["topk_threshold"] = ()
        if "W_skip" in stored:
            self.refuse(
                path,
                "this is a transcoder with a skip connection (W_skip): it writes to another place than it reads from; evalkit "
                "takes autoencoders",
                "choose an SAE of the same model and layer",
            )
        strange = sorted(set(stored) - set(shapes) - set(_FINETUNED))
        if strange:
            self.refuse(
                path,
                f"a '{says.architecture}' SAE has no tensor {', '.join(strange)}",
                f"check that the architecture in {CONFIG} belongs to these weights",
            )
        tensors = {name: matrix(stored, name, shape, path) for name, shape in shapes.items()}
        if "log_threshold" in tensors:
            tensors["threshold"] = tensors.pop("log_threshold").exp()
        if "topk_threshold" in tensors:
            tensors["threshold"] = tensors.pop("topk_threshold")
            if float(tensors["threshold"]) == 0.0:
                self.refuse(
                    path,
                    "topk_threshold is 0, its value before the first training step: it was never tracked",
                    "take a later checkpoint: without a threshold this is a plain ReLU SAE",
                )
        for name in _FINETUNED:
            if name in stored:
                tensors["W_dec"] = self._fold_factor(matrix(stored, name, (F,), path), tensors["W_dec"], path, says)
        return tensors

    def _fold_factor(self, factor: torch.Tensor, W_dec: torch.Tensor, path: Path, says: Description) -> torch.Tensor:
        if torch.allclose(factor, torch.ones_like(factor)):
            return W_dec
        if not says.finetuned or says.rescale:
            why = "rescale_acts_by_decoder_norm is on" if says.finetuned else "finetuning_scaling_factor is off in the config"
            self.refuse(
                path,
                f"the file scales codes by scaling_factor, but {why}: which function was meant is not known",
                f"correct {CONFIG}, or remove scaling_factor from the weights",
            )
        return W_dec * factor[:, None]

    def _scale(self, place: Place) -> float:
        scaler = place.config(SCALER)
        scaler.get("has_whitening")
        factor = scaler.get("scaling_factor", place.scale)
        if not isinstance(factor, int | float) or isinstance(factor, bool):
            state = "has none" if place.beside(SCALER) else "is missing"
            self.refuse(
                place.folder / SCALER,
                f"activations were normalised by their average norm, and the file that holds the factor, {SCALER}, {state}",
                f'take the final SAE, where it is folded in, or write {SCALER}: {{"scaling_factor": sqrt(d_in) / mean norm}}',
            )
        return float(factor)

    def _fold_whitening(self, place: Place, tensors: Mapping[str, torch.Tensor], says: Description) -> dict[str, torch.Tensor]:
        """Weights that read x where the stored ones read z = (x - mean) @ M, computed in float64."""
        path = place.beside(WHITENING)
        if path is None:
            self.refuse(
                place.folder / WHITENING,
                f"activations were whitened, and the file that holds mean and matrix, {WHITENING}, is missing",
                "take the final SAE, which has it folded in, or fetch the file",
            )
        stored, D = place.weights(path), says.d_in
        for name, shape in (("mean", (D,)), ("matrix", (D, D)), ("inverse_matrix", (D, D))):
            matrix(stored, name, shape, path)
        mean, M, inverse = (stored[name].double() for name in ("mean", "matrix", "inverse_matrix"))
        if not torch.allclose(M @ inverse, torch.eye(D, dtype=torch.float64), atol=1e-4):
            self.refuse(path, "inverse_matrix is not the inverse of matrix", "fetch the file again")
        new = {name: tensor.double() for name, tensor in tensors.items()}
        if says.rescale:
            # the choice of active features depends on the norms of the rows before whitening is undone
            norms = new["W_dec"].norm(dim=1).clamp(min=1e-8)
            new["W_enc"], new["b_enc"], new["W_dec"] = new["W_enc"] * norms, new["b_enc"] * norms, new["W_dec"] / norms[:, None]
        new["W_enc"] = M @ new["W_enc"]
        new["W_dec"] = new["W_dec"] @ inverse
        new["b_dec"] = new["b_dec"] @ inverse + mean
        if not says.subtract_b_dec:
            shift = mean @ new["W_enc"]  # (F,)
            if says.architecture == "gated":
                new["b_gate"], new["b_mag"] = new["b_gate"] - shift, new["b_mag"] - shift * new["r_mag"].exp()
            else:
                new["b_enc"] = new["b_enc"] - shift
        return {name: tensor.float() for name, tensor in new.items()}

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """``cfg.json`` and ``sae_weights.safetensors`` into ``folder``.

        Raises:
            DictionaryError: SAELens computes nothing that equals the dictionary.
        """
        if not isinstance(dictionary, Autoencoder) or dictionary.kind not in self.writes:
            self.refuse(
                folder, f"SAELens has no dictionary of the kind '{dictionary.kind}'", f"kinds it has: {', '.join(self.writes)}"
            )
        config = saelens_config.describe(dictionary)
        tensors = dictionary.tensors()
        if dictionary.kind in ("batchtopk", "matryoshka"):
            threshold = tensors.pop("threshold")
            if config["architecture"] == "jumprelu":
                tensors["threshold"] = threshold.expand(dictionary.n_features)
            elif float(threshold) == 0.0:
                self.refuse(folder, "a SAELens checkpoint cannot hold the threshold 0", "keep it in evalkit's own format")
            else:
                tensors["topk_threshold"] = threshold.double()
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(text, encoding="utf-8")


def _kind(says: Description, tensors: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    """evalkit's kind, its own settings and its tensors."""
    trained_as = says.architecture
    if says.architecture == "jumprelu" and says.trained_as in BATCH:
        first = tensors["threshold"][0]
        if float(first) >= 0 and bool((tensors["threshold"] == first).all()):
            trained_as, tensors = says.trained_as, {**tensors, "threshold": first.clone()}
    if trained_as == "matryoshka_batchtopk":
        return ("matryoshka", {"groups": says.groups}, tensors) if says.groups else ("batchtopk", {}, tensors)
    if trained_as == "topk":
        return "topk", {"k": says.k}, tensors
    return {"standard": "relu"}.get(trained_as, trained_as), {}, tensors


FORMATS.register(SAELens.name)(SAELens())
