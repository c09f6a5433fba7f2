"""What a dictionary's details say of where it comes from, for whoever reads its numbers.

1. ``made_with``: how the activations it was trained on were made, as far as its file says.
2. ``fitted``: what a baseline was fitted on, and whether its fit converged.
3. ``notes`` and ``ignored``: what its reader could not follow, and the fields of its files that were not used.
4. ``remarks`` is all of it in sentences: ``evalkit import``, the tables and the page of a run show them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

MOST = 12
"""Unused fields that are named."""


def note(details: dict[str, Any], sentence: str) -> None:
    """Add ``sentence`` to the notes of ``details``, once."""
    notes = details.setdefault("notes", [])
    if sentence not in notes:
        notes.append(sentence)


def remarks(details: Mapping[str, Any]) -> list[str]:
    """What a reader of a dictionary's numbers has to know of its files: its notes, and the fields that were not used."""
    notes, ignored = details.get("notes"), details.get("ignored")
    found = fitted(details)
    found += [str(sentence) for sentence in notes] if isinstance(notes, list) else []
    if isinstance(ignored, dict) and ignored:
        named = [f"{name} = {str(value)[:40]}" for name, value in list(ignored.items())[:MOST]]
        more = f" and {len(ignored) - MOST} more" if len(ignored) > MOST else ""
        found.append(f"fields of its files that were not used: {', '.join(named)}{more}")
    return found


def fitted(details: Mapping[str, Any]) -> list[str]:
    """What a baseline was fitted on, its components, its convergence and its matched L0, in one sentence; none elsewhere."""
    if "baseline" not in details:
        return []
    parts = []
    if isinstance(components := details.get("components"), int):
        parts.append(f"{components:,} components")
    if isinstance(vectors := details.get("vectors"), int):
        parts.append(f"fitted on {vectors:,} vectors")
    if isinstance(iterations := details.get("iterations"), int) and isinstance(converged := details.get("converged"), bool):
        tolerance = f" (tolerance {details['tolerance']:g})" if isinstance(details.get("tolerance"), float) else ""
        parts.append(f"{'converged' if converged else 'not converged'} after {iterations:,} iterations{tolerance}")
    if isinstance(named := details.get("top_k_of"), str):
        active = details.get("top_k_of_active")
        measured = f", which has {active:.1f} on the fitting text" if isinstance(active, float) else ""
        parts.append(f"{details.get('top_k')} codes a token, as '{named}'{measured}")
    return [", ".join(parts)] if parts else []


def named_remarks(dictionaries: Iterable[tuple[str, str | None]]) -> list[str]:
    """The remarks on several dictionaries, each with its name before it, every one once.

    Args:
        dictionaries: name, and details as JSON or None.
    """
    found = []
    for name, details in dict.fromkeys(dictionaries):
        known = json.loads(details) if isinstance(details, str) else {}
        found += [f"{name}: {remark}." for remark in remarks(known if isinstance(known, dict) else {})]
    return found


def made_with(details: Mapping[str, Any]) -> dict[str, Any]:
    """How the activations that a dictionary was trained on were made, as far as its file says.

    Common names: model, hook_point, dataset, context_size, prepend_bos, exclude_special_tokens, seqpos_slice, normalisation,
    scaling_factor, model_from_pretrained_kwargs.
    """
    found = details.get("made_with")
    return dict(found) if isinstance(found, dict) else {}
