"""Where a judge is and with what key: checked before anything is sent, and never printed.

1. An address is http or https, has a host, and holds no password and no key: suites are stored, printed and passed on.
2. A key is read from the environment, trimmed, and has to be one that a header can carry.
3. ``masked`` takes keys and passwords out of whatever a server or a library says.
"""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, urlsplit

from evalkit.errors import JudgeSetupError

_SECRET = re.compile(r"key|token|secret|passw|pwd|auth|sig|credential", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/?#@\s]+@")
_QUERY = re.compile(rf"([?&][^=&#\s]*(?:{_SECRET.pattern})[^=&#\s]*=)[^&#\s'\"]+", re.IGNORECASE)
_SHORTEST = 6
"""Shorter keys are no secrets, but parts of other words."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_address(address: str) -> None:
    """Refuse an address that no request can go to or that holds a secret, which is not repeated.

    Raises:
        JudgeSetupError: it is such an address.
    """

    def refused(what: str, fix: str) -> JudgeSetupError:
        return JudgeSetupError(what, where="[judge] base_url", fix=fix)

    key = "put the key into an environment variable and name it in api_key_env"
    named: list[str] = []
    try:
        parts = urlsplit(address)
        named = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)]
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        usable = usable and address.isprintable() and not re.search(r"\s", address) and not parts.fragment
        password = "@" in parts.netloc or ("@" in address and not usable)
    except ValueError:
        password, usable = "@" in address, False
    if password:
        raise refused("the judge's address holds a name or a password, and suites are stored and printed", key)
    if named:
        raise refused(f"the judge's address holds a key ('{named[0]}='), and suites are stored and printed", key)
    if not usable:
        raise refused(
            f"'{masked(address)}' is no address of an endpoint",
            "write it like https://api.openai.com/v1 or http://localhost:8080/v1",
        )


def check_variable(name: str) -> None:
    """Refuse what cannot be the name of an environment variable: most often it is the key itself, so it is not repeated.

    Raises:
        JudgeSetupError: it is no such name.
    """
    if name and not _VARIABLE.fullmatch(name):
        raise JudgeSetupError(
            "api_key_env is no name of an environment variable; it is not repeated here, as it may be the key itself",
            where="[judge] api_key_env",
            fix="export the key, as in: export MY_KEY=..., and write api_key_env = 'MY_KEY'",
        )


def key_from(variable: str) -> str:
    """The key in an environment variable, trimmed; '' where ``variable`` is empty.

    Raises:
        JudgeSetupError: the variable is not set, or no header can carry what it holds.
    """
    if not variable:
        return ""
    # somebody's key may look like a name: only what is written as variables are is repeated
    called = variable if re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable) else "that api_key_env names"
    key = os.environ.get(variable, "").strip()
    if not key:
        raise JudgeSetupError(
            f"there is no key for the judge: the environment variable {called} is not set",
            where="[judge] api_key_env",
            fix=f"export {called if called == variable else 'it'}=..., or set api_key_env = '' for an endpoint that wants "
            "no key, or use provider = 'local'",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise JudgeSetupError(
            f"the key in the environment variable {called} holds what no key has: blanks, line ends or letters beyond ASCII",
            where="[judge] api_key_env",
            fix="export it again, without quotes and line ends",
        )
    return key


def masked(text: str, key: str = "") -> str:
    """``text`` without ``key``, without names and passwords in addresses, and without keys in their queries."""
    if len(key) >= _SHORTEST:
        text = text.replace(key, "***")
    return _QUERY.sub(r"\1***", _USERINFO.sub("***@", text))
