"""Words in texts: how it is decided whether a text holds one.

A word is in a text where no letter, digit or underscore goes on at either end of it, upper and lower case alike. Where the word
itself begins or ends with a sign ("C++", "$") there is no such condition on that side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Finds any of ``words``, none of which is blank, the longest first; upper and lower case alike."""
    # \b would ask for a letter behind "C++": a border is asked for only on the sides where the word has a letter itself
    either = [
        (r"(?<!\w)" if re.match(r"\w", word) else "") + re.escape(word) + (r"(?!\w)" if re.search(r"\w\Z", word) else "")
        for word in sorted(words, key=len, reverse=True)
    ]
    return re.compile("|".join(either) or r"(?!)", re.IGNORECASE)
