"""What a feature does to the next token: ablate it where it fires, and the reverse, with the direct effect beside it.

1. Features are named or drawn (``sampling``); of each, contexts where it is strong are drawn, each feature's on their own
   (``edits_of``). The next token is read at the feature's strongest position of the context.
2. Ablation: x - c f at every kept position of the context where it fires (the first positions and massive activations are left
   as they are), the error term x - x_hat as it is; then the rest of the model. Change of the log-probability of every token;
   KL(original || ablated).
3. Tokens most lowered and most raised, by the mean change of log-probability, and by the mean change of probability, each with a
   95% bootstrap interval over contexts. They are picked for being extreme among all tokens, so intervals of single tokens
   flatter; concentration does not, as its null picks in the same way.
4. Direct effect: the same edit carried by the residual stream alone to the last norm and the unembedding, no later block seeing
   it. Change of the centred logits.
5. Concentration: mean change of probability of the ten tokens it changes most, over the mean summed change: 1 where ablation
   moves the same few tokens the same way in every context, small where it does something else each time.
6. Repeated: which way each token's probability goes in one half of the contexts; the share of the change in the other half that
   goes that way, less the share that goes against it. Nothing is measured where it was picked.
7. Reverse: the feature is added at its maximum where it was silent ('add'), or raised to it where it fires ('clamp').
8. Null: at the same positions as much is added along random directions, one after the other.

Cunningham et al. 2023 (arXiv 2309.08600), section 5 and appendix D. Concentration, nulls and intervals are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from evalkit.evaluations.base import EVALUATIONS, Bench, Evaluation, Metric, Result, Score, Sizes
from evalkit.evaluations.sampling import LEAST_WINDOWS, Preference, choose_features, feature_codes
from evalkit.interventions.ablations import NULL, AblationPlan, Effects, edits_of, measure
from evalkit.util.settings import Count, Settings, Share
from evalkit.util.statistics import LEAST_CLUSTERS, correlation

if TYPE_CHECKING:
    from evalkit.dictionaries.base import Dictionary

TOP = 10
"""Tokens whose share of the change is the concentration."""
DRAWS = 1000
"""Bootstrap draws of an interval."""


@dataclass(frozen=True)
class AblationConfig(Settings):
    """Settings of the evaluation 'ablation': effects of single features on the next token."""

    features: Count = 40
    """Features drawn from those active in enough windows; a smaller sample is part of a larger one."""
    feature_ids: tuple[int, ...] = ()
    """Study these features instead of a sample."""
    least_windows: Count = LEAST_WINDOWS
    """Windows of scoring text a drawn feature must be active in."""
    prefer: Preference = "any"
    """'any' draws from all of these; 'one token' from the quarter that fires most on a single token, for stories of features."""
    contexts: Count = 16
    """Contexts of each feature."""
    nulls: Count = 3
    """Random directions that each ablation is held against. A story (``evalkit table stories``) has to beat every one."""
    level: Share = 0.5
    """Contexts are drawn where the feature reaches this share of its maximum; 0 draws from all it fires in."""
    tokens: Count = 8
    """Tokens listed as lowered and as raised, by each ranking."""
    reverse: Literal["add", "clamp", "none"] = "add"
    """'add' puts the feature where it was silent, 'clamp' raises it where it fires, 'none' does neither."""
    strength: float = 1.0
    """How far the reverse goes, in units of the feature's maximum."""
    shown: Count = 10
    """Tokens of a context that are kept for display."""


