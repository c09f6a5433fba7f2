"""Tokens and activations of the fragments that explain-and-simulate scoring looks at, and the rows that are stored of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evalkit.activations.capture import Activations
from evalkit.activations.fragments import Fragment, FragmentLists
from evalkit.dictionaries.base import Dictionary
from evalkit.evaluations.autointerp.fragments import Chosen
from evalkit.evaluations.autointerp.scores import Scored
from evalkit.evaluations.base import Bench
from evalkit.judges.base import Example, Explanation, Judge

SILENT = 2
"""Fragments without the feature that the explainer is shown."""


class Reader:
    """Tokens and activations of fragments; each (fragment, feature) is encoded once."""

    def __init__(self, bench: Bench, dictionary: Dictionary, activations: Activations) -> None:
        self.bench, self.dictionary, self.activations = bench, dictionary, activations
        self._actual: dict[tuple[Fragment, int], np.ndarray] = {}

    def strings(self, fragment: Fragment) -> list[str]:
        ids = self.activations.tokens[fragment.window, fragment.start : fragment.start + fragment.length]
        return self.bench.model.token_strings(ids.tolist())

    def actual(self, fragment: Fragment, feature: int) -> np.ndarray:
        """(L,) float64 activations; NaN at positions that are not kept."""
        if (fragment, feature) not in self._actual:
            span = slice(fragment.start, fragment.start + fragment.length)
            x = self.activations.x[fragment.window, span]  # (L, D)
            values = self.dictionary.encode_feature(x, feature).double().numpy().copy()
            values[~self.activations.keep[fragment.window, span].numpy()] = np.nan
            self._actual[fragment, feature] = values
        return self._actual[fragment, feature]

    def remember(self, chosen: Sequence[Chosen]) -> None:
        """Encode all fragments of many features, each window once."""
        wanted: dict[int, list[tuple[Fragment, int]]] = {}
        for c in chosen:
            for fragment in (*c.explain, *c.top, *c.random):
                if (fragment, c.feature) not in self._actual:
                    wanted.setdefault(fragment.window, []).append((fragment, c.feature))
        for window, pairs in wanted.items():
            codes = self.dictionary.encode(self.activations.x[window]).double().numpy()  # (T, F)
            keep = self.activations.keep[window].numpy()
            for fragment, feature in pairs:
                span = slice(fragment.start, fragment.start + fragment.length)
                self._actual[fragment, feature] = np.where(keep[span], codes[span, feature], np.nan)

    def silent(self, c: Chosen) -> list[Example]:
        """Fragments of windows that are not scored and on which the feature is not active, at most ``SILENT``."""
        seen = {fragment.window for fragment in (*c.explain, *c.further, *c.top, *c.random)}
        documents = {int(self.activations.document[fragment.window]) for fragment in (*c.top, *c.random)}
        length, found = c.explain[0].length, []
        order = np.random.default_rng([self.bench.seed, c.feature]).permutation(len(self.activations.x))
        for window in order[: 10 * SILENT].tolist():
            if window in seen or int(self.activations.document[window]) in documents:
                continue
            fragment = Fragment(window, self.activations.x.shape[1] - length, length)
            if np.nan_to_num(self.actual(fragment, c.feature)).max() <= 0:
                found.append(self.example(fragment, c.feature))
            if len(found) == SILENT:
                break
        return found

    def example(self, fragment: Fragment, feature: int) -> Example:
        return Example(self.strings(fragment), np.nan_to_num(self.actual(fragment, feature)).tolist())

    def explanation_row(self, c: Chosen, said: Explanation, judge: Judge, lists: FragmentLists) -> dict[str, Any]:
        return {
            "feature": c.feature,
            "judge": judge.label,
            "explanation": said.text,
            "status": said.status,
            "error": said.error,
            "density": float(lists.firings[c.feature]) / lists.n_tokens,
            "max_activation": float(lists.maximum[c.feature]),
            "top_tokens": [self._peak(fragment, c.feature) for fragment in c.explain],
        }

    def _peak(self, fragment: Fragment, feature: int) -> str:
        return self.strings(fragment)[int(np.nanargmax(self.actual(fragment, feature)))]

    def prediction_rows(self, c: Chosen, scored: Scored, judge: Judge, explained_by: str) -> Iterator[dict[str, Any]]:
        for fragment, part, actual, answer in zip(*scored, strict=True):
            yield {
                "feature": c.feature,
                "judge": judge.label,
                "explained_by": explained_by,
                "part": part,
                "fragment": fragment.id,
                "document": int(self.activations.document[fragment.window]),
                "tokens": self.strings(fragment),
                "actual": [None if np.isnan(value) else float(value) for value in actual],
                "predicted": answer.expected,
                "digit_mass": answer.mass,
                "digit_unseen": answer.unseen,
                "status": answer.status,
            }
