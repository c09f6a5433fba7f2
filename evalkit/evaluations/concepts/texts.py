"""Texts with and without a concept, as the model reads them at a hook point.

1. Texts of the concept's own, pairs or labelled ones, are read one a row, behind the BOS, or a line end where there is none: the
   first position of a row holds a massive activation whatever stands there. That position is not kept, nor is one whose norm
   exceeds the limit of the scoring text.
2. Where a concept has none, its texts are windows of the scoring text: labelled by whether one of the concept's words is in
   them (``word_pattern``), or by the judge, who simulates the concept's question on each window (``seen``). As many of
   either kind are drawn, at most ``most``.
3. A window whose call failed has no label. It is left out of the texts but not of the count: every window that was put to the
   judge is a score of its own (``answer_scores``), a failed one where its call failed, so that the next start asks again. A
   window is undefined where some tokens have no value and no other token is a yes: the concept could be on a missing one.
4. Activations of a concept are remembered: every dictionary of a hook point reads the same ones. Those with failed calls are
   not: they are asked again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from evalkit.concepts.loading import LEAST_TEXTS, Concept
from evalkit.errors import JudgeSetupError, ModelError
from evalkit.evaluations.base import Metric, Score
from evalkit.judges.base import Judge, Questions, RateTask, SimulateTask, Simulation
from evalkit.models.finite import broken, broken_message
from evalkit.text.words import word_pattern
from evalkit.util.caching import Recent
from evalkit.util.hashing import content_hash

if TYPE_CHECKING:
    from evalkit.evaluations.base import Bench

BATCH = 32
YES = 0.5
"""Share of the scale from which the judge's rating counts as yes."""
MARKED = 0.5
"""Share of the largest code of a text from which a token is marked for the judge who grades it."""
KEPT = 40
"""Concepts whose activations are remembered in this process."""
JUDGED_YES = Metric(
    "judge: yes", "neither",
    note="Share of the windows put to the judge that it counts as showing the concept; a failed call is a failed window. "
    "Undefined: tokens of the window have no value, and no other token is a yes.",
)  # fmt: skip
"""The metric of ``answer_scores``."""
TEXTS_CUT = Metric(
    "texts cut", "neither", interval=False,
    note="Share of the concepts' own texts that are longer than the model can read: what lies beyond its context is not seen. "
    "Shown where there are any.",
)  # fmt: skip
"""The metric of ``cut_scores``."""


class Seen(NamedTuple):
    """How strongly the judge sees a concept in one text."""

    share: float | None
    """Largest activation it expects on a token, as a share of the scale; a lower bound where tokens are missing."""
    status: str = "ok"
    """'failed' where the call failed; 'undefined' where tokens are missing and no other one is a yes."""


class Answer(NamedTuple):
    """What the judge says of one window."""

    document: int
    yes: bool | None
    status: str = "ok"
    """As of ``Seen``."""


class Texts(NamedTuple):
    """N texts of one concept at one hook point."""

    text: list[str]
    tokens: list[list[str]]
    """Their tokens as strings, as far as they are kept or not: row n has as many as the text."""
    ids: list[list[int]]
    """The same tokens by number."""
    x: Float[torch.Tensor, "N T D"]
    keep: Bool[torch.Tensor, "N T"]
    label: Bool[np.ndarray, " N"]
    """Shows the concept."""
    group: Int[np.ndarray, " N"]
    """Texts of one group stay on one side of the split: pairs, and windows of one document. A labelled text is its own group."""
    answers: tuple[Answer, ...] = ()
    """One for every window that was put to the judge."""

    cut: int = 0
    """Texts longer than the model's context, of which the beginning was read."""

    @property
    def enough(self) -> bool:
        """Whether there are enough of either kind."""
        return min(int(self.label.sum()), int((~self.label).sum())) >= LEAST_TEXTS

    @property
    def failed(self) -> int:
        """Windows without a label because the judge's call failed."""
        return sum(answer.status == "failed" for answer in self.answers)


_read: Recent[Texts] = Recent(KEPT)