@EVALUATIONS.register("ablation")
class Ablation(Evaluation):
    """Tokens lowered and raised without a feature, concentration, total and direct effect, and the reverse."""

    name: ClassVar[str] = "ablation"
    version: ClassVar[int] = 7
    config: ClassVar[type] = AblationConfig
    metrics: ClassVar[dict[str, Metric]] = {
        "concentration": Metric(
            "concentration", "higher", null="concentration_random", main=True,
            note="Mean change of probability of the ten tokens ablation changes most, over the mean summed change: 1 where the "
            "same few tokens change alike in every context.",
        ),
        "concentration_random": Metric(
            "concentration, random", "neither",
            note="As much added along random directions at the same positions, mean over them.",
        ),
        "repeated": Metric(
            "repeated", "higher", null="repeated_random",
            note="Which way each token's probability goes in every second context; share of the change of probability in the "
            "others that goes that way, less the share that goes against it. Mean of both directions: 1 where every context is "
            "alike, about 0 where none is.",
        ),
        "repeated_random": Metric(
            "repeated, random", "neither", note="As much added along random directions at the same positions, mean over them."
        ),
        "repeated_rank": Metric(
            "repeated, rank", "neither", note="Share of the random directions whose effect repeats less (nulls of them)."
        ),
        "kl": Metric(
            "KL", "neither", lowest=0.0, null="kl_random", digits=4,
            note="Total effect of ablation: KL(original || ablated) of the next token, nats, mean over contexts where the "
            "feature is strong (level = 0.5 of its maximum unless set).",
        ),
        "kl_random": Metric(
            "KL, random", "neither", lowest=0.0, digits=4,
            note="As much added along random directions at the same positions, mean over them."
        ),
        "kl_rank": Metric("KL, rank", "neither", note="Share of the random directions with a smaller KL."),
        "next_change": Metric(
            "next token", "neither",
            note="Change of the log-probability of the token the text goes on with, nats; negative where the feature helps.",
        ),
        "direct_r": Metric(
            "direct r", "neither", chance=0.0,
            note="Correlation over all tokens of the mean change of log-probability with the change of logits that the residual "
            "stream alone carries to the unembedding; undefined off the residual stream.",
        ),
        "kl_reverse": Metric(
            "KL, reverse", "neither", lowest=0.0, digits=4,
            note="KL(original || edited) when the feature is added or clamped (reverse)."
        ),
        "concentration_reverse": Metric("concentration, reverse", "higher", note="Concentration of that effect."),
        "reverse_r": Metric(
            "reverse r", "neither", chance=0.0,
            note="Correlation over all tokens of what ablation takes and what the reverse gives: 1 where they are opposites.",
        ),
    }  # fmt: skip

    def temporary(self, config: AblationConfig, sizes: Sizes) -> int:
        """Changes of log-probability of every edit of a unit that is no null."""
        features = len(config.feature_ids) or config.features
        kinds = 1 if config.reverse == "none" else 2
        return 4 * features * min(config.contexts, sizes.windows) * kinds * sizes.vocabulary

    def run(self, bench: Bench, dictionary: Dictionary, config: AblationConfig) -> Result:
        """Edit the chosen features of ``dictionary`` and read the next token.

        Raises:
            UnitFailed: no feature is active in enough windows, or a named one does not exist.
            DictionaryError: its width is not that of the hook point.
        """
        dictionary.check_width(bench.model.width(bench.hook_point), bench.hook_point)
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
        plan = AblationPlan(config.contexts, config.level, config.reverse, config.strength, config.nulls, bench.seed)
        edits = [
            edit
            for place, feature in enumerate(features)
            for edit in edits_of(place, codes[..., place], score, dictionary, feature, plan)
        ]
        effects = measure(bench.model, bench.hook_point, score, edits, bench.progress)
        scores: list[Score] = []
        tables: dict[str, list[dict[str, Any]]] = {"logit_effects": [], "ablation_contexts": []}
        for place, feature in enumerate(features):
            own = {kind: found for (of, kind), found in effects.items() if of == place}
            scores += _scores(feature, own)
            for kind, found in own.items():
                if not kind.startswith(NULL):
                    tables["logit_effects"] += _tokens(bench, feature, kind, found, config)
                    tables["ablation_contexts"] += _contexts(bench, feature, kind, found, config)
        return Result(scores, tables)


def concentration(mass: Float[np.ndarray, " V"], moved: Float[np.ndarray, " C"]) -> float:
    """Share of the change of probability that the ``TOP`` tokens changed most carry; NaN where nothing changes.

    Args:
        mass: change of each token's probability, mean over contexts.
        moved: summed absolute change of each context.
    """
    total = float(moved.mean())
    largest = np.sort(np.abs(mass))[::-1][:TOP]
    return float(largest.sum() / total) if total > 0 else float("nan")


def repeated(halves: Float[np.ndarray, "2 V"], moved: Float[np.ndarray, " C"]) -> float:
    """Share of the change in one half of the contexts that goes the way the other half foretells, less what goes against it.

    Over all tokens: a feature may move a whole class of words of which each context shows others. NaN with one context or no
    change.

    Args:
        halves: mean change of each token's probability over every second context (``Effects.halves``).
        moved: summed absolute change of each context.
    """
    if len(moved) < 2:
        return float("nan")
    shares = []
    for here, there in ((0, 1), (1, 0)):
        total = float(moved[there::2].mean())
        along = float((np.sign(halves[here]) * halves[there]).sum(dtype=np.float64))
        shares.append(along / total if total > 0 else float("nan"))
    return float(np.mean(shares))


