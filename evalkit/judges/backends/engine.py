"""A Hugging Face causal LM that reads distributions at chosen places of many prompts, and generates.

An answer must depend on its prompt alone: not on what else was asked at the time, nor on what happens to be cached. In bfloat16
the shape of a computation changes its last digits, and a scored correlation with them, so shapes follow from the text:

1. A prompt is read alone, in two pieces: up to its last blank line (the few-shot examples, the same for all tasks), and the rest.
2. Keys and values of first pieces are kept, least recently used out first. A kept piece is exactly what would be computed again.
3. The vocabulary projection runs only where a distribution is wanted.
4. Generation goes on token by token in groups, because a step costs nearly the same for one row and for eight. A group always
   has ``ROWS`` rows, and the keys of a row lie in ``BLOCK``-sized blocks of their own, so that each row is computed in the same
   shapes whoever else is in the group.

**Slots.** A distribution is wanted after a character offset, but tokens need not end there. Prompts are therefore tokenised piece
by piece, cut at the slots: each slot is a token boundary by construction, and the text in front of a slot is tokenised without
looking past it, as it would be if the model were to go on from there. A tokenizer that puts a blank in front of every piece, or
drops tabs and line ends, would make another text of the pieces: ``load`` refuses it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ROWS = 8
"""Rows of a generating group."""
BLOCK = 256
"""Prompts are padded to a multiple of this many tokens where they stand in a group."""

TRIED = ("Feature: words\nTokens:\n  The\t", "unknown\n red\t", "unknown\n,\t", "9\n")
"""Pieces of a prompt whose tokens must spell them."""

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
    head: int
    """Tokens of the first piece; 0 where the prompt has one piece."""


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
    """One model and its tokenizer. Not thread-safe.

    Args:
        model: a causal LM in eval mode whose logits are its output embeddings applied to its last hidden state.
        tokenizer: a fast tokenizer (it must know character offsets).
        kept_tokens: most tokens of first pieces whose keys and values are kept; 0 keeps none.
    """

    def __init__(self, model: Any, tokenizer: Any, kept_tokens: int = 12_000) -> None:
        self.model, self.tokenizer, self.kept_tokens = model, tokenizer, kept_tokens
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
        self.device = model.device
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        self.vocabulary = min(int(table.weight.shape[0]) for table in tables)
        """Token ids that the model has, from 0."""
        self._strings: dict[int, str] = {}
        self._kept: OrderedDict[tuple[int, ...], KeyValues] = OrderedDict()
        ends = [tokenizer.eos_token_id, *tokenizer.all_special_ids]
        for config in (model.config, model.config.get_text_config(), model.generation_config):
            found = getattr(config, "eos_token_id", None)
            ends += found if isinstance(found, list) else [found]
        self._ends = {token for token in ends if token is not None}

    @classmethod
    def load(cls, folder: Path, dtype: str = "auto") -> Engine:
        """The model in a Hugging Face folder, on a GPU if there is one.

        Raises:
            ModelError: it cannot be loaded, or sees the future.
            ValueError: its logits are not its output embeddings applied to the last hidden state, or its tokenizer is slow.
        """
        from evalkit.models.pretrained import check_causal, pretrained
        from evalkit.models.quiet import quiet

        name = native_dtype() if dtype == "auto" else dtype
        with quiet():
            model, tokenizer = pretrained(str(folder), getattr(torch, name), local=True, attention="")
        text = model.config.get_text_config()
        for setting in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(text, setting, None) not in (None, 1, 1.0):
                raise ValueError(f"models with {setting} cannot be served by this engine")
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer has no fast version, which is needed for character offsets")
        if torch.cuda.is_available():
            model = model.to("cuda")
        check_causal(model, str(folder))
        engine = cls(model, tokenizer)
        engine.check_pieces()
        return engine

    def check_pieces(self) -> None:
        """Raise ValueError where the tokens of a text's pieces do not spell the text: slots would be read in another text."""
        text = "".join(TRIED)
        found = self.encode(text, [len("".join(TRIED[:place])) for place in range(1, len(TRIED))])
        special = {*self.tokenizer.all_special_ids}
        said = self.tokenizer.decode([token for token in found.ids if token not in special], clean_up_tokenization_spaces=False)
        if said != text:
            raise ValueError(
                f"the tokenizer changes a text that it is given in pieces ({said[:60]!r}): this engine cannot read such a model; "
                "serve it with another server and use provider = 'openai'"
            )

    def encode(self, text: str, slots: Sequence[int] = (), room: int = 0) -> Encoded:
        """Tokenise ``text``, cut at ``slots`` (rising character offsets), leaving ``room`` tokens of the context free.

        Raises:
            BadRequest: a slot lies outside the text or the slots do not rise, a piece has no tokens or one that the model does
                not have, or the prompt does not fit.
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
            unknown = [token for token in piece["input_ids"] if token >= self.vocabulary]
            if unknown:
                raise BadRequest(
                    f"the tokenizer makes token {unknown[0]} of the prompt, and the model has {self.vocabulary}: its tokenizer "
                    "and its weights do not belong together"
                )
            if not piece["input_ids"]:
                raise BadRequest(f"characters {start} to {end} of the prompt have no tokens")
            ids += piece["input_ids"]
            offsets += [start + begin for begin, _ in piece["offset_mapping"]]
        if len(ids) + room > self.context:
            raise BadRequest(
                f"this model's maximum context length is {self.context} tokens; the prompt has {len(ids)} "
                f"and {room} are to be generated",
                "context_length_exceeded",
            )
        blank = text.rfind("\n\n", 0, cuts[1]) + 2
        head = bisect_left(offsets, blank) if blank > 2 else 0
        return Encoded(ids, offsets, at, min(head, min(at, default=len(ids)) - 1))

    @torch.inference_mode()
    def read(
        self, prompts: Sequence[Encoded], top: int, every: bool = False, candidates: Sequence[str] = ()
    ) -> list[dict[int, Position]]:
        """Distributions at the slots of each prompt (at every token but the first with ``every``), by token index.

        The ``top`` likeliest tokens are given, and the ``candidates`` (those that are one token) however unlikely they are.
        """
        always = self._single(candidates)
        return [self._read(prompt, top, every, always) for prompt in prompts]

    def _read(self, prompt: Encoded, top: int, every: bool, always: Sequence[int]) -> dict[int, Position]:
        wanted = list(range(1, len(prompt.ids))) if every else [slot for slot in prompt.slots if slot > 0]
        head = 0 if every else prompt.head
        hidden, _ = self._run(prompt.ids[head:], head, self._first_piece(prompt.ids[:head]))
        found: dict[int, Position] = {}
        for chunk in range(0, len(wanted), 256):  # a chunk of logits stays below 200 MB
            part = wanted[chunk : chunk + 256]
            logits = self._project(hidden[[at - 1 - head for at in part]])
            found.update(zip(part, self._positions(logits, [prompt.ids[at] for at in part], top, always), strict=True))
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
        """Continue each prompt; alternatives as in ``read``. Sampling draws from a stream of its own for each prompt."""
        always = self._single(candidates)
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(-(-len(prompt.ids) // BLOCK), []).append(row)
        done: dict[int, Generated] = {}
        for rows in groups.values():
            for first in range(0, len(rows), ROWS):
                part = rows[first : first + ROWS]
                group = [prompts[row] for row in part]
                done.update(zip(part, self._continue(group, max_tokens, temperature, seed, stop, top, always), strict=True))
        return [done[row] for row in range(len(prompts))]

    def _continue(
        self,
        group: list[Encoded],
        max_tokens: int,
        temperature: float,
        seed: int,
        stop: Sequence[str],
        top: int,
        always: Sequence[int],
    ) -> list[Generated]:
        last, cache = self._begin(group)
        streams = [_stream(seed, prompt.ids) for prompt in group]
        lengths = torch.tensor([len(prompt.ids) for prompt in group], device=self.device)
        lengths = torch.cat([lengths, lengths[:1].expand(ROWS - len(group))])  # rows without a prompt repeat the first
        width = -(-int(lengths.max()) // BLOCK) * BLOCK
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        ids: list[list[int]] = [[] for _ in group]
        positions: list[list[Position]] = [[] for _ in group]
        finish: list[str] = ["" for _ in group]
        for step in range(max_tokens):
            logits = self._project(last)[: len(group)]  # (N, V)
            chosen = [_choose(row, temperature, stream) for row, stream in zip(logits, streams, strict=True)]
            said = self._positions(logits, chosen, top, always) if top else []
            for row, token in enumerate(chosen):
                if finish[row]:
                    continue
                ids[row].append(token)
                positions[row] += said[row : row + 1]
                if token in self._ends or any(word in self._text(ids[row]) for word in stop):
                    finish[row] = "stop"
            if all(finish) or step == max_tokens - 1:
                break
            mask = torch.cat([mask, mask.new_ones(ROWS, 1)], dim=1)
            tokens = torch.tensor(chosen + chosen[:1] * (ROWS - len(group)), device=self.device)[:, None]
            last = self._forward(tokens, (lengths + step)[:, None], cache, mask)[:, 0]
        return [
            Generated(_before(self._text(row), stop), row, end or "length", found)
            for row, end, found in zip(ids, finish, positions, strict=True)
        ]

    def _begin(self, group: list[Encoded]) -> tuple[torch.Tensor, Any]:
        """Last hidden states (ROWS, D) of the prompts, each read alone, and their cache, padded to whole blocks."""
        states, rows = [], []
        for prompt in group:
            hidden, cache = self._run(prompt.ids[prompt.head :], prompt.head, self._first_piece(prompt.ids[: prompt.head]))
            states.append(hidden[-1])
            padding = (0, 0, 0, -len(prompt.ids) % BLOCK)
            rows.append([(F.pad(layer.keys, padding), F.pad(layer.values, padding)) for layer in cache.layers])
        fill = ROWS - len(group)
        layers = zip(*(rows + rows[:1] * fill), strict=True)
        kept = [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers]
        return torch.stack(states + states[:1] * fill), _cache(kept)

    def _single(self, words: Sequence[str]) -> list[int]:
        """Ids of those words that are one token of the model."""
        split = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        return [ids[0] for ids in split if len(ids) == 1 and ids[0] < self.vocabulary]

    def _text(self, ids: list[int]) -> str:
        words = [token for token in ids if token not in self._ends]
        return str(self.tokenizer.decode(words, clean_up_tokenization_spaces=False))

    def _run(self, ids: list[int], start: int, kept: KeyValues) -> tuple[torch.Tensor, Any]:
        """Hidden states (T, D) of ``ids`` behind ``start`` tokens with keys and values ``kept``, and the cache of both."""
        cache = _cache(kept)
        places = torch.arange(start, start + len(ids), device=self.device)[None]
        return self._forward(torch.tensor([ids], device=self.device), places, cache)[0], cache

    def _forward(self, tokens: torch.Tensor, places: torch.Tensor, cache: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (B, T, D) of tokens (B, T) at positions (B, T); the cache grows by them."""
        out = self.model.base_model(
            input_ids=tokens, past_key_values=cache, position_ids=places, attention_mask=mask, use_cache=True
        )
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

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

    def _first_piece(self, ids: list[int]) -> KeyValues:
        """Keys and values of a prompt's first piece, computed or kept."""
        if not ids:
            return []
        key = tuple(ids)
        if key not in self._kept:
            cache = self._run(ids, 0, [])[1]
            self._kept[key] = [(layer.keys, layer.values) for layer in cache.layers]
        kept = self._kept[key]
        self._kept.move_to_end(key)
        while self._kept and sum(map(len, self._kept)) > self.kept_tokens:
            self._kept.popitem(last=False)
        return kept


def _cache(kept: KeyValues) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys, values, layer)
    return cache


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
