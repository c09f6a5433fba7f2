"""Concepts that features are asked about: texts in pairs or with labels, words, or a question for a judge, in small TOML files.

1. A packaged concept is a file of ``evalkit/concepts``; a user's one is a file of theirs. Its name is the file's.
2. ``pairs`` are texts of our own, two and two: one that shows the concept and one like it that does not. Pairs are never divided
   between choosing and checking.
   Controlled in the packaged pairs: no count of ``surface`` separates their sides at an AUROC above 0.65 over a concept's 24
   pairs. These are characters, words, capitals, digits, accents, each class of marks, and tokens of the packaged model. What is
   not the concept is matched to it: prose in the marks of code, numbers that are no dates, capitalised words that are neither
   persons nor places, other languages with the same accents and capitals, the same groups of people without prejudice.
   Not controlled: the words. A concept has words of its own, and a bag of words may tell the sides apart. Other tokenizers cut
   foreign languages and code into other numbers of tokens. The evaluation measures both on the texts it reads.
3. ``present`` and ``absent`` are labelled texts from elsewhere, one by one and as many of either as there are, in place of pairs.
   They are divided by label. What else tells them apart, such as their length or topic, a feature may tell as well.
4. A concept without texts of its own takes its texts from the scoring text: those that hold one of its ``words``, or those that
   the judge counts to its ``question``, and as many that do not. The judge writes no yes or no. It simulates, as it does for
   explanations: the question stands where an explanation stands, every token of the text is rated from 0 to 10, and a text
   counts as yes where its highest token reaches half of the scale.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evalkit.errors import CorpusError, SuiteError
from evalkit.util.registry import near_miss
from evalkit.util.settings import parse
from evalkit.util.user_files import placed, read_text

FOLDER = Path(__file__).parent / "library"
LEAST_TEXTS = 8
"""Texts of either kind (pairs have one of each) without which nothing is tested, wherever they come from."""


class Pair(NamedTuple):
    """Two texts that differ in the concept."""

    present: str
    """Shows it."""
    absent: str
    """Does not."""


@dataclass(frozen=True)
class _File:
    """What a concept file may hold."""

    title: str
    """The concept in a few words, as in "names of people"."""
    words: tuple[str, ...] = ()
    """Words that name it."""
    question: str = ""
    """What a judge is asked about a text, in place of the title, which it grades by. Without texts here it also says which texts
    show it."""
    pairs: Any = ()
    """Pairs of texts, [present, absent]."""
    present: tuple[str, ...] = ()
    """Texts that show it, where there are no pairs."""
    absent: tuple[str, ...] = ()
    """Texts that do not; not necessarily as many."""


class Concept(NamedTuple):
    """One concept and how texts that show it are recognised."""

    name: str
    title: str
    words: tuple[str, ...]
    question: str
    pairs: tuple[Pair, ...]
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where its labels come from: 'pairs', 'texts', 'words' or 'judge'."""
        return "pairs" if self.pairs else "texts" if self.present else "judge" if self.question else "words"

    @property
    def asked(self) -> str:
        """What a judge simulates where it looks for this concept in texts: the question, or the title where there is none."""
        return self.question or self.title


def packaged() -> list[str]:
    """Names of the concepts that come with evalkit."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def concept_files(names: Sequence[str] = (), files: Sequence[str] = (), where: str = "") -> list[Path]:
    """The files of some packaged concepts, or of all where neither names nor files are given, and the user's ``files``.

    Raises:
        SuiteError: there is no such packaged concept or file, or two have one name.
    """
    known = packaged()
    for name in names:
        if name not in known:
            raise SuiteError(f"there is no packaged concept '{name}'", where=f"{where} concepts", fix=near_miss(name, known))
    chosen = names or (() if files else known)
    found = [FOLDER / f"{name}.toml" for name in chosen] + [placed(file) for file in files]
    for path in found:
        if not path.is_file():
            raise SuiteError("there is no such concept file", where=str(path), fix="correct files; they start at the suite file")
    stems = [path.stem for path in found]
    twice = [stem for stem in stems if stems.count(stem) > 1]
    if twice:
        raise SuiteError(f"two concepts are called '{twice[0]}'", where=f"{where} files", fix="rename the file or leave one out")
    return found


def load_concept(path: Path) -> Concept:
    """The concept in the file ``path``.

    Raises:
        SuiteError: it is not TOML, holds unknown keys, its pairs are no pairs of different texts, or its labelled texts lack a
            label, are empty, stand there twice or beside pairs; or a word is blank.
        CorpusError: it has too few pairs, or none and neither words nor a question; or too few texts of a label.
    """
    try:
        table = tomllib.loads(read_text(path, SuiteError))
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"not valid TOML: {error}", where=str(path), fix="correct that line") from error
    file = parse(_File, table, str(path))
    blank = [number for number, word in enumerate(file.words, start=1) if not word.strip()]
    if blank:
        raise SuiteError(f"word {blank[0]} is blank: every text holds it", where=f"{path} words", fix="write it or leave it out")
    pairs = []
    for number, pair in enumerate(file.pairs, start=1):
        texts = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        if not texts or pair[0] == pair[1]:
            what = f"pair {number} is not two different texts"
            raise SuiteError(what, where=f"{path} pairs", fix='write ["text that shows it", "text that does not"]')
        pairs.append(Pair(*pair))
    if not {"present", "absent"}.isdisjoint(table):
        _check_labelled(file, str(path), pairs)
    elif len(pairs) < LEAST_TEXTS and (pairs or not (file.words or file.question)):
        # texts come from the scoring text only where there are no pairs: a few are an error even beside words
        instead = "leave pairs out, so that words or the question tell the texts" if file.words or file.question else ""
        raise CorpusError(
            f"{len(pairs)} pairs cannot show anything",
            where=f"{path} pairs",
            fix=f"give at least {LEAST_TEXTS} pairs (24 or more to be sure of something), or "
            + (instead or "labelled texts, words or a question instead"),
        )
    return Concept(path.stem, file.title, file.words, file.question, tuple(pairs), file.present, file.absent)


def _check_labelled(file: _File, where: str, pairs: Sequence[Pair]) -> None:
    if pairs:
        what = "there are both pairs and labelled texts"
        raise SuiteError(what, where=where, fix="leave out pairs, or present and absent")
    labelled = {"present": file.present, "absent": file.absent}
    for label, texts in labelled.items():
        blank = [number for number, text in enumerate(texts, start=1) if not text.strip()]
        if blank:
            raise SuiteError(f"text {blank[0]} is empty", where=f"{where} {label}", fix="write the text or leave it out")
        if len(texts) < LEAST_TEXTS:
            raise CorpusError(
                f"{len(texts)} texts cannot show anything"
                if texts
                else "labelled texts need both labels, and there are none here",
                where=f"{where} {label}",
                fix=f"give at least {LEAST_TEXTS} texts that {'show it' if label == 'present' else 'do not'}",
            )
    every = [*file.present, *file.absent]
    twice = [text for text in every if every.count(text) > 1]
    if twice:
        raise SuiteError(f"a text stands there twice: '{twice[0][:60]}'", where=where, fix="leave one of them out")
