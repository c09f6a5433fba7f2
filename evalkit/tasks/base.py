"""What every patching task gives: pairs of prompts, the answers they ask for, and how well a model does.

1. A pair is a base prompt and a target prompt of equal length in tokens that differ in the token that decides the answer.
2. Each side has its right continuation (``base_answer``, ``target_answer``), the first token of it; ``wrong`` is the token that
   the base prompt's answer is held against.
3. The logit difference is logit(base_answer) - logit(wrong) at the last token, in every run: base, target or patched.
4. A task draws its pairs in turn for three arms (``Source``). What is found on the first can be read on the second, whose
   sentences are new and whose names are the same small stock, and on the third, whose names are new too.
5. Words are looked at inside a sentence (``inside``), where tokenizers that begin texts with a space add none.
6. Both prompts are read behind the model's BOS, where it has one; it is never what differs, so that nothing is patched there.
7. ``report`` asks the model the base prompts: accuracy (the logit difference is positive), the logit difference and the
   answer's probability. A model that cannot do the task has no circuit to look for.

Measures of IOI: Wang et al. 2022 (arXiv 2211.00593). Pairs with one name swapped: Cunningham et al. 2023 (arXiv 2309.08600),
section 4.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int

from evalkit.errors import CorpusError, SuiteError
from evalkit.util.registry import Registry, near_miss

if TYPE_CHECKING:
    from evalkit.models.language_model import LanguageModel

Tokenise = Callable[[str], list[int]]
"""Token ids of a text, without special tokens: ``LanguageModel.tokenise``."""

BATCH = 32
"""Prompts of one forward pass of ``report``."""


FOUND, NEW_SENTENCES, NEW_NAMES = range(3)
"""Arms of a task: orderings are found on the first; the second has other sentences, the third other sentences and names."""

SMALL = 8
"""Most names or nouns that the first two arms share. Few, so that the ordering has met each of them."""


class Source(NamedTuple):
    """What a pair was made from."""

    arm: int
    """``FOUND``, ``NEW_SENTENCES`` or ``NEW_NAMES``."""
    template: str
    """Its sentence; no pair of ``FOUND`` shares it with another arm."""
    words: tuple[str, ...]
    """Names or nouns filled in; no pair of ``NEW_NAMES`` shares one with another arm."""


class Stocks(NamedTuple):
    """What the pairs of one arm are drawn from."""

    sentences: list[str]
    words: list[str]


class Deck:
    """Words dealt so that each is dealt before any comes again.

    Args:
        words: at least as many as are dealt at a time.
        draw: source of the order.
    """

    def __init__(self, words: Sequence[str], draw: random.Random) -> None:
        self._words, self._draw, self._left = list(words), draw, list[str]()

    def deal(self, count: int) -> list[str]:
        """``count`` different words."""
        dealt, self._left = self._left[:count], self._left[count:]
        if len(dealt) < count:
            fresh = self._draw.sample(self._words, len(self._words))
            more = [word for word in fresh if word not in dealt][: count - len(dealt)]
            self._left = [word for word in fresh if word not in more]
            dealt += more
        return dealt


class Pairs(NamedTuple):
    """N pairs of prompts of at most T tokens. Rows are padded on the right with token 0, which no causal model reads."""

    base: Int[torch.Tensor, "N T"]
    """Token ids of the base prompts."""
    target: Int[torch.Tensor, "N T"]
    """Token ids of the target prompts; as long as the base prompt of the same row."""
    last: Int[torch.Tensor, " N"]
    """Position of the last real token; the next token is read off there."""
    changed: Int[torch.Tensor, " N"]
    """First position where the two prompts differ."""
    base_answer: Int[torch.Tensor, " N"]
    """Token that rightly continues the base prompt."""
    target_answer: Int[torch.Tensor, " N"]
    """Token that rightly continues the target prompt; the same as ``base_answer`` where only the distraction was changed."""
    wrong: Int[torch.Tensor, " N"]
    """Token the base prompt's answer is held against in the logit difference (IOI: the subject's name)."""
    texts: list[tuple[str, str]]
    """Base and target prompts as text."""
    sources: tuple[Source, ...] = ()
    """What each pair was made from; empty where nothing is known of it (pairs of a file)."""

    @property
    def n(self) -> int:
        """Number of pairs N."""
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Pairs:
        """The pairs in ``rows``, in that order."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        tensors = {name: getattr(self, name)[index] for name in Pairs._fields if name not in ("texts", "sources")}
        sources = tuple(self.sources[row] for row in rows) if self.sources else ()
        return self._replace(**tensors, texts=[self.texts[row] for row in rows], sources=sources)