def _next_changes(found: Effects) -> Float[np.ndarray, " C"]:
    """Change of the log-probability of the token the text goes on with."""
    return found.change[np.arange(len(found.edits)), found.following].astype(np.float64)


def _scores(feature: int, effects: dict[str, Effects]) -> Iterator[Score]:
    values: dict[str, float] = {}
    n = 0
    if ablated := effects.get("ablate"):
        n = len(ablated.edits)
        mean = np.asarray(ablated.change, dtype=np.float64).mean(0)
        values |= {"concentration": concentration(ablated.mass, ablated.moved), "kl": float(ablated.kl.mean())}
        values["repeated"] = repeated(ablated.halves, ablated.moved)
        values["next_change"] = float(_next_changes(ablated).mean())
        if ablated.direct is not None:
            values["direct_r"] = correlation(mean, ablated.direct)
        if nulls := [found for kind, found in effects.items() if kind.startswith(NULL)]:
            kls, agreed = [float(null.kl.mean()) for null in nulls], [repeated(null.halves, null.moved) for null in nulls]
            shares = [concentration(null.mass, null.moved) for null in nulls]
            values |= {"concentration_random": float(np.mean(shares)), "kl_random": float(np.mean(kls))}
            values |= {"repeated_random": float(np.mean(agreed)), "kl_rank": float(np.mean(np.array(kls) < values["kl"]))}
            if not np.isnan([values["repeated"], *agreed]).any():
                values["repeated_rank"] = float(np.mean(np.array(agreed) < values["repeated"]))
        if back := effects.get("add") or effects.get("clamp"):
            values |= {"concentration_reverse": concentration(back.mass, back.moved), "kl_reverse": float(back.kl.mean())}
            values["reverse_r"] = -correlation(mean, np.asarray(back.change, dtype=np.float64).mean(0))
    for metric in Ablation.metrics:
        yield Score.of(metric, values.get(metric), feature, "feature", n=n)


def _tokens(bench: Bench, feature: int, kind: str, found: Effects, config: AblationConfig) -> Iterator[dict[str, Any]]:
    """Rows of ``logit_effects``: the extremes of each ranking, with intervals over contexts."""
    C = len(found.edits)
    mean = np.asarray(found.change, dtype=np.float64).mean(0)
    rankings = {"change": mean, "mass": found.mass}
    if found.direct is not None:
        rankings["direct"] = found.direct
    resamples = np.random.default_rng([bench.seed, 3, feature]).integers(0, C, (DRAWS, C))
    for by, values in rankings.items():
        order = np.argsort(values, kind="stable")
        for side, ids in (("lowered", order[: config.tokens]), ("raised", order[::-1][: config.tokens])):
            drawn = np.asarray(found.change[:, ids], dtype=np.float64)[resamples].mean(1)  # (DRAWS, K)
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
            for place, (token, text) in enumerate(zip(ids.tolist(), bench.model.token_strings(ids.tolist()), strict=True)):
                yield {
                    "feature": feature,
                    "edit": kind,
                    "ranked_by": by,
                    "side": side,
                    "place": place + 1,
                    "token_id": token,
                    "token": text,
                    "change": float(mean[token]),
                    "low": float(low[place]) if C >= LEAST_CLUSTERS else None,
                    "high": float(high[place]) if C >= LEAST_CLUSTERS else None,
                    "mass": float(found.mass[token]),
                    "direct": None if found.direct is None else float(found.direct[token]),
                    "probability": float(found.probability[token]),
                    "contexts": C,
                }


def _contexts(bench: Bench, feature: int, kind: str, found: Effects, config: AblationConfig) -> Iterator[dict[str, Any]]:
    """Rows of ``ablation_contexts``."""
    strings, text = bench.model.token_strings, bench.score().tokens
    for row, (edit, after, change) in enumerate(zip(found.edits, found.following, _next_changes(found), strict=True)):
        window, position = edit.context
        begin = max(0, position + 1 - config.shown)
        lowered = int((found.change[row]).argmin())
        yield {
            "feature": feature,
            "edit": kind,
            "window": window,
            "position": position,
            "code": edit.code,
            "edited": int((edit.amount[: position + 1] != 0).sum()),
            "kl": float(found.kl[row]),
            "tokens": strings(text[window, begin : position + 1].tolist()),
            "next_token": strings([int(after)])[0],
            "next_change": float(change),
            "lowered": strings([lowered])[0],
            "lowered_change": float(found.change[row, lowered]),
        }
