"""The metrics of the evaluation 'concepts': title, chance, null and what stands under the table."""

from __future__ import annotations

from evalkit.evaluations.base import Metric
from evalkit.evaluations.concepts.search import LEVELS
from evalkit.evaluations.concepts.texts import JUDGED_YES, TEXTS_CUT

METRICS: dict[str, Metric] = {
    "auroc": Metric(
        "AUROC", "higher", lowest=0.0, highest=1.0, chance=0.5, null="auroc_null", main=True,
        note="How well the feature that tells a concept best on half of its texts tells it on the other half, mean over "
        "concepts. Among more candidates a good one is likelier; evalkit compare gives the difference of two dictionaries, "
        "paired over concepts.",
    ),
    "recall_threshold": Metric(
        "fires on concept", "higher", lowest=0.0, highest=1.0,
        note="Share of the other half's texts with the concept on which the best feature reaches its threshold, which divides "
        "the first half best.",
    ),
    "injected": Metric(
        "fires on tokens", "lower", lowest=0.0, highest=1.0,
        note="Share of texts about other things on which it reaches the threshold once one of its own top tokens stands in them; "
        "they were below it before. A feature that fires on tokens as often as on the concept detects tokens.",
    ),
    "candidates": Metric(
        "candidates", "neither", interval=False, digits=0,
        note="Features among which the best is looked for; the two tails of signed codes count as two.",
    ),
    "auroc_null": Metric("AUROC, null", "neither", lowest=0.0, highest=1.0, chance=0.5,
        note="The same search with permuted labels."),
    "auroc_neuron": Metric(
        "AUROC, neuron", "higher", lowest=0.0, highest=1.0, chance=0.5,
        note="The same search over the dimensions of the hook point, both tails of each."
    ),
    "auroc_probe": Metric(
        "AUROC, probe", "higher", lowest=0.0, highest=1.0, chance=0.5,
        note="A logistic regression on mean activations, same halves."
    ),
    "auroc_surface": Metric(
        "AUROC, surface", "neither", lowest=0.0, highest=1.0, chance=0.5,
        note="A logistic regression on length, capitals, digits, marks and the 200 commonest words, same halves. It reads no "
        "activation: a feature at or below it may know no more than the surface.",
    ),
    "auroc_count": Metric(
        "AUROC, one count", "neither", lowest=0.0, highest=1.0, chance=0.5,
        note="The best single count of the surface (tokens, characters, capitals, ...), found and tested on the same halves.",
    ),
    "told": Metric(
        "detected", "higher", transform="counts",
        note="Share of the concepts that a found feature tells significantly on the other half (signed ranks of pairs, else "
        "Mann-Whitney; Holm over all concepts and found features).",
    ),
    "told_neuron": Metric("detected, neuron", "higher", transform="counts", note="The same for dimensions of the hook point."),
    "auroc_given": Metric(
        "AUROC, given", "higher", lowest=0.0, highest=1.0, chance=0.5,
        note="How well the features of feature_ids tell a concept on the same half, mean over them and over concepts.",
    ),
    "told_given": Metric(
        "detected, given", "higher", lowest=0.0, highest=1.0,
        note="Share of the features of feature_ids that tell a concept significantly (Holm over all concepts and these "
        "features).",
    ),
    "precision_strong": Metric(
        "precision, strong", "higher", lowest=0.0, highest=1.0, null="precision_null",
        note="Of the other half's texts on which the best feature fires in the upper third of its range, the share that show "
        "the concept; undefined where there are none.",
    ),
    "precision_null": Metric(
        "precision, any text", "neither", lowest=0.0, highest=1.0,
        note="Share of the other half's texts that show the concept: the precision of a feature that fires on all alike, 0.5 "
        "where the labels are balanced.",
    ),
    "recall": Metric(
        "recall", "higher", lowest=0.0, highest=1.0,
        note="Share of the texts showing the concept on which the best feature fires at all."
    ),
    "rating": Metric(
        "rating", "higher",
        note="How well the concept tells the tokens on which the best feature fires, from 0 (nothing to do with the text) to "
        "3 (plainly what fires), by the judge, who is shown them marked in texts of the other half (rate).",
    ),
    **{
        f"rating_{level}": Metric(
            f"rating, {level}", "higher", note=f"The same in texts at {level} activation (thirds of its range).",
        )
        for level in LEVELS
    },
    "judged_yes": JUDGED_YES,
    "texts_cut": TEXTS_CUT,
}  # fmt: skip
"""By key. Those with one score a concept come first to last in the order of the table."""
