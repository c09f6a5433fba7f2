"""A user's own pairs, one JSON object a line.

1. Each line has ``base`` and ``target`` (prompts with as many tokens), ``base_answer`` and ``target_answer`` (what follows
   each, with the leading space), and may have ``wrong``, what the base answer is held against: ``target_answer`` when left out.
2. Answers of several tokens count by their first one.
3. A line ends at a line feed only, and a byte order mark at the start of the file is passed over.
4. Where the file has more pairs than are asked for, they are drawn by seed; where it has fewer, all are taken.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from evalkit.errors import CorpusError
from evalkit.tasks.base import TASKS, Pairs, PairSpec, Tokenise, encode_pair, make_pairs
from evalkit.util.registry import near_miss
from evalkit.util.user_files import half_character, placed, read_text

NEEDED = ("base", "target", "base_answer", "target_answer")


def read_pairs(path: Path) -> list[tuple[int, PairSpec]]:
    """Every pair of the file with its line number; empty lines are passed over.

    Raises:
        CorpusError: the file cannot be read, or a line is no JSON object with the strings a pair needs.
    """
    lines = read_text(path, CorpusError).split("\n")  # splitlines would cut at U+2028, which JSON allows in a text
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"this line is not JSON: {error.msg}", where=where, fix="write one JSON object a line") from error
        if not isinstance(item, dict):
            raise CorpusError("this line is not a JSON object", where=where, fix=f"write an object with {', '.join(NEEDED)}")
        for name in item:
            if name not in (*NEEDED, "wrong"):
                raise CorpusError(f"a pair has no field '{name}'", where=where, fix=near_miss(name, (*NEEDED, "wrong")))
        for name in (*NEEDED, *(["wrong"] if "wrong" in item else [])):
            if not isinstance(item.get(name), str) or not item[name]:
                raise CorpusError(f"the field '{name}' is missing or no text", where=where, fix=f'write "{name}": "..."')
            half = half_character(item[name])
            if half:
                raise CorpusError(f"the field '{name}' holds half of a character ({half})", where=where, fix="mend the text")
        found.append((number, PairSpec(**{"wrong": item["target_answer"], **item})))
    return found


@TASKS.register("jsonl")
def jsonl(tokenise: Tokenise, n: int, seed: int, *, path: str) -> Pairs:
    """At most ``n`` pairs of the file ``path``.

    Args:
        path: JSONL file of pairs.

    Raises:
        CorpusError: the file cannot be read or holds no pair, or a pair cannot be used; the line is named.
    """
    found = read_pairs(placed(path))
    if not found:
        raise CorpusError("the file holds no pair", where=path, fix=f"write one object a line, with {', '.join(NEEDED)}")
    if len(found) > n:
        found = [found[row] for row in sorted(random.Random(f"jsonl {seed}").sample(range(len(found)), n))]
    for number, spec in found:
        encode_pair(tokenise, spec, f"{path}, line {number}")
    return make_pairs(tokenise, [spec for _, spec in found], path)