class Average(NamedTuple):
    """A mean over prompts."""

    mean: float
    """The mean."""
    n: int
    """How many prompts it is over."""
    values: tuple[float, ...]
    """One number a prompt, in the order of the pairs."""


class TaskReport(NamedTuple):
    """How well a model does the task on the base prompts."""

    accuracy: Average
    """Share of prompts whose right answer has a larger logit than the wrong one."""
    logit_difference: Average
    """logit(right) - logit(wrong)."""
    answer_probability: Average
    """Probability of the right answer."""


class PairSpec(NamedTuple):
    """One pair as text, before it is tokenised. Answers are what follows the prompt, with their leading space."""

    base: str
    """Base prompt."""
    target: str
    """Target prompt."""
    base_answer: str
    """Continuation of the base prompt."""
    target_answer: str
    """Continuation of the target prompt."""
    wrong: str
    """Continuation of the base prompt that the answer is held against."""
    source: Source | None = None
    """What it was made from, where that is known."""


Task = Callable[..., Pairs]
"""What is registered in ``TASKS``: (tokenise, n, seed, *, its settings) to pairs. ``build_pairs`` checks the settings first."""

TASKS: Registry[Task] = Registry("task", "evalkit.tasks", SuiteError)
"""Tasks by name."""


def build_pairs(task: str, tokenise: Tokenise, n: int, seed: int, *, bos: int | None = None, **settings: Any) -> Pairs:
    """``n`` pairs of ``task``, drawn by ``seed``.

    Args:
        bos: token that both prompts are read behind (``LanguageModel.bos``); None for none.

    Raises:
        SuiteError: no such task, a setting it does not have, a value it cannot use, or fewer than one pair asked for.
        CorpusError: no pairs can be made (names that are several tokens, lengths that differ, a file that is wrong).
    """
    make = TASKS.get(task, "task")
    known = [name for name in inspect.signature(make).parameters if name not in ("tokenise", "n", "seed")]
    for name in settings:
        if name not in known:
            fix = near_miss(name, known) if known else "leave it out"
            raise SuiteError(f"the task '{task}' has no setting '{name}'", where=name, fix=fix)
    if n < 1:
        raise SuiteError(f"{n} pairs cannot be patched", where="pairs", fix="ask for at least 1")
    pairs = make(tokenise, n, seed, **settings)
    return pairs if bos is None else behind(pairs, bos)


def behind(pairs: Pairs, bos: int) -> Pairs:
    """``pairs`` with ``bos`` before every prompt.

    Raises:
        CorpusError: a prompt spells it itself.
    """
    if (pairs.base[:, 0] == bos).any() or (pairs.target[:, 0] == bos).any():
        what = "a prompt begins with the token that is put before every text"
        raise CorpusError(what, where="[corpus] bos", fix='leave it out of the prompt, or write bos = "none"')
    first = torch.full((pairs.n, 1), bos, dtype=torch.int64)
    base, target = (torch.cat([first, tokens], dim=1) for tokens in (pairs.base, pairs.target))
    return pairs._replace(base=base, target=target, last=pairs.last + 1, changed=pairs.changed + 1)


def next_token(tokenise: Tokenise, prompt: str, continuation: str) -> int | None:
    """First token of ``continuation`` behind ``prompt``; None where the tokenizer joins the two."""
    before, whole = tokenise(prompt), tokenise(prompt + continuation)
    return whole[len(before)] if len(whole) > len(before) and whole[: len(before)] == before else None


def inside(tokenise: Tokenise, word: str, before: str = "and") -> list[int]:
    """Tokens of ``word`` behind ``before`` and a space; none where the tokenizer joins the two."""
    left, whole = tokenise(before), tokenise(f"{before} {word}")
    return whole[len(left) :] if whole[: len(left)] == left else []


def single_token(tokenise: Tokenise, words: Sequence[str]) -> list[str]:
    """Those of ``words`` that are one token inside a sentence."""
    return [word for word in words if len(inside(tokenise, word)) == 1]


