"""What a feature fires on: its activation histogram with the tokens in each bin, and how monosemantic it looks by level.

1. Features are named or drawn (``sampling``). Every kept position on which the feature fires (code above 0, as features are
   drawn) is a firing. Where codes are signed, that is the upper tail alone: ranked with it, the lower one would be the
   weakest firings.
2. Firings are cut in two ways: into tenths of the range of activations (``range``, the paper's histogram) and into tenths of
   their number (``decile``). Each bin has its most frequent tokens with their shares, and some contexts.
3. Tokens are counted by class too: spaces and case are folded, numbers are one class. The main class is the one with the
   largest mean share over the filled tenths of the range. Monosemanticity is that mean: a feature that fires weakly on much and
   strongly on one thing gets half.
4. Entropy, in bits, of the tokens fired on and of the tokens before them.
5. Contrast: the same for the dimension of the hook point whose activation correlates most with the feature's code (either sign),
   at as many of its strongest positions as the feature has firings. That threshold favours the neuron: over its whole range it
   fires on more.
6. Null: the same activations on tokens drawn at random from the text.

Cunningham et al. 2023 (arXiv 2309.08600), section 5 and appendix D; classes and nulls are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from evalkit.evaluations.base import EVALUATIONS, Bench, Evaluation, Metric, Result, Score
from evalkit.evaluations.sampling import LEAST_WINDOWS, Preference, choose_features, feature_codes
from evalkit.text.token_classes import Vocabulary
from evalkit.util.settings import Count, NotNegative, Range, Settings

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary

DECILES = 10


@dataclass(frozen=True)
class InputsConfig(Settings):
    """Settings of the evaluation 'inputs': what single features fire on."""

    features: Count = 40
    """Features drawn from those active in enough windows; a smaller sample is part of a larger one."""
    feature_ids: tuple[int, ...] = ()
    """Study these features instead of a sample."""
    least_windows: Count = LEAST_WINDOWS
    """Windows of scoring text a drawn feature must be active in."""
    prefer: Preference = "any"
    """'any' draws from all of these; 'one token' from the quarter that fires most on a single token, for stories of features."""
    bins: Annotated[int, Range(ge=2)] = 10
    """Equal steps of the range of activations in the histogram."""
    tokens: Count = 5
    """Most frequent tokens named in each bin (the paper: 5)."""
    contexts: NotNegative = 2
    """Contexts drawn for each bin, and twice as many of the strongest."""
    around: NotNegative = 8
    """Tokens shown on either side of the firing one."""


class Firings(NamedTuple):
    """A firings of one feature or neuron."""

    values: Float[np.ndarray, " A"]
    tokens: Int[np.ndarray, " A"]
    before: Int[np.ndarray, " A"]
    """The token before each; -1 at the start of a window."""
    places: Int[np.ndarray, "A 2"]
    """Window and position."""


class Profile(NamedTuple):
    """What the bins of some firings hold."""

    range_bin: Int[np.ndarray, " A"]
    """Which step of the range each firing lies in."""
    decile: Int[np.ndarray, " A"]
    """Which tenth of the firings, the weakest first."""
    edges: Float[np.ndarray, " B+1"]
    """Ends of the steps."""
    main: int
    """The main class."""
    shares: Float[np.ndarray, " B"]
    """Its share of each step; NaN where the step is empty."""


@EVALUATIONS.register("inputs")
class Inputs(Evaluation):
    """Activation histograms with tokens, monosemanticity by level, entropies; the closest neuron as contrast."""

    name: ClassVar[str] = "inputs"
    version: ClassVar[int] = 3
    config: ClassVar[type] = InputsConfig
    metrics: ClassVar[dict[str, Metric]] = {
        "monosemantic": Metric(
            "monosemanticity", "neither", null="monosemantic_random", main=True,
            note="Share of a feature's main token class (case and spaces folded, numbers as one), mean over the filled tenths of "
            "its range of activations. It falls with the number of firings: dictionaries of other density are no rivals in it.",
        ),
        "monosemantic_random": Metric(
            "monosemanticity, random", "neither", note="The same activations on tokens drawn at random from the text."
        ),
        "monosemantic_neuron": Metric(
            "monosemanticity, neuron", "neither",
            note="The same for the dimension that correlates most with the feature, at as many of its strongest positions.",
        ),
        "monosemantic_gain": Metric(
            "over neuron", "higher", chance=0.0,
            note="The feature's less that neuron's, pair by pair: as many firings on both sides.",
        ),
        "level_low": Metric(
            "low levels", "neither", note="Share of the main class among the weakest three tenths of a feature's firings."
        ),
        "level_middle": Metric("middle levels", "neither", note="Among the middle four tenths."),
        "level_high": Metric("high levels", "neither", note="Among the strongest three tenths."),
        "token_entropy": Metric(
            "token entropy", "neither", null="token_entropy_random", digits=2, note="Of the tokens a feature fires on, bits."
        ),
        "token_entropy_random": Metric(
            "token entropy, random", "neither", digits=2, note="Of as many tokens drawn at random from the text."
        ),
        "context_entropy": Metric(
            "context entropy", "neither", null="context_entropy_random", digits=2,
            note="Of the tokens before those a feature fires on, bits: low where it reads more than the token itself.",
        ),
        "context_entropy_random": Metric(
            "context entropy, random", "neither", digits=2, note="Of the tokens before as many drawn at random."
        ),
        "neuron_r": Metric(
            "closest neuron |r|", "neither",
            note="Largest absolute correlation of a feature's code, both tails, with a dimension of the hook point.",
        ),
        "density": Metric("density", "neither", digits=4, note="Share of the kept scoring positions a studied feature fires on."),
    }  # fmt: skip

    def run(self, bench: Bench, dictionary: Dictionary, config: InputsConfig) -> Result:
        """Describe the inputs of the chosen features of ``dictionary``.

        Raises:
            UnitFailed: no feature is active in enough windows, or a named one does not exist.
            DictionaryError: its width is not that of the hook point.
        """
        score = bench.score()
        features = choose_features(
            dictionary,
            score,
            ids=config.feature_ids,
            features=config.features,
            least_windows=config.least_windows,
            seed=bench.seed,
            prefer=config.prefer,
            fit=lambda: bench.fit(),
        )
        codes = feature_codes(dictionary, score, features)  # (N, T, S)
        closest = closest_dimensions(score, codes)
        study = _Study(bench, score, config)
        scores: list[Score] = []
        rows: list[dict[str, Any]] = []
        with bench.progress.stage(f"inputs of {dictionary.kind} features", len(features), "features") as stage:
            for place, feature in enumerate(features):
                neuron, sign, r = closest[place]
                own = study.firings(codes[..., place])
                contrast = study.strongest(sign * score.x[..., neuron], len(own.values))
                scores += study.scores(feature, own, contrast, r)
                rows += ({"feature": feature, "of": "feature", **row} for row in study.rows(own))
                about = {"feature": feature, "of": "neuron", "neuron": neuron, "sign": sign}
                rows += ({**about, **row} for row in study.rows(contrast))
                stage.advance()
        return Result(scores, {"input_bins": rows})


def closest_dimensions(score: Activations, codes: Float[torch.Tensor, "N T S"]) -> list[tuple[int, int, float]]:
    """For each of S features the dimension of the hook point whose activation correlates most with its code over the kept
    positions: index, sign and absolute correlation (NaN where the code is constant)."""
    S, D = codes.shape[-1], score.x.shape[-1]
    cross, squares = torch.zeros(S, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    mean_x = torch.zeros(D, dtype=torch.float64)
    kept = codes[score.keep].double()  # (M, S)
    mean_c = kept.mean(0)
    for start in range(0, len(score.x), 64):
        part = slice(start, start + 64)
        x = score.x[part][score.keep[part]].double()
        c = codes[part][score.keep[part]].double()
        cross += c.T @ x
        squares += x.square().sum(0)
        mean_x += x.sum(0)
    M = len(kept)
    mean_x /= M
    covariance = cross / M - mean_c[:, None] * mean_x
    spread = (squares / M - mean_x.square()).clamp(min=0).sqrt() * kept.std(0, correction=0)[:, None]
    r = torch.where(spread > 0, covariance / spread, torch.nan)
    best = r.abs().nan_to_num(-1.0).argmax(1)
    picked = r.gather(1, best[:, None])[:, 0]
    return [(int(d), -1 if v < 0 else 1, min(abs(v), 1.0)) for d, v in zip(best.tolist(), picked.tolist(), strict=True)]


def profile(values: Float[np.ndarray, " A"], classes: Int[np.ndarray, " A"], bins: int) -> Profile:
    """Bins of at least one firing, the main class and its share by bin."""
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high, bins + 1)
    width = (high - low) / bins
    step = np.clip(((values - low) / width).astype(np.int64), 0, bins - 1) if width > 0 else np.full(len(values), bins - 1)
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    names, which = np.unique(classes, return_inverse=True)
    counts = np.zeros((bins, len(names)))
    np.add.at(counts, (step, which), 1)
    total = counts.sum(1)
    filled = total > 0
    main = int((counts[filled] / total[filled, None]).mean(0).argmax())
    shares = np.divide(counts[:, main], total, out=np.full(bins, np.nan), where=filled)
    return Profile(step, rank * DECILES // len(values), edges, int(names[main]), shares)


def entropy(tokens: Int[np.ndarray, " A"]) -> float:
    """Entropy of the tokens' frequencies, bits."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(max(0.0, -(share * np.log2(share)).sum()))


