"""A Hugging Face causal LM that reads distributions at chosen places of many prompts, and generates.

Reading what has to be read of a prompt is the whole cost of a judge on a CPU, so:

1. The prompts of a request share a beginning (few-shot examples, explanation). Its keys and values are computed once and kept:
   a small store, least recently used out first, from which any shorter beginning can be cut.
2. What is left of each prompt is padded on the right and run in batches of limited size. Causal attention never looks at padding
   that comes later, so no real position sees it.
3. The vocabulary projection runs only where a distribution is wanted.
4. Generation goes on from the padded batch: padding is masked and every row counts its own positions, so that a prompt gets the
   same answer alone and in company.

**Slots.** A distribution is wanted after a character offset, but tokens need not end there. Prompts are therefore tokenised piece
by piece, cut at the slots: each slot is a token boundary by construction, and the text in front of a slot is tokenised without
looking past it, as it would be if the model were to go on from there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values (1, heads, tokens, width) of every layer."""


class BadRequest(Exception):
    """The request cannot be served; ``code`` is the machine-readable reason."""

    def __init__(self, message: str, code: str = "invalid_request_error") -> None:
        self.code = code
        super().__init__(message)


class Encoded(NamedTuple):
    """One tokenised prompt."""

    ids: list[int]
    offsets: list[int]
    """Where each token begins in the text."""
    slots: list[int]
    """Token index of each slot: the distribution of this token, given those before it, is wanted."""


class Position(NamedTuple):
    """The distribution of one token, given those before it."""

    logprob: float
    """Log probability of the token that stands there."""
    top: dict[str, float]
    """Log probabilities of the likeliest strings; tokens that read alike are added up."""


class Generated(NamedTuple):
    """What was generated behind one prompt."""

    text: str
    ids: list[int]
    """Tokens, with the end token where there is one; the text leaves that out."""
    finish: str
    """'stop' or 'length'."""
    positions: list[Position]
    """One for each token; empty where not asked for."""


def native_dtype() -> str:
    """'bfloat16' where the processor (or a GPU) multiplies it natively, else 'float32': elsewhere bfloat16 is far slower."""
    if torch.cuda.is_available():
        return "bfloat16"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


