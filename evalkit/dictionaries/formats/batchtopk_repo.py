"""The research code of the BatchTopK paper (Bussmann et al. 2024, arXiv 2412.06410): vanilla, TopK and JumpReLU autoencoders.

1. ``NAME_STEP/sae.pt`` is a state_dict: W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,) and, for JumpReLU,
   jumprelu.log_threshold (F,). ``config.json`` beside it holds the settings; some are there as strings ("True", "32").
2. With ``input_unit_norm`` each token is layer-normalised first and its mean and deviation are put back last.
3. vanilla: codes = ReLU((x - b_dec) @ W_enc + b_enc).
4. topk: codes = the k largest of ReLU((x - b_dec) @ W_enc). b_enc lies in the file, and this code never adds it.
5. jumprelu: codes = ReLU(x @ W_enc + b_enc) above exp(log_threshold); b_dec is not subtracted.
6. x_hat = codes @ W_dec + b_dec.

batchtopk files are refused: they keep k * B codes of every batch of B tokens and store no threshold, so that there is no function
of one token in them.
"""

from __future__ import annotations

from typing import Any

import torch

from evalkit.dictionaries.autoencoder import Wiring
from evalkit.dictionaries.base import Dictionary
from evalkit.dictionaries.formats.base import FORMATS, Format, Place, matrix, number
from evalkit.dictionaries.jumprelu import JumpReLU
from evalkit.dictionaries.relu import ReLU
from evalkit.dictionaries.topk import TopK
from evalkit.errors import DictionaryError
from evalkit.util.registry import near_miss

WEIGHTS, CONFIG, LOG_THRESHOLD = "sae.pt", "config.json", "jumprelu.log_threshold"
_KEYS = {"W_enc", "b_enc", "W_dec", "b_dec"}
_CLASSES: dict[str, type[ReLU] | type[TopK] | type[JumpReLU]] = {"vanilla": ReLU, "topk": TopK, "jumprelu": JumpReLU}
_PLAIN = {"True": True, "true": True, "False": False, "false": False, "None": None}


class BatchTopKRepo(Format):
    """Reader of the checkpoints of the BatchTopK repository."""

    name = "batchtopk_repo"
    title = "BatchTopK research code: config.json + sae.pt"
    facts = {
        "model_name": "model", "hook_point": "hook_point", "dataset_path": "dataset", "seq_len": "context_size",
        "input_unit_norm": "input_unit_norm", "model_dtype": "model_dtype",
    }  # fmt: skip
    training = (
        r"layer|site|model_batch_size|max_grad_norm|top_k|n_batches_to_dead|.*_dtype|.*_freq|group_sizes|l1_coeff|aux_penalty|max_.*_per_.*",
    )

    def recognise(self, place: Place) -> bool:
        """A config with act_size, dict_size and sae_type, and the four tensors under their plain names."""
        try:
            config = place.config(CONFIG)
        except DictionaryError:
            return False
        return {"act_size", "dict_size", "sae_type"} <= set(config) and place.keys(place.find(WEIGHTS)) >= _KEYS

    def read(self, place: Place) -> Dictionary:
        """The autoencoder; its ``details`` hold the config, strings turned back into what they were."""
        path = place.find(WEIGHTS)
        if path is None:
            self.refuse(place, f"there is no {WEIGHTS} here", "give the checkpoint's folder, NAME_STEP")
        stored = place.config(CONFIG)
        stored.asked.update(stored)  # accounted for below, as what its strings stand for
        config = place.track({name: _plain(value) for name, value in stored.items()})
        if not config:
            self.refuse(
                place, f"there is no {CONFIG} beside {path.name}: what the weights do is not known", "copy it from the checkpoint"
            )
        kind = self._kind(place, config)
        tensors = place.weights(path)
        width, features = number(config, "act_size", place), number(config, "dict_size", place)
        weights = {
            "W_enc": matrix(tensors, "W_enc", (width, features), place),
            "b_enc": matrix(tensors, "b_enc", (features,), place),
            "W_dec": matrix(tensors, "W_dec", (features, width), place),
            "b_dec": matrix(tensors, "b_dec", (width,), place),
        }
        wiring = Wiring(subtract_b_dec=kind != "jumprelu", normalise=self._normalise(place, config))
        where: dict[str, Any] = {
            "hook_point": str(config.get("hook_point") or ""),
            "model": str(config.get("model_name") or ""),
            "details": {"format": self.name, "writer": dict(config)},
        }
        own: dict[str, Any] = {}
        if kind == "jumprelu":
            weights["threshold"] = matrix(tensors, LOG_THRESHOLD, (features,), place).exp()
        elif kind == "topk":
            weights["b_enc"], own["k"] = torch.zeros(features), number(config, "top_k", place)
        try:
            return _CLASSES[kind](weights, wiring=wiring, **own, **where)
        except DictionaryError as error:
            raise DictionaryError(error.what, where=f"{path}: {error.where}", fix=error.fix) from error

    def _kind(self, place: Place, config: dict[str, Any]) -> str:
        kind = config.get("sae_type")
        if kind == "batchtopk":
            self.refuse(
                place,
                "this batchtopk file has no inference threshold: its trainer keeps the k * B largest codes of each batch, so that"
                " what a token's codes are depends on the tokens beside it",
                "with its trainer, average over batches the smallest code kept, and save the SAE with that threshold"
                " (SAELens 'jumprelu' or dictionary_learning 'BatchTopKSAE' files)",
            )
        if kind not in _CLASSES:
            self.refuse(place, f"there is no sae_type {kind!r}", near_miss(str(kind), _CLASSES))
        early = [n for n in ("tied_weights", "use_encoder_bias") if config.get(n)]
        early += ["activation"] if config.get("activation", "relu") != "relu" else []
        if early:
            self.refuse(
                place,
                f"the config sets {', '.join(early)}: an early version of the trainer, whose function this reader does not have",
                "train it again with the published version",
            )
        return str(kind)

    def _normalise(self, place: Place, config: dict[str, Any]) -> Any:
        value = config.get("input_unit_norm", False)
        if not isinstance(value, bool):
            self.refuse(place, f"the config says input_unit_norm = {value!r}, neither true nor false", "correct the config")
        return "layer_norm" if value else "none"


def _plain(value: Any) -> Any:
    """A value of the config, back from the string it may have been saved as; other strings stay."""
    if not isinstance(value, str):
        return value
    return int(value) if value.isdecimal() else _PLAIN.get(value, value)


FORMATS.register(BatchTopKRepo.name)(BatchTopKRepo())