class _Study:
    """Firings, scores and rows of one unit's features."""

    def __init__(self, bench: Bench, score: Activations, config: InputsConfig) -> None:
        self.bench, self.score, self.config = bench, score, config
        self.tokens = score.tokens.numpy()
        self.keep = score.keep.numpy()
        self.vocabulary = Vocabulary(bench.model, self.tokens)
        self.random = np.random.default_rng([bench.seed, 1])

    def _at(self, values: np.ndarray, places: np.ndarray) -> Firings:
        window, position = places.T
        before = np.where(position > 0, self.tokens[window, position - 1], -1)
        return Firings(values, self.tokens[window, position], before, places)

    def firings(self, codes: torch.Tensor) -> Firings:
        """Where ``codes`` (N, T) are above 0."""
        values = codes.numpy().astype(np.float64)
        places = np.argwhere((values > 0) & self.keep)
        return self._at(values[tuple(places.T)], places)

    def strongest(self, activation: torch.Tensor, count: int) -> Firings:
        """The ``count`` kept positions with the largest ``activation`` (N, T)."""
        values = np.where(self.keep, activation.numpy().astype(np.float64), -np.inf)
        flat = np.argsort(-values, axis=None, kind="stable")[:count]
        places = np.stack(np.unravel_index(flat, values.shape), axis=1)
        return self._at(values[tuple(places.T)], places)

    def _anywhere(self, firings: Firings) -> Firings:
        """The same activations at kept positions drawn at random."""
        kept = np.argwhere(self.keep)
        return self._at(firings.values, kept[self.random.choice(len(kept), len(firings.values), replace=False)])

    def scores(self, feature: int, own: Firings, contrast: Firings, r: float) -> Iterator[Score]:
        n = len(own.values)
        found: dict[str, float] = {"density": n / max(1, int(self.keep.sum())), "neuron_r": r}
        if n:
            elsewhere = self._anywhere(own)
            for ending, firings in (("", own), ("_random", elsewhere), ("_neuron", contrast)):
                classes = self.vocabulary.classes(firings.tokens)
                seen = profile(firings.values, classes, self.config.bins)
                found[f"monosemantic{ending}"] = float(np.nanmean(seen.shares))
                if not ending:
                    main = classes == seen.main
                    for level, (first, last) in {"low": (0, 3), "middle": (3, 7), "high": (7, 10)}.items():
                        inside = (seen.decile >= first) & (seen.decile < last)
                        found[f"level_{level}"] = float(main[inside].mean()) if inside.any() else float("nan")
            found["monosemantic_gain"] = found["monosemantic"] - found["monosemantic_neuron"]
            for ending, firings in (("", own), ("_random", elsewhere)):
                found[f"token_entropy{ending}"] = entropy(firings.tokens)
                found[f"context_entropy{ending}"] = entropy(firings.before)
        for metric in Inputs.metrics:
            yield Score.of(metric, found.get(metric), feature, "feature", n=n)

    def rows(self, firings: Firings) -> Iterator[dict[str, Any]]:
        """The bins of ``firings``; none where there are no firings."""
        if not len(firings.values):
            return
        classes = self.vocabulary.classes(firings.tokens)
        seen = profile(firings.values, classes, self.config.bins)
        for scale, which, count in (("range", seen.range_bin, self.config.bins), ("decile", seen.decile, DECILES)):
            for number in range(count):
                inside = np.flatnonzero(which == number)
                drawn = self.random.permutation(inside)[: self.config.contexts] if scale == "range" else inside[:0]
                ends = (seen.edges[number], seen.edges[number + 1]) if scale == "range" else None
                if len(inside) or ends:
                    yield self._row(scale, number, firings, classes, seen.main, inside, drawn, ends)
        top = np.argsort(-firings.values, kind="stable")[: 2 * self.config.contexts]
        if len(top):
            yield self._row("top", 0, firings, classes, seen.main, top, top, None)

    def _row(
        self,
        scale: str,
        number: int,
        firings: Firings,
        classes: np.ndarray,
        main: int,
        inside: np.ndarray,
        shown: np.ndarray,
        ends: tuple[float, float] | None,
    ) -> dict[str, Any]:
        values = firings.values[inside]
        row: dict[str, Any] = {
            "scale": scale,
            "bin": number,
            "low": ends[0] if ends else float(values.min()),
            "high": ends[1] if ends else float(values.max()),
            "n": len(inside),
            "main_class": self.vocabulary.names[main],
            "contexts": [self._context(firings, int(index)) for index in shown],
        }
        if len(inside):
            tokens, counts = np.unique(firings.tokens[inside], return_counts=True)
            order = np.argsort(-counts, kind="stable")[: self.config.tokens]
            strings = self.bench.model.token_strings(tokens[order].tolist())
            row["tokens"] = [[text, float(c) / len(inside)] for text, c in zip(strings, counts[order], strict=True)]
            own, counts = np.unique(classes[inside], return_counts=True)
            row["top_class"] = self.vocabulary.names[int(own[counts.argmax()])]
            row["top_share"] = float(counts.max()) / len(inside)
            row["main_share"] = float((classes[inside] == main).mean())
        return row

    def _context(self, firings: Firings, index: int) -> dict[str, Any]:
        window, position = firings.places[index].tolist()
        first = max(0, position - self.config.around)
        ids: Sequence[int] = self.tokens[window, first : position + self.config.around + 1].tolist()
        return {
            "window": window,
            "position": position,
            "value": float(firings.values[index]),
            "tokens": self.bench.model.token_strings(ids),
            "at": position - first,
        }