def texts_of(bench: Bench, concept: Concept, most: int) -> Texts:
    """The texts of ``concept`` at the bench's hook point, from memory where they were read before.

    Raises:
        BudgetReached, JudgeSetupError: of the judge, where it labels them.
    """
    read_with = [bench.model.identity, bench.hook_point, list(concept), bench.score().identity, most, bench.seed]
    if concept.source == "judge":
        read_with.append(bench.judge.identity if bench.judge else None)

    def make() -> Texts:
        return _own(bench, concept) if concept.source in ("pairs", "texts") else _windows(bench, concept, most)

    return _read.get(content_hash(read_with), make, keep=lambda texts: not texts.failed)


class ReadTexts(NamedTuple):
    """N texts, read."""

    rows: list[list[int]]
    """Token ids, without the BOS."""
    x: Float[torch.Tensor, "N T D"]
    keep: Bool[torch.Tensor, "N T"]
    cut: int
    """Texts longer than the model's context, of which the beginning was read."""


def read_texts(bench: Bench, texts: Sequence[str]) -> ReadTexts:
    """Read texts of any length, each behind the BOS or a line end, as far as the model's context goes."""
    model = bench.model
    whole = [model.opened(text if model.bos is not None else "\n" + text) for text in texts]
    rows = [row[: model.context] for row in whole]
    x, keep = read_rows(bench, rows)
    cut = sum(len(row) > model.context for row in whole)
    return ReadTexts([row[int(model.bos is not None) :] for row in rows], x, keep, cut)


def read_rows(bench: Bench, rows: Sequence[list[int]]) -> tuple[Float[torch.Tensor, "N T D"], Bool[torch.Tensor, "N T"]]:
    """Activations and kept positions of rows of token ids, the BOS left out: it is no part of a text.

    Args:
        rows: each begins with the BOS, or a token that is not kept where the model has none.

    Raises:
        ModelError: activations are not finite.
    """
    model = bench.model
    T = max(map(len, rows))
    keep = torch.tensor([[0 < t < len(row) for t in range(T)] for row in rows])
    parts = []
    for start in range(0, len(rows), BATCH):
        batch = torch.tensor([row + [0] * (T - len(row)) for row in rows[start : start + BATCH]])
        parts.append(model.activations(batch, bench.hook_point).float().cpu())
    x = torch.cat(parts)
    if lost := broken(x[keep]):
        what, fix = broken_message(lost, int(keep.sum()), "texts", model.dtype)
        raise ModelError(what, where=bench.hook_point, fix=fix)
    keep &= x.norm(dim=-1) <= bench.score().limit
    opening = int(model.bos is not None)
    return x[:, opening:], keep[:, opening:]


def _own(bench: Bench, concept: Concept) -> Texts:
    if concept.pairs:
        texts = [text for pair in concept.pairs for text in pair]
        label = np.tile([True, False], len(concept.pairs))
        group = np.repeat(np.arange(len(concept.pairs)), 2)
    else:
        texts = [*concept.present, *concept.absent]
        label = np.arange(len(texts)) < len(concept.present)
        group = np.arange(len(texts))
    rows, x, keep, cut = read_texts(bench, texts)
    if cut:
        longer = f"{cut:,} of its {len(texts):,} texts are longer than the {bench.model.context:,} tokens the model reads"
        bench.progress.say(f"note: concept {concept.name}: {longer}; what lies beyond is not seen")
    return Texts(texts, [bench.model.token_strings(row) for row in rows], rows, x, keep, label, group, cut=cut)


def _windows(bench: Bench, concept: Concept, most: int) -> Texts:
    score = bench.score()
    order = np.random.default_rng([bench.seed, 11]).permutation(len(score.tokens))
    strings = [bench.model.token_strings(score.tokens[w, score.opening :].tolist()) for w in order]
    texts = ["".join(tokens) for tokens in strings]
    answers: tuple[Answer, ...] = ()
    if concept.source == "judge":
        order, strings, texts = order[: 2 * most], strings[: 2 * most], texts[: 2 * most]
        documents = score.document[torch.from_numpy(order)].tolist()
        found = zip(documents, seen(bench, concept, strings), strict=True)
        answers = tuple(Answer(document, None if one.share is None else one.share >= YES, one.status) for document, one in found)
        said = [answer.yes for answer in answers]
        known = [n for n, yes in enumerate(said) if yes is not None]
        order, strings, texts = order[known], [strings[n] for n in known], [texts[n] for n in known]
        label = np.array([bool(said[n]) for n in known], dtype=bool)
    else:
        words = word_pattern(concept.words)
        label = np.array([bool(words.search(text)) for text in texts])
    count = min(most, int(label.sum()), int((~label).sum()))
    rows = sorted([*np.flatnonzero(label)[:count], *np.flatnonzero(~label)[:count]])
    taken = torch.from_numpy(order[rows])
    return Texts(
        [texts[n] for n in rows], [strings[n] for n in rows], score.tokens[taken, score.opening :].tolist(),
        score.x[taken, score.opening :], score.keep[taken, score.opening :], label[rows],
        score.document[taken].numpy(), answers,
    )  # fmt: skip


