"""Text around activations, as a page shows it: the token shaded by its share of the feature's largest activation.

A token is shown as ``legible`` text: no control character and no mark that turns the writing round reaches the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from evalkit.report.tables import number
from evalkit.util.terminal import legible

EMPTY = "(empty)"


class Shade(NamedTuple):
    """A stretch of text and its activation."""

    text: str
    share: float = 0.0
    """Of the largest activation; 0 is not shaded."""
    value: str = ""


class Context(NamedTuple):
    """Text with the activations of its tokens."""

    value: str
    """The largest."""
    text: list[Shade]


def visible(token: str) -> str:
    """A token as print shows it: the space in front as a small mark, line ends as such."""
    shown = legible(token)
    return ("\u2423" + shown[1:] if shown.startswith(" ") else shown) or EMPTY


def tokens_of(value: Any) -> list[Any]:
    """A list that is stored as such or as JSON."""
    return list(json.loads(value)) if isinstance(value, str) else list(value) if value is not None else []


def read(cells: Iterable[Any]) -> list[dict[str, Any]]:
    """Contexts of the column ``contexts``: window, position, value, tokens and at, the largest activation first."""
    contexts = [context for cell in cells if isinstance(cell, str) for context in json.loads(cell)]
    return sorted(contexts, key=lambda context: (-abs(context["value"]), context["window"], context["position"]))


def parts(context: dict[str, Any]) -> tuple[str, str, str]:
    """Text before the token, the token, and text after it."""
    tokens, at = context["tokens"], context["at"]
    before, token, after = (legible("".join(part)) for part in (tokens[:at], tokens[at : at + 1], tokens[at + 1 :]))
    return before, token, after


def around(context: dict[str, Any], largest: float) -> Context:
    """A context of which the activation of one token is known."""
    before, token, after = parts(context)
    value = number(context["value"], 2)
    return Context(value, [Shade(before), Shade(token or EMPTY, share(context["value"], largest), value), Shade(after)])


def share(value: float, largest: float) -> float:
    """How dark a token is shaded; a position that is masked out (NaN) is not."""
    return round(min(1.0, abs(value) / largest), 3) if largest > 0 and not math.isnan(value) else 0.0