class Engine:
    """One model and its tokenizer. Not thread-safe: the server puts a lock around it.

    Args:
        model: a causal LM in eval mode whose logits are its output embeddings applied to its last hidden state.
        tokenizer: a fast tokenizer (it must know character offsets).
        batch_tokens: most tokens, padding included, in one reading pass; generation starts from passes of four times that,
            because a step costs nearly the same for one row and for many.
        kept_tokens: most tokens of shared beginnings whose keys and values are kept; 0 keeps none.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int = 1200, kept_tokens: int = 12_000) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens, self.kept_tokens = batch_tokens, kept_tokens
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)
        self.device = model.device
        self._strings: dict[int, str] = {}
        self._kept: OrderedDict[tuple[int, ...], KeyValues] = OrderedDict()
        ends = [tokenizer.eos_token_id, *tokenizer.all_special_ids]
        for config in (model.config, model.generation_config):
            found = getattr(config, "eos_token_id", None)
            ends += found if isinstance(found, list) else [found]
        self._ends = {token for token in ends if token is not None}

    @classmethod
    def load(cls, folder: Path, dtype: str = "auto") -> Engine:
        """The model in a Hugging Face folder, on a GPU if there is one.

        Raises:
            ValueError: its logits are not its output embeddings applied to the last hidden state, or its tokenizer is slow.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        name = native_dtype() if dtype == "auto" else dtype
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name), local_files_only=True).eval()
        for setting in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, setting, None) not in (None, 1, 1.0):
                raise ValueError(f"models with {setting} cannot be served by this engine")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer has no fast version, which is needed for character offsets")
        on_gpu = torch.cuda.is_available()
        return cls(model.to("cuda") if on_gpu else model, tokenizer, 16_384 if on_gpu else 1200)

    def encode(self, text: str, slots: Sequence[int] = (), room: int = 0) -> Encoded:
        """Tokenise ``text``, cut at ``slots`` (rising character offsets), leaving ``room`` tokens of the context free.

        Raises:
            BadRequest: a slot lies outside the text or the slots do not rise, or the prompt does not fit.
        """
        cuts = [0, *slots, len(text)]
        if any(b <= a for a, b in zip(cuts, cuts[1:], strict=False)) and (slots or not text):
            raise BadRequest(f"slots must rise and lie inside the prompt (0 < slot < {len(text)}); an empty prompt is not served")
        ids: list[int] = []
        offsets: list[int] = []
        at: list[int] = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            if start:
                at.append(len(ids))
            piece = self.tokenizer(text[start:end], add_special_tokens=start == 0, return_offsets_mapping=True)
            ids += piece["input_ids"]
            offsets += [start + begin for begin, _ in piece["offset_mapping"]]
        if len(ids) + room > self.context:
            raise BadRequest(
                f"this model's maximum context length is {self.context} tokens; the prompt has {len(ids)} "
                f"and {room} are to be generated",
                "context_length_exceeded",
            )
        return Encoded(ids, offsets, at)

    @torch.inference_mode()
    def read(
        self, prompts: Sequence[Encoded], top: int, every: bool = False, candidates: Sequence[str] = ()
    ) -> list[dict[int, Position]]:
        """Distributions at the slots of each prompt (at every token but the first with ``every``), by token index.

        The ``top`` likeliest tokens are given, and the ``candidates`` (those that are one token) however unlikely they are.
        """
        always = self._single(candidates)
        wanted = [list(range(1, len(p.ids))) if every else [s for s in p.slots if s > 0] for p in prompts]
        first = min((w[0] for w in wanted if w), default=1)
        shared, kept = self._beginning([p.ids for p in prompts], first - 1)
        found: list[dict[int, Position]] = [{} for _ in prompts]
        for rows in self._batches([len(p.ids) - shared for p in prompts], self.batch_tokens):
            hidden, _ = self._run([prompts[row].ids[shared:] for row in rows], shared, kept)
            places = [(i, row, at) for i, row in enumerate(rows) for at in wanted[row]]
            for chunk in range(0, len(places), 256):  # a chunk of logits stays below 200 MB
                part = places[chunk : chunk + 256]
                picked = torch.stack([hidden[i, at - 1 - shared] for i, _, at in part])
                targets = [prompts[row].ids[at] for _, row, at in part]
                for (_, row, at), position in zip(
                    part, self._positions(self._project(picked), targets, top, always), strict=True
                ):
                    found[row][at] = position
        return found

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Encoded],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        top: int = 0,
        candidates: Sequence[str] = (),
    ) -> list[Generated]:
        """Continue each prompt; alternatives as in ``read``.

        Sampling draws from a stream of its own for each prompt, so company changes nothing.
        """
        shared, kept = self._beginning([p.ids for p in prompts], min(len(p.ids) for p in prompts) - 1)
        done: dict[int, Generated] = {}
        for rows in self._batches([len(p.ids) - shared for p in prompts], 4 * self.batch_tokens):
            batch = [prompts[row].ids[shared:] for row in rows]
            streams = [_stream(seed, prompts[row].ids) for row in rows]
            said = self._continue(batch, shared, kept, max_tokens, temperature, streams, stop, top, self._single(candidates))
            done.update(zip(rows, said, strict=True))
        return [done[row] for row in range(len(prompts))]

    def _continue(
        self,
        batch: list[list[int]],
        shared: int,
        kept: KeyValues,
        max_tokens: int,
        temperature: float,
        streams: list[torch.Generator],
        stop: Sequence[str],
        top: int,
        always: Sequence[int],
    ) -> list[Generated]:
        hidden, cache = self._run(batch, shared, kept)
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        last = hidden[torch.arange(len(batch), device=self.device), lengths - 1]  # (B, D)
        mask = torch.ones(len(batch), shared + hidden.shape[1], dtype=torch.long, device=self.device)
        mask[:, shared:] = torch.arange(hidden.shape[1], device=self.device) < lengths[:, None]
        ids: list[list[int]] = [[] for _ in batch]
        positions: list[list[Position]] = [[] for _ in batch]
        finish: list[str] = ["" for _ in batch]
        for step in range(max_tokens):
            logits = self._project(last)  # (B, V)
            chosen = [_choose(row, temperature, stream) for row, stream in zip(logits, streams, strict=True)]
            said = self._positions(logits, chosen, top, always) if top else []
            for row, token in enumerate(chosen):
                if finish[row]:
                    continue
                ids[row].append(token)
                positions[row] += said[row : row + 1]
                if token in self._ends or stop and any(word in self._text(ids[row]) for word in stop):
                    finish[row] = "stop"
            if all(finish) or step == max_tokens - 1:
                break
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            last = self.model.base_model(
                input_ids=torch.tensor(chosen, device=self.device)[:, None],
                past_key_values=cache,
                attention_mask=mask,
                position_ids=(shared + lengths + step)[:, None],
                use_cache=True,
            ).last_hidden_state[:, 0]
        return [
            Generated(_before(self._text(row), stop), row, end or "length", said)
            for row, end, said in zip(ids, finish, positions, strict=True)
        ]

    def _single(self, words: Sequence[str]) -> list[int]:
        """Ids of those words that are one token."""
        split = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return [ids[0] for ids in split if len(ids) == 1]

    def _text(self, ids: list[int]) -> str:
        words = [token for token in ids if token not in self._ends]
        return str(self.tokenizer.decode(words, clean_up_tokenization_spaces=False))

    def _run(self, suffixes: list[list[int]], shared: int, kept: KeyValues) -> tuple[torch.Tensor, Any]:
        """Hidden states (B, T, D) of right-padded suffixes behind a shared beginning, and the cache that holds both."""
        width = max(len(ids) for ids in suffixes)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in suffixes], device=self.device)
        cache = _cache([(k.expand(len(suffixes), -1, -1, -1), v.expand(len(suffixes), -1, -1, -1)) for k, v in kept])
        places = torch.arange(shared, shared + width, device=self.device).expand(len(suffixes), -1)
        mask = torch.ones(len(suffixes), shared + width, dtype=torch.long, device=self.device)
        out = self.model.base_model(
            input_ids=tokens, past_key_values=cache, position_ids=places, attention_mask=mask, use_cache=True
        )
        return out.last_hidden_state, cache

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in float32 of hidden states (N, D)."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        return logits.float()

    def _positions(self, logits: torch.Tensor, targets: list[int], top: int, always: Sequence[int] = ()) -> list[Position]:
        logprobs = logits.log_softmax(-1)  # (N, V)
        extra = logprobs[:, list(always)].tolist()  # (N, C)
        likeliest = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        of_target = logprobs.gather(-1, torch.tensor(targets, device=logprobs.device)[:, None])[:, 0].tolist()
        return [
            Position(value, self._merge([*values, *(m for _, m in more)], [*tokens, *(t for t, _ in more)]))
            for value, values, tokens, more in (
                (value, values, tokens, [(t, m) for t, m in zip(always, added, strict=True) if t not in tokens])
                for value, values, tokens, added in zip(
                    of_target, likeliest.values.tolist(), likeliest.indices.tolist(), extra, strict=True
                )
            )
        ]

    def string(self, token: int) -> str:
        """One token as text; bytes that are no whole character become U+FFFD."""
        if token not in self._strings:
            self._strings[token] = str(self.tokenizer.decode([token]))
        return self._strings[token]

    def _merge(self, values: list[float], tokens: list[int]) -> dict[str, float]:
        merged: dict[str, float] = {}
        for value, token in zip(values, tokens, strict=True):
            text = self.string(token)
            if text in merged:
                value = float(torch.logaddexp(torch.tensor(merged[text]), torch.tensor(value)))
            merged[text] = value
        return merged

    @staticmethod
    def _batches(widths: list[int], most: int) -> list[list[int]]:
        """Rows in groups of near-equal width, each group at most ``most`` tokens with its padding (one row at least)."""
        groups: list[list[int]] = []
        for row in sorted(range(len(widths)), key=lambda r: -widths[r]):
            if groups and (len(groups[-1]) + 1) * widths[groups[-1][0]] <= most:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def _beginning(self, prompts: list[list[int]], most: int) -> tuple[int, KeyValues]:
        """Length and keys and values of the prompts' common beginning, ``most`` tokens at most."""
        if not self.kept_tokens:
            return 0, []
        common = min(most, *(_agree(prompts[0], other) for other in prompts))
        if common <= 0:
            return 0, []
        target = tuple(prompts[0][:common])
        best = max(self._kept, key=lambda ids: _agree(ids, target), default=())
        have = _agree(best, target)
        kept = [(k[:, :, :have], v[:, :, :have]) for k, v in self._kept[best]] if have else []
        if have:
            self._kept.move_to_end(best)
        if have < common:
            cache = self._run([list(target[have:])], have, kept)[1]
            kept = [(layer.keys, layer.values) for layer in cache.layers]
            self._kept[target] = kept
            while sum(map(len, self._kept)) > self.kept_tokens and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return common, kept


def _cache(kept: KeyValues) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys, values, layer)
    return cache


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading items that are equal."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))


def _stream(seed: int, ids: list[int]) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}|{ids}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _choose(logits: torch.Tensor, temperature: float, stream: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=stream))


def _before(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first stop word."""
    cut = min((text.find(word) for word in stop if word in text), default=len(text))
    return text[:cut]