def answer_scores(number: int, texts: Texts, most: int) -> Iterator[Score]:
    """Scores of ``JUDGED_YES``: one for each window that was put to the judge about the concept of place ``number``."""
    for place, (document, yes, status) in enumerate(texts.answers):
        item = number * 2 * most + place
        if yes is None:
            yield Score("judged_yes", None, item, "window", 0.0, cluster=document, status=status)
        else:
            yield Score("judged_yes", float(yes), item, "window", cluster=document)


def cut_scores(every: Sequence[Texts]) -> Iterator[Score]:
    """Scores of ``TEXTS_CUT``, one a concept; none where every text was read whole."""
    if any(texts.cut for texts in every):
        for number, texts in enumerate(every):
            n = len(texts.text)
            yield Score("texts_cut", texts.cut / n if n else 0.0, number, "concept", float(n), n=n)


def seen(bench: Bench, concept: Concept, strings: Sequence[Sequence[str]]) -> list[Seen]:
    """How strongly the judge sees the concept in each text, 0 to 1.

    The judge is asked to simulate a feature that fires on the concept, as its question or else its title says: the largest
    activation it expects on any token of the text, as a share of the scale.

    Raises:
        JudgeSetupError: there is no judge.
    """
    judge = _judge(bench, concept)
    with bench.progress.stage(f"judging texts about {concept.title}", len(strings), "texts") as stage:
        found = judge.simulate([SimulateTask(concept.asked, list(tokens)) for tokens in strings], stage.advance)
    return [_seen(one) for one in found]


def _seen(found: Simulation) -> Seen:
    if found.expected is None:
        return Seen(None, "failed")
    values = [value for value in found.expected if value is not None]
    share = max(values, default=0.0) / 10
    return Seen(None, "undefined") if len(values) < len(found.expected) and share < YES else Seen(share)


def graded(
    bench: Bench, concept: Concept, strings: Sequence[Sequence[str]], codes: Sequence[Float[np.ndarray, " T"]]
) -> list[float | None]:
    """How well the concept tells what a feature fires on in each text, 0 to 3 by the rubric; None where a call failed.

    The judge is shown the text with the tokens marked whose code is at least ``MARKED`` of the largest one there.

    Args:
        codes: the feature's code on each token, 0 where a token is not kept.

    Raises:
        JudgeSetupError: there is no judge.
    """
    judge = _judge(bench, concept)
    tasks = [
        RateTask(concept.title, list(tokens), ((own > 0) & (own >= MARKED * own.max())).tolist())
        for tokens, own in zip(strings, codes, strict=True)
    ]
    with bench.progress.stage(f"grading texts about {concept.title}", len(tasks), "texts") as stage:
        found = judge.rate(tasks, stage.advance)
    return [one.grade for one in found]


def labelled(concept: Concept, most: int) -> Questions:
    """What a judge is asked who labels the windows of a concept, of which ``most`` of either kind are wanted."""
    return Questions("simulate", 2 * most, words=len(concept.asked.encode()))


def rated(concept: Concept, most: int) -> Questions:
    """What a judge is asked who grades ``most`` texts of a concept."""
    own = [*(text for pair in concept.pairs for text in pair), *concept.present, *concept.absent]
    longest = max((len(text.encode("utf-8", "replace")) for text in own), default=0)
    # a token has a byte at least; one that is a part of a character is shown as three
    return Questions("rate", most, tokens=longest, text_bytes=3 * longest, words=len(concept.title.encode()))


def _judge(bench: Bench, concept: Concept) -> Judge:
    if bench.judge is None:
        raise JudgeSetupError("nobody can be asked about texts", where=f"concept {concept.name}", fix="give the suite a [judge]")
    return bench.judge
