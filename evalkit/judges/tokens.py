"""How tokens are shown to a judge: one line for each token, so line breaks and tabs inside a token become visible escapes."""

from __future__ import annotations

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_ESCAPES |= {mark: f"\\x{ord(mark):02x}" for mark in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"}  # str.splitlines breaks at these too


def visible(token: str) -> str:
    """``token`` on one line: backslash, tab and line breaks escaped, everything else as it is."""
    return "".join(_ESCAPES.get(character, character) for character in token)
