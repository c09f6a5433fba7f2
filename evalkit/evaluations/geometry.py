"""How a dictionary's features lie and fire, and which of them another dictionary has too.

1. Every kept position of the scoring text is encoded, in blocks. A feature's density is the share of positions at which its
   code is not zero; it is alive where it fires more than ``alive_threshold`` times.
2. Encoder-decoder cosine: between what a feature reads and what it writes. Capacity: (w_f . w_f)^2 / sum_j (w_f . w_j)^2 of the
   directions scaled to unit length, as how a dictionary divides a feature between code and direction is a convention
   (Scherlis et al. 2022, arXiv 2210.01892).
3. Against another dictionary of the suite: the mean maximum cosine similarity (MMCS; Sharkey et al. 2022, Cunningham et al. 2023,
   arXiv 2309.08600) of the alive features, and the share of them that a one-to-one matching by the Hungarian method pairs
   with a cosine above ``matched_above``. Both ways, as a small dictionary can lie within a large one but not the reverse.
4. Null: the same measures against as many random directions as the other dictionary has.

A dictionary is not compared with itself (the same weights, whatever their name): those rows are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int

from evalkit.dictionaries import similarity
from evalkit.errors import CorpusError
from evalkit.evaluations.base import EVALUATIONS, Bench, Evaluation, Metric, Result, Score
from evalkit.util.batching import blocks
from evalkit.util.caching import Recent
from evalkit.util.hashing import content_hash
from evalkit.util.settings import Count, NotNegative, Range, Settings

if TYPE_CHECKING:
    from evalkit.activations.capture import Activations
    from evalkit.dictionaries.base import Dictionary


KEPT_FIRINGS = 8
"""Dictionaries whose firings are remembered in this process, for the units that compare with them."""

DECIMALS = 6
"""Of cosines and capacities: what lies beyond is rounding of float32 weights, and would pass for a difference."""

SIGN = "Where either dictionary has signed codes, a direction and its opposite are one, and the absolute cosine is taken."
RANDOM = "against as many random unit directions as the other dictionary has, drawn by seed"


@dataclass(frozen=True)
class GeometryConfig(Settings):
    """Settings of the evaluation 'geometry'."""

    alive_threshold: NotNegative = 10
    """A feature is alive when it fires more often than this in the kept scoring text."""
    against: str = ""
    """Name of another dictionary of the suite to compare every dictionary with, at the same hook point. Several [[evaluation]]
    sections compare with several. Left out, nothing is compared."""
    matched_above: Annotated[float, Range(gt=0, lt=1)] = 0.9
    """Cosine above which a pair of the one-to-one matching counts as the same feature."""
    match_features: Count = 4096
    """Most alive features of either side in the one-to-one matching, whose time grows with the third power of their number.
    Beyond it features are drawn by seed, and the other side takes part with those nearest to them."""


class Firings(NamedTuple):
    """How often each feature fires."""

    counts: Int[torch.Tensor, " F"]
    """Kept positions at which its code is not zero."""
    positions: int
    """Kept positions."""


class Side(NamedTuple):
    """One side of a comparison: directions that exist, by index."""

    directions: Float[torch.Tensor, "F D"]
    """Unit rows; zero where a feature writes nothing."""
    present: Int[torch.Tensor, " P"]
    """Features that write something."""
    alive: Int[torch.Tensor, " A"]
    """Those of them that are alive."""
    silent: Int[torch.Tensor, " Z"]
    """Alive features that write nothing: their cosines are undefined."""


_firings: Recent[Firings] = Recent(KEPT_FIRINGS)


@EVALUATIONS.register("geometry")
class Geometry(Evaluation):
    """Alive features, density, encoder-decoder cosine, capacity; MMCS and one-to-one matches with another dictionary."""

    name: ClassVar[str] = "geometry"
    version: ClassVar[int] = 1
    config: ClassVar[type] = GeometryConfig
    metrics: ClassVar[dict[str, Metric]] = {
        "alive": Metric(
            "alive", "higher", interval=False,
            note="Share of features that fire more than alive_threshold times (10 unless set) in the kept scoring text.",
        ),
        "density": Metric(
            "density", "neither", interval=False, digits=4,
            note="Share of the kept scoring tokens a feature fires on, mean over features.",
        ),
        "encoder_cosine": Metric(
            "encoder-decoder cosine", "neither",
            note="Cosine of what a feature reads and what it writes; undefined where features do not read one direction each.",
        ),
        "capacity": Metric(
            "capacity", "neither",
            note="(w.w)^2 / sum_j (w.w_j)^2 over all directions, scaled to unit length: 1 for a direction orthogonal to all "
            "others, 1/m for m that coincide (Scherlis et al. 2022).",
        ),
        "mmcs": Metric(
            "MMCS", "neither", null="mmcs_random", main=True,
            note=f"Largest cosine of an alive feature with any direction of the dictionary named in against, mean. {SIGN}",
        ),
        "mmcs_random": Metric("MMCS, random", "neither", note=f"MMCS {RANDOM}."),
        "mmcs_back": Metric(
            "MMCS back", "neither", null="mmcs_back_random",
            note="The same from the dictionary named in against to this one; items are features of that one.",
        ),
        "mmcs_back_random": Metric(
            "MMCS back, random", "neither", note="MMCS back against as many random directions as this one has."
        ),
        "matched": Metric(
            "matched", "neither", null="matched_random",
            note="Share of alive features whose partner in a one-to-one matching with the alive features of the dictionary named "
            "in against has a cosine above matched_above (0.9 unless set). Of more than match_features (4096 unless set) alive "
            "features that many are drawn by seed (n says how many), the other side takes part with as many nearest to them, "
            f"and the share is an upper bound: features that were not drawn compete for no partner. {SIGN}",
        ),
        "matched_random": Metric("matched, random", "neither", note=f"matched {RANDOM} alive features."),
        "matched_back": Metric(
            "matched back", "neither", null="matched_back_random",
            note="The same share of the alive features of the dictionary named in against; items are features of that one.",
        ),
        "matched_back_random": Metric(
            "matched back, random", "neither",
            note="matched back against as many random directions as this one has alive features.",
        ),
    }  # fmt: skip

    def uses(self, config: GeometryConfig) -> list[str]:
        """The dictionary named in ``against``."""
        return [config.against] if config.against else []

    def run(self, bench: Bench, dictionary: Dictionary, config: GeometryConfig) -> Result:
        """Measure ``dictionary`` on the scoring text and against the dictionary named in ``config``.

        Raises:
            DictionaryError: a dictionary's width is not that of the hook point.
            CorpusError: the scoring text has no kept position.
        """
        with torch.inference_mode():
            firings = _fired(bench, dictionary)
            scores = [*_own(dictionary, firings, config)]
            if config.against:
                other = bench.dictionary(config.against)
                if other.identity.hash != dictionary.identity.hash:
                    scores += _compared(bench, dictionary, other, config)
        return Result(scores, {})


def _fired(bench: Bench, dictionary: Dictionary) -> Firings:
    """Firings of ``dictionary`` in the scoring text, from memory where they were counted before."""
    score = bench.score()
    return _firings.get((dictionary.identity.hash, score.identity), lambda: _count(bench, score, dictionary))


def _count(bench: Bench, score: Activations, dictionary: Dictionary) -> Firings:
    N, T, D = score.x.shape
    dictionary.check_width(D, bench.hook_point)
    if not score.keep.any():
        raise CorpusError("the scoring text has no kept position", fix="add text or widen the rule for massive activations")
    counts = torch.zeros(dictionary.n_features, dtype=torch.int64)
    with bench.progress.stage(f"encoding with {dictionary.kind}", N, "windows") as stage:
        for part in blocks(N, T * dictionary.n_features):
            keep = score.keep[part]
            x = score.x[part][keep]  # (M, D)
            if dictionary.sparse:
                codes = dictionary.encode_sparse(x)
                counts += codes.indices[codes.values != 0].bincount(minlength=dictionary.n_features)
            else:
                counts += (dictionary.encode(x) != 0).sum(0)
            stage.advance(len(keep))
    return Firings(counts, int(score.keep.sum()))


def _own(dictionary: Dictionary, firings: Firings, config: GeometryConfig) -> Iterator[Score]:
    """What needs no other dictionary, feature by feature."""
    n = firings.positions
    features = torch.arange(dictionary.n_features)
    yield from _rows("alive", features, (firings.counts > config.alive_threshold).double(), n)
    yield from _rows("density", features, firings.counts.double() / n, n)
    if dictionary.encoders is None:
        yield Score.of("encoder_cosine", None)
    else:
        cosines = similarity.row_cosines(dictionary.encoders, dictionary.directions)
        yield from _rows("encoder_cosine", features, _rounded(cosines))
    unit = similarity.unit_rows(dictionary.directions)
    yield from _rows("capacity", features, _rounded(similarity.capacity(unit)), dictionary.n_features)


def _compared(bench: Bench, dictionary: Dictionary, other: Dictionary, config: GeometryConfig) -> Iterator[Score]:
    """MMCS and matches, both ways, each with its null."""
    absolute = dictionary.signed or other.signed
    own, theirs = (_side(bench, d, config) for d in (dictionary, other))
    for ending, a, b in (("", own, theirs), ("_back", theirs, own)):
        random = similarity.random_units(len(b.present), dictionary.d_in, _null_seed(bench.seed))
        yield from _mmcs(f"mmcs{ending}", a, b.directions[b.present], absolute)
        yield from _mmcs(f"mmcs{ending}_random", a, random, absolute)
        yield from _matched(f"matched{ending}", a, b.directions[b.alive], absolute, config, bench.seed)
        yield from _matched(f"matched{ending}_random", a, random[: len(b.alive)], absolute, config, bench.seed)


def _null_seed(seed: int) -> int:
    """A seed of the null's own: from the suite's seed alone come also the starting directions of trained dictionaries."""
    return int(content_hash(["random directions of geometry", seed])[:15], 16)


def _side(bench: Bench, dictionary: Dictionary, config: GeometryConfig) -> Side:
    directions = similarity.unit_rows(dictionary.directions)
    present = similarity.has_direction(directions)
    alive = _fired(bench, dictionary).counts > config.alive_threshold
    return Side(directions, *(mask.nonzero()[:, 0] for mask in (present, alive & present, alive & ~present)))


def _mmcs(metric: str, side: Side, among: Float[torch.Tensor, "B D"], absolute: bool) -> Iterator[Score]:
    """Largest cosine of each alive feature with the rows of ``among``."""
    if not len(side.alive) or not len(among):
        yield Score.of(metric, None)
        return
    best = similarity.nearest(side.directions[side.alive], among, absolute=absolute).cosines[:, 0]
    yield from _rows(metric, side.alive, _rounded(best), len(among))
    yield from _rows(metric, side.silent, torch.full((len(side.silent),), float("nan")), len(among))


def _matched(
    metric: str, side: Side, among: Float[torch.Tensor, "B D"], absolute: bool, config: GeometryConfig, seed: int
) -> Iterator[Score]:
    """Whether each alive feature (each drawn one, where they are many) has a partner of its own in ``among``."""
    if not len(side.alive) or not len(among):
        yield Score.of(metric, None)
        return
    drawn = side.alive
    if len(drawn) > config.match_features:
        order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
        drawn = drawn[order[: config.match_features].sort().values]
    rows = side.directions[drawn]
    above = torch.zeros(len(drawn), dtype=torch.float64)
    # no pair can be above where no cosine is, and the matching is the expensive part: the null ends here
    if bool((similarity.nearest(rows, among, absolute=absolute).cosines > config.matched_above).any()):
        found = similarity.match_one_to_one(rows, among, absolute=absolute, limit=config.match_features)
        above = (found.cosines > config.matched_above).double()  # NaN, no partner, is not above
    yield from _rows(metric, drawn, above, min(len(among), config.match_features))


def _rounded(values: Float[torch.Tensor, " A"]) -> Float[torch.Tensor, " A"]:
    return values.double().round(decimals=DECIMALS)


def _rows(metric: str, features: Int[torch.Tensor, " A"], values: Float[torch.Tensor, " A"], n: int = 1) -> Iterator[Score]:
    """A score a feature; NaN is 'undefined'."""
    for feature, value in zip(features.tolist(), values.tolist(), strict=True):
        yield Score.of(metric, value, feature, "feature", n=n)
