"""A prediction made before anything is seen: without the feature of one token, another token is less likely to follow.

1. The suite names a trigger (tokens, such as the apostrophe) and what follows (such as "s").
2. The feature of the trigger is found on the fitting text alone: of all features the one whose code correlates most with whether
   the token is a trigger, over kept positions.
3. Contexts are kept positions of the scoring text that hold a trigger, drawn by seed, one a window. All of them count, whether or
   not the feature fires there or the text goes on as predicted.
4. The feature is ablated at all kept positions up to there, x - c f, and the rest of the model run. The number is the change of
   the log-probability of what follows, nats: below 0 where the prediction holds.
5. Nulls in the same contexts: as much along random directions; and another feature that is active at the position, drawn at
   random, ablated in the same way.
6. One test: the change less that of the random directions, context by context, lies below 0; its interval is over documents.

After claim 8 of Cunningham et al. 2023 (arXiv 2309.08600, section 5): their feature of the apostrophe makes "s" likelier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.errors import UnitFailed
from evalkit.evaluations.base import EVALUATIONS, Bench, Evaluation, Metric, Result, Score, Sizes
from evalkit.interventions.ablations import Context, Edit, Effects, measure, random_directions
from evalkit.interventions.hooks import scale
from evalkit.util.batching import blocks
from evalkit.util.settings import Count, Settings

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary

OWN, OTHER, ALONG = "ablate", "other", "along"
"""Kinds of edits; the last is followed by the number of the direction."""


@dataclass(frozen=True)
class PredictionConfig(Settings):
    """Settings of the evaluation 'prediction': a feature of one token makes another one likelier."""

    trigger: tuple[str, ...] = ("'",)
    """Tokens that the feature is to fire on, with their leading space where they have one; each is one token of the model."""
    follows: str = "s"
    """The token that is to become less likely without the feature; one token of the model."""
    contexts: Count = 64
    """Contexts read, one a window."""
    nulls: Count = 3
    """Random directions beside each ablation."""

    def check_together(self) -> None:
        if not self.trigger or not self.follows:
            raise ValueError("a prediction needs a trigger and what follows")


class Found(NamedTuple):
    """The feature of the trigger."""

    feature: int
    correlation: float
    """Of its code with the trigger, on the fitting text."""


@EVALUATIONS.register("prediction")
class Prediction(Evaluation):
    """Change of the log-probability of a predicted token without the feature of another token, with nulls."""

    name: ClassVar[str] = "prediction"
    version: ClassVar[int] = 1
    config: ClassVar[type] = PredictionConfig
    metrics: ClassVar[dict[str, Metric]] = {
        "change": Metric(
            "change of log p", "lower", chance=0.0, null="change_random", main=True,
            note="Of the token predicted to follow, nats, where the feature of the trigger is ablated: mean over positions of "
            "the scoring text that hold a trigger, whether or not the feature fires there.",
        ),
        "change_random": Metric(
            "change, random", "neither", note="As much added along random directions in the same contexts, mean over them."
        ),
        "beyond_random": Metric(
            "change - random", "lower", chance=0.0,
            note="The difference of the two, context by context. The prediction holds where its interval lies below 0.",
        ),
        "change_other": Metric(
            "change, other feature", "neither",
            note="Another feature that is active at the position, drawn at random, ablated instead. Undefined where none is.",
        ),
        "lowered": Metric(
            "lowered", "higher", chance=0.5, note="Share of the contexts in which the token becomes less likely.",
        ),
        "fires": Metric("fires", "higher", note="Share of the contexts in which the feature is active at the trigger."),
        "correlation": Metric(
            "feature r", "neither", interval=False,
            note="Correlation of the feature's code with the trigger on the fitting text, by which it was found.",
        ),
        "feature": Metric("feature", "neither", interval=False, digits=0, note="Its number."),
    }  # fmt: skip

    def temporary(self, config: PredictionConfig, sizes: Sizes) -> int:
        """Changes of log-probability of every edit: the feature, another one, and random directions."""
        return 4 * config.contexts * (2 + config.nulls) * sizes.vocabulary

    def run(self, bench: Bench, dictionary: Dictionary, config: PredictionConfig) -> Result:
        """Find the feature on the fitting text and ablate it in the scoring text.

        Raises:
            UnitFailed: a trigger or what follows is not one token of the model, or the text holds no trigger.
            DictionaryError: the dictionary's width is not that of the hook point.
        """
        dictionary.check_width(bench.model.width(bench.hook_point), bench.hook_point)
        triggers = torch.tensor([_token(bench, text, "trigger") for text in config.trigger])
        follows, score = _token(bench, config.follows, "follows"), bench.score()
        found = feature_of(dictionary, bench.fit(), triggers)
        contexts = _contexts(score, triggers, config.contexts, bench.seed)
        if not contexts:
            raise UnitFailed(
                f"no kept position of the scoring text holds {' or '.join(map(repr, config.trigger))} before its window's end",
                where="[[evaluation]] prediction trigger",
                fix="give more scoring text, or another trigger",
            )
        edits = list(_edits(dictionary, score, found.feature, contexts, config.nulls, bench.seed))
        effects = measure(bench.model, bench.hook_point, score, edits, bench.progress)
        scores = list(_scores({kind: own for (_, kind), own in effects.items()}, score, follows))
        scores += [Score("correlation", found.correlation), Score("feature", float(found.feature))]
        return Result(scores, {})


def _token(bench: Bench, text: str, key: str) -> int:
    ids = bench.model.tokenise(text)
    if len(ids) != 1:
        raise UnitFailed(
            f"{text!r} is {len(ids)} tokens of this model: {bench.model.token_strings(ids)}",
            where=f"[[evaluation]] prediction {key}",
            fix="name a text that is one token, with its leading space where it has one",
        )
    return int(ids[0])


@torch.no_grad()
def feature_of(dictionary: Dictionary, fit: Activations, triggers: Int[torch.Tensor, " K"]) -> Found:
    """The feature whose code correlates most with the trigger over the kept positions of ``fit``.

    Raises:
        UnitFailed: the text holds no trigger, or nothing else, or no feature goes with it.
    """
    F, T = dictionary.n_features, fit.tokens.shape[1]
    total, square, there = (torch.zeros(F, dtype=torch.float64) for _ in range(3))
    count = hits = 0
    for part in blocks(len(fit.tokens), T * F):
        keep = fit.keep[part]
        codes = dictionary.encode(fit.x[part][keep]).double()  # (M, F)
        marked = torch.isin(fit.tokens[part][keep], triggers)
        total, square, there = total + codes.sum(0), square + codes.square().sum(0), there + codes[marked].sum(0)
        count, hits = count + len(codes), hits + int(marked.sum())
    if not 0 < hits < count:
        raise UnitFailed(
            f"{hits} of {count} kept positions of the fitting text hold a trigger, so that no feature can be found",
            where="[[evaluation]] prediction trigger",
            fix="give more fitting text, or another trigger",
        )
    spread = (square - total.square() / count).clamp(min=0) * hits * (1 - hits / count)
    r = torch.where(spread > 0, (there - total * hits / count) / spread.clamp(min=1e-300).sqrt(), -torch.inf)
    best = int(r.argmax())
    if not r[best] > 0:
        raise UnitFailed(
            "no feature is more active on the trigger than elsewhere",
            where="[[evaluation]] prediction trigger",
            fix="give another trigger, or leave this dictionary out",
        )
    return Found(best, float(r[best]))


def _contexts(score: Activations, triggers: Int[torch.Tensor, " K"], count: int, seed: int) -> list[Context]:
    """Up to ``count`` kept positions that hold a trigger, one a window, and have a next token."""
    random = np.random.default_rng([seed, 21])
    marked = torch.isin(score.tokens, triggers) & score.keep
    marked[:, -1] = False
    found = []
    for window in random.permutation(len(marked)).tolist():
        places = marked[window].nonzero()[:, 0]
        if len(places):
            found.append(Context(window, int(places[int(random.integers(len(places)))])))
        if len(found) == count:
            break
    return found


@torch.no_grad()
def _edits(
    dictionary: Dictionary, score: Activations, feature: int, contexts: Sequence[Context], nulls: int, seed: int
) -> Iterator[Edit]:
    """The ablation, and its nulls, in every context."""
    random = np.random.default_rng([seed, 22])
    own = dictionary.edit_directions[feature]
    noise = random_directions(own, nulls, random)
    for context in contexts:
        x, keep = score.x[context.window], score.keep[context.window]
        codes = dictionary.encode(x) * keep[:, None]  # (T, F)
        unit = scale(dictionary, x)[:, 0]
        here = codes[context.position]
        amount, code = -codes[:, feature] * unit, float(here[feature])
        yield Edit(0, OWN, context, code, amount, own)
        for number, direction in enumerate(noise, start=1):
            yield Edit(0, f"{ALONG} {number}", context, code, amount, direction)
        others = [f for f in (here > 0).nonzero()[:, 0].tolist() if f != feature]
        if others:
            other = int(random.choice(others))
            direction = dictionary.edit_directions[other]
            yield Edit(0, OTHER, context, float(here[other]), -codes[:, other] * unit, direction)


def _scores(effects: dict[str, Effects], score: Activations, follows: int) -> Iterator[Score]:
    def of(metric: str, context: Context, value: float) -> Score:
        document = int(score.document[context.window])
        return Score(metric, value, context.window, "window", cluster=document)

    def changes(kind: str) -> Float[np.ndarray, " C"]:
        return effects[kind].change[:, follows].astype(np.float64)

    own = changes(OWN)
    contexts = [edit.context for edit in effects[OWN].edits]
    along = np.mean([changes(kind) for kind in effects if kind.startswith(ALONG)], axis=0)
    for context, edit, change, null in zip(contexts, effects[OWN].edits, own.tolist(), along.tolist(), strict=True):
        yield of("change", context, change)
        yield of("change_random", context, null)
        yield of("beyond_random", context, change - null)
        yield of("lowered", context, float(change < 0))
        yield of("fires", context, float(edit.code > 0))
    if OTHER in effects:
        for edit, change in zip(effects[OTHER].edits, changes(OTHER).tolist(), strict=True):
            yield of("change_other", edit.context, change)
    else:
        yield Score.of("change_other", None, kind="window", weight=0.0)
