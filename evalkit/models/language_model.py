"""A language model seen through its hook points (TransformerLens names): read an activation there, or run on from another.

1. ``activations`` runs the model forward and cuts the run off at the hook point itself: what lies behind it, the logits
   first of all, is never computed.
2. ``logits_with`` puts another activation in. For the residual stream (hook_resid_pre, hook_resid_mid, hook_resid_post) the
   blocks before are skipped altogether: each hands on the replacement. TransformerLens' own start_at_layer computes those
   blocks and throws the result away, and does not reach behind the last block.
3. TransformerLens' hook_resid_mid sits on the input of the second norm, behind the residual branch: writing to it changes
   the MLP only. Here the difference is added to the block's output as well, so that the residual stream itself is replaced.
4. For every other hook point the whole model runs and the activation is replaced on the way.

Runs are without gradients; what is returned is an ordinary tensor (not one of inference mode), so that a dictionary can be
trained on it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformers import DynamicCache

from evalkit.assets.catalog import ASSETS
from evalkit.errors import ModelError
from evalkit.models.loading import Loaded, ModelConfig, load
from evalkit.models.pretrained import seam, text_only
from evalkit.models.quiet import quiet
from evalkit.models.tokens import Bos, Tokens
from evalkit.util.progress import Progress
from evalkit.util.user_files import placed

FORMS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "mlp.hook_post",
    "attn.hook_z",
)
"""Hook points of a block that people use, where the architecture has them."""

Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
"""Hook point names with functions (activation, hook) that may return another activation."""


class LanguageModel:
    """A causal language model and its tokenizer.

    Attributes:
        config: what it was loaded from.
        identity: contents, dtype and, for random weights, the seed: same identity, same activations.
        label: short name for tables.
        tokenizer: the Hugging Face tokenizer.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_vocab: number of logits per position.
        context: longest sequence it can read.
        device: where it runs.
        bos: id of the token that every text is read behind; None where there is none.
    """

    def __init__(self, config: ModelConfig, loaded: Loaded, bos: Bos = "auto") -> None:
        self.config, self.identity, self.label, self.tokenizer = config, loaded.identity, loaded.label, loaded.tokenizer
        architecture = loaded.model.config.get_text_config()  # models for text and images have their sizes one level down
        cannot = f"TransformerLens cannot wrap a model of type '{loaded.model.config.model_type}'"
        fix = "use a decoder-only model with a stack of blocks, such as GPT-2, Pythia, Llama, Qwen or Gemma"
        # read before wrapping: the wrapper replaces the modules
        embedded = int(loaded.model.get_input_embeddings().weight.shape[0])
        with quiet(), seam(cannot, self.label, fix), text_only():
            self.n_vocab = int(loaded.model.get_output_embeddings().weight.shape[0])
            self._bridge = TransformerBridge.boot_transformers(
                loaded.tokenizer.name_or_path,
                hf_model=loaded.model,
                tokenizer=loaded.tokenizer,
                device=loaded.model.device,
                dtype=loaded.model.dtype,
            )
            self._blocks = list(self._bridge.blocks)
            self.d_model = int(architecture.hidden_size)
        self._config = loaded.model.config
        self.device: torch.device = loaded.model.device
        self.dtype: torch.dtype = loaded.model.dtype
        self.n_layers = len(self._blocks)
        self.context = int(getattr(architecture, "max_position_embeddings", 1 << 30))
        self._n_heads = int(getattr(architecture, "num_attention_heads", 1))
        self._points: dict[str, Any] = self._bridge.hook_dict
        self._widths: dict[str, int] = {}
        self._strings: dict[int, str] = {}
        self._tokens = Tokens(loaded.tokenizer, embedded, loaded.label, bos)
        self.bos = self._tokens.bos

    @classmethod
    def load(cls, config: ModelConfig, progress: Progress, bos: Bos = "auto") -> LanguageModel:
        """Load the model that ``config`` names; ``bos`` says what its texts begin with (``models.tokens``).

        Raises:
            ModelError: it is not there, cannot be reached, is not whole or not supported, or lacks the BOS that is asked for.
            AssetError: a packaged model is not installed.
        """
        return cls(config, load(config, progress), bos)

    def check_hook_point(self, name: str) -> None:
        """Make sure that ``name`` is a hook point of this model with one vector per token.

        Raises:
            ModelError: it is not; the message names the near miss and the usual forms.
        """
        self.width(name)

    def width(self, hook_point: str) -> int:
        """Width D of the activations at ``hook_point``; heads are laid side by side. Raises as ``check_hook_point``."""
        if hook_point not in self._widths:
            if hook_point not in self._points:
                raise self._unknown(hook_point)
            tokens = torch.zeros(2, self._n_heads + 1, dtype=torch.int64)
            try:
                found = self._forward(tokens, [(hook_point, _stop)])
            except ValueError as error:
                raise self._unusable(hook_point, "it is switched off") from error
            if found is None:
                raise self._unusable(hook_point, "it is never reached")
            if found.ndim not in (3, 4) or found.shape[:2] != tokens.shape:
                raise self._unusable(hook_point, f"its shape for {tuple(tokens.shape)} tokens is {tuple(found.shape)}")
            self._widths[hook_point] = found[0, 0].numel()
        return self._widths[hook_point]

    def activations(self, tokens: Int[torch.Tensor, "B T"], hook_point: str) -> Float[torch.Tensor, "B T D"]:
        """Activations at ``hook_point``, float32, on the model's device. The run ends there.

        Raises:
            ModelError: no such hook point, or T is longer than the model can read.
        """
        self.check_hook_point(hook_point)
        return self._forward(tokens, [(hook_point, _stop)]).float().flatten(2)

    def activations_at(
        self, tokens: Int[torch.Tensor, "B T"], hook_points: Sequence[str]
    ) -> dict[str, Float[torch.Tensor, "B T D"]]:
        """Activations at each of several hook points from one run, which ends at the last of them; as ``activations``.

        Raises:
            ModelError: no such hook point, or T is longer than the model can read.
        """
        found: dict[str, torch.Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def keep(value: torch.Tensor, hook: Any) -> None:
                # a copy: what comes later in the run may write into the same memory
                found[name] = value.to(torch.float32, copy=True).flatten(2)
                if len(found) == len(set(hook_points)):
                    raise StopAtLayerException(value)

            return keep

        for name in hook_points:
            self.check_hook_point(name)
        self._forward(tokens, [(name, note(name)) for name in dict.fromkeys(hook_points)])
        return found

    def logits(self, tokens: Int[torch.Tensor, "B T"]) -> Float[torch.Tensor, "B T V"]:
        """Logits of the next token at every position, float32, on the model's device."""
        return self._forward(tokens, [], "logits").float()

    def logits_with(
        self, tokens: Int[torch.Tensor, "B T"], hook_point: str, replacement: Float[torch.Tensor, "B T D"]
    ) -> Float[torch.Tensor, "B T V"]:
        """Logits when the activation at ``hook_point`` is ``replacement``, float32, on the model's device.

        ``tokens`` still matter for hook points outside the residual stream: everything not replaced is computed from them.

        Raises:
            ModelError: no such hook point, or the replacement's shape is not (B, T, D).
        """
        expected = (*tokens.shape, self.width(hook_point))
        if tuple(replacement.shape) != expected:
            raise ModelError(
                f"the replacement has shape {tuple(replacement.shape)}, expected {expected}",
                where=hook_point,
                fix="use a dictionary that was fitted at this hook point of this model",
            )
        value = replacement.to(self.device, self.dtype)
        replace: Hooks = [(hook_point, lambda found, hook: value.reshape(found.shape))]
        middle = re.fullmatch(r"blocks\.(\d+)\.hook_resid_mid", hook_point)
        edge = re.fullmatch(r"blocks\.(\d+)\.hook_(in|out)", self._points[hook_point].name or "")
        if middle:
            with self._skipping(int(middle[1]), value):
                return self._forward(tokens, self._residual_mid(hook_point, int(middle[1]), value), "logits").float()
        if edge and self._can_skip and (skipped := int(edge[1]) + (edge[2] == "out")):
            with self._skipping(skipped, value):
                return self._forward(tokens, [], "logits").float()
        return self._forward(tokens, replace, "logits").float()

    @property
    def can_skip(self) -> bool:
        """Whether ``run`` can enter behind some of the blocks (``enter``)."""
        return self._can_skip

    def has(self, hook_point: str) -> bool:
        """Whether there is a hook of this name, whatever it holds."""
        return hook_point in self._points

    def run(
        self,
        tokens: Int[torch.Tensor, "J M"],
        hooks: Sequence[tuple[str, Callable[..., Any]]] | Hooks,
        *,
        enter: tuple[int, Float[torch.Tensor, "J M D"]] | None = None,
        **inputs: Any,
    ) -> Any:
        """One forward pass with ``hooks``, for work that ``logits_with`` is too coarse for.

        Gradients flow where they are switched on. A hook may end the pass (``stop_here``); None is returned then.

        Args:
            hooks: names with functions (activation, hook) that may return another activation.
            enter: (n, value): the first n blocks do nothing but hand on ``value``; needs ``can_skip``.
            inputs: further arguments of the transformers model: attention_mask, position_ids, past_key_values, use_cache.

        Returns:
            What the transformers model returns: ``logits`` and, where asked for, ``past_key_values``.
        """
        skipping: Any = self._skipping(*enter) if enter else nullcontext()
        with self._bridge.hooks(fwd_hooks=list(hooks)), skipping:
            try:
                return self._bridge.original_model(input_ids=tokens.to(self.device), **inputs)
            except StopAtLayerException:
                return None

    def empty_cache(self) -> DynamicCache:
        """Keys and values of no position yet, of the kind that each of the model's blocks keeps."""
        return DynamicCache(config=self._config)

    def tokenise(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands in running text, without special tokens, of any length.

        Raises:
            ModelError: the tokenizer cannot read the text, or makes a token that the model has no embedding for.
        """
        return self._tokens.tokenise(text)

    def opened(self, text: str) -> list[int]:
        """Token ids of ``text`` as the model reads it: behind ``bos``, where there is one. Raises as ``tokenise``."""
        return self._tokens.opened(text)

    @property
    def special(self) -> frozenset[int]:
        """Ids of the tokenizer's BOS, EOS and padding, as far as it has them."""
        found = (getattr(self.tokenizer, f"{which}_token_id", None) for which in ("bos", "eos", "pad"))
        return frozenset(int(token) for token in found if token is not None)

    def token_string(self, token: int) -> str:
        """One token as the tokenizer spells it: special ones by their names."""
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """One string for each token, leading spaces kept; bytes that are no text alone are shown as U+FFFD."""
        for token in ids:
            if token not in self._strings:
                text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
                # Tokenizers in the manner of sentencepiece drop the space in front of a text's first token.
                marked = str(self.tokenizer.convert_ids_to_tokens(int(token))).startswith("\u2581")
                self._strings[token] = " " + text if marked and not text.startswith(" ") else text
        return [self._strings[token] for token in ids]

    def _forward(self, tokens: torch.Tensor, hooks: Hooks, returns: str | None = None) -> Any:
        if tokens.shape[-1] > self.context:
            raise ModelError(
                f"{tokens.shape[-1]} tokens are more than the {self.context} this model can read at once",
                where=self.label,
                fix="make the context shorter",
            )
        with torch.no_grad():
            return self._bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=hooks, return_type=returns, use_cache=False)

    def _residual_mid(self, hook_point: str, layer: int, value: torch.Tensor) -> Hooks:
        """Hooks that replace the residual stream between attention and MLP of one block, for both of its branches."""
        change: list[torch.Tensor] = []

        def enter(found: torch.Tensor, hook: Any) -> torch.Tensor:
            change.append(value - found)
            return value

        def leave(found: torch.Tensor, hook: Any) -> torch.Tensor:
            return found + change.pop()

        return [(hook_point, enter), (f"blocks.{layer}.hook_out", leave)]

    @contextmanager
    def _skipping(self, count: int, value: torch.Tensor) -> Iterator[None]:
        """The first ``count`` blocks do nothing but hand on ``value``."""
        blocks = self._blocks[:count] if self._can_skip else []
        for block in blocks:
            # The bridge's attribute setter forwards to the wrapped module; the instance dictionary does not.
            block.__dict__["forward"] = lambda *args, **kwargs: value
        try:
            yield
        finally:
            for block in blocks:
                del block.__dict__["forward"]

    @cached_property
    def _can_skip(self) -> bool:
        """Whether blocks hand on a bare tensor. Some architectures pass tuples with more in them; those run in full."""
        kinds: list[type] = []
        handle = self._blocks[0].register_forward_hook(lambda block, args, output: kinds.append(type(output)))
        try:
            self._forward(torch.zeros(1, 1, dtype=torch.int64), [], "logits")
        finally:
            handle.remove()
        return kinds == [torch.Tensor]

    def _forms(self) -> str:
        forms = ", ".join(f"blocks.L.{form}" for form in FORMS if f"blocks.0.{form}" in self._points)
        return f"use one of {forms}, with L from 0 to {self.n_layers - 1}"

    def _unknown(self, name: str) -> ModelError:
        points = {point.casefold(): point for point in self._points}
        close = difflib.get_close_matches(name.casefold(), points, n=1, cutoff=0.5)
        hint = f"did you mean '{points[close[0]]}'? " if close else ""
        return ModelError(f"{self.label} has no hook point '{name}'", where="hook_points", fix=hint + self._forms())

    def _unusable(self, name: str, reason: str) -> ModelError:
        return ModelError(f"'{name}' does not hold one vector per token: {reason}", where="hook_points", fix=self._forms())


def _stop(found: torch.Tensor, hook: Any) -> None:
    raise StopAtLayerException(found)


stop_here = _stop
"""A hook that ends ``LanguageModel.run`` where it stands."""


def load_model(name: str, progress: Progress | None = None, bos: Bos = "auto") -> LanguageModel:
    """A language model by packaged name, folder, GGUF file or hub name, on the default device in float32; ``bos`` as ``load``.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    if name in ASSETS:
        config = ModelConfig(package=name)
    elif placed(name).exists():
        config = ModelConfig(path=name)
    else:
        config = ModelConfig(name=name)
    return LanguageModel.load(config, progress or Progress(quiet=True), bos)