def encode_pair(tokenise: Tokenise, spec: PairSpec, where: str) -> tuple[list[int], list[int], int, int, int]:
    """Tokens of both prompts and the three answers.

    Raises:
        CorpusError: the prompts differ in length or not at all, a continuation joins its prompt, or right and wrong answer begin
            with one token.
    """
    base, target = tokenise(spec.base), tokenise(spec.target)
    if not base or len(base) != len(target):
        raise CorpusError(
            f"base and target prompt are {len(base)} and {len(target)} tokens long under this tokenizer",
            where=f"{where}: {spec.base!r} / {spec.target!r}",
            fix="write both so that they have as many tokens: swap single-token words",
        )
    if base == target:
        raise CorpusError("base and target prompt are the same", where=f"{where}: {spec.base!r}", fix="change one of them")
    answers = []
    for prompt, continuation in ((spec.base, spec.base_answer), (spec.target, spec.target_answer), (spec.base, spec.wrong)):
        token = next_token(tokenise, prompt, continuation)
        if token is None:
            raise CorpusError(
                f"the tokenizer joins the answer {continuation!r} to its prompt",
                where=f"{where}: {prompt!r}",
                fix="end the prompt with a whole word and start the answer with its space",
            )
        answers.append(token)
    if answers[0] == answers[2]:
        raise CorpusError(
            f"the answers {spec.base_answer!r} and {spec.wrong!r} begin with the same token",
            where=f"{where}: {spec.base!r}",
            fix="choose answers that differ in their first token",
        )
    return base, target, answers[0], answers[1], answers[2]


def in_two(items: Sequence[str], draw: random.Random) -> tuple[list[str], list[str]]:
    """``items`` dealt at random into two stocks; the first has one more where their number is odd."""
    shuffled = draw.sample(list(items), len(items))
    middle = (len(items) + 1) // 2
    return shuffled[:middle], shuffled[middle:]


def arms(sentences: Sequence[str], words: Sequence[str], draw: random.Random) -> tuple[Stocks, Stocks, Stocks]:
    """What each arm draws from: two halves of the sentences, a small stock of words, and the other words."""
    first, second = in_two(sentences, draw)
    shuffled = draw.sample(list(words), len(words))
    few = min(SMALL, (len(words) + 1) // 2)
    small, others = shuffled[:few], shuffled[few:]
    return Stocks(first, small), Stocks(second, small), Stocks(second, others)


def make_pairs(tokenise: Tokenise, specs: Sequence[PairSpec], where: str) -> Pairs:
    """``specs`` as one padded batch. Raises as ``encode_pair``."""
    rows = [encode_pair(tokenise, spec, where) for spec in specs]
    N, T = len(rows), max(len(row[0]) for row in rows)
    base, target = torch.zeros(N, T, dtype=torch.int64), torch.zeros(N, T, dtype=torch.int64)
    for n, (left, right, *_) in enumerate(rows):
        base[n, : len(left)], target[n, : len(right)] = torch.tensor(left), torch.tensor(right)
    return Pairs(
        base=base,
        target=target,
        last=torch.tensor([len(row[0]) - 1 for row in rows]),
        changed=(base != target).int().argmax(1),
        base_answer=torch.tensor([row[2] for row in rows]),
        target_answer=torch.tensor([row[3] for row in rows]),
        wrong=torch.tensor([row[4] for row in rows]),
        texts=[(spec.base, spec.target) for spec in specs],
        sources=tuple(spec.source for spec in specs if spec.source),
    )


def logit_difference(
    logits: Float[torch.Tensor, "*batch N V"], right: Int[torch.Tensor, " N"], wrong: Int[torch.Tensor, " N"]
) -> Float[torch.Tensor, "*batch N"]:
    """logit(right) - logit(wrong) of each prompt."""
    rows = torch.arange(logits.shape[-2])
    return logits[..., rows, right] - logits[..., rows, wrong]


def last_logits(model: LanguageModel, tokens: Int[torch.Tensor, "N T"], last: Int[torch.Tensor, " N"]) -> torch.Tensor:
    """Logits (N, V) at each row's last real token, float32, on the CPU."""
    blocks = []
    for start in range(0, len(tokens), BATCH):
        rows = slice(start, start + BATCH)
        logits = model.logits(tokens[rows])
        blocks.append(logits[torch.arange(logits.shape[0]), last[rows].to(logits.device)].cpu())
    return torch.cat(blocks)


def report(model: LanguageModel, pairs: Pairs) -> TaskReport:
    """How well ``model`` does the task on the base prompts of ``pairs``."""
    logits = last_logits(model, pairs.base, pairs.last).double()
    difference = logit_difference(logits, pairs.base_answer, pairs.wrong)
    probability = logits.softmax(-1)[torch.arange(len(logits)), pairs.base_answer]

    def average(values: torch.Tensor) -> Average:
        return Average(float(values.mean()), len(values), tuple(values.tolist()))

    return TaskReport(average((difference > 0).double()), average(difference), average(probability))
