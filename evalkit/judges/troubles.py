"""What an endpoint's no means: pass it over, wait, fail one call, or end the run.

1. A trouble has a status, a message and a code. It comes with an HTTP status, or inside the body of an answer with status 200, as
   gateways send it; both are read alike, in the forms that servers use.
2. Its kind decides what is done. 'passing': the same request may succeed later. 'prompt': this prompt is refused (too long, held
   back by a filter), others are not. 'key' and 'credit': nothing will be served. 'absent': no such model or address.
   'request': refused for another reason, which may lie in the prompt or in the set-up.
3. The words of the message count only where status and code leave the kind open.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_PAGE = 30_000
"""Characters of a page that are looked at for its message."""

_FILTER = re.compile(
    r"content[ _-]?(filter|management|policy)|moderat|flagged|safety|usage polic|polic(y|ies) violation|violat\w+ .*polic"
    r"|responsible.?ai|prohibited|harmful|inappropriate|data_inspection|sensitive"
)
_TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|maximum context|too (long|large)|too many (\w+ )?tokens|token (count|limit)"
    r"|maximum .*tokens|tokens? .*(exceed|<=|at most|maximum)|exceed\w* .*(context|length|tokens)|max(imum)?[ _](model|seq|input)"
    r"|reduce the length|string_above_max|n_ctx|input length"
)
_CREDIT = re.compile(
    r"insufficient[ _](quota|credit|balance|funds)|out of credit|not enough credit|credit balance|billing|payment required"
)
_KEY = re.compile(r"(invalid|incorrect|missing|wrong|expired|no) (api[ _-]?)?key|invalid_api_key|unauthori[sz]ed|authentication")
_API_KEY = re.compile(r"api[ _-]?key (is )?(not valid|invalid|missing|expired)|(invalid|incorrect|wrong|expired) api[ _-]?key")
"""What a 400 has to say to be about the key."""
_PASSING = re.compile(
    r"too many requests|rate.?limit|overload|try again|retry|temporar|timed? ?out|\bbusy\b|unavailable|capacity|loading"
    r"|internal (server )?error|server_error|bad gateway|upstream|aborted|queue"
)
_UNTAKEN = ("unsupported_parameter", "unsupported_value")


class Trouble(NamedTuple):
    """What an endpoint said instead of an answer, as it said it: ``Transport.told`` makes a message of it that can be shown."""

    status: int
    """As HTTP has it; 0 where none was given."""
    message: str
    code: str = ""
    """The endpoint's own name for it, '' where it gives none."""

    @property
    def kind(self) -> str:
        """'passing', 'prompt', 'key', 'credit', 'absent' or 'request'."""
        status, code = self.status, self.code.lower()
        text = f"{self.message} {code}".lower()
        if status == 402 or code == "insufficient_quota" or (status != 429 and _CREDIT.search(text)):
            return "credit"
        if status == 401 or (status == 0 and _KEY.search(text)) or (status in (0, 400) and _API_KEY.search(text)):
            return "key"
        if status in (408, 425, 429):
            return "passing"
        if code not in _UNTAKEN and (status == 413 or _TOO_LONG.search(text) or (status in (400, 422) and "context" in text)):
            return "prompt"
        if status >= 500 and status != 501:
            return "passing"
        if code not in _UNTAKEN and _FILTER.search(text):
            return "prompt"
        if status == 0 and _PASSING.search(text):
            return "passing"
        if status == 403:
            return "key"
        if status in (404, 405, 410, 501) or 300 <= status < 400:
            return "absent"
        return "request"


def trouble_in(body: Any, status: int = 0) -> Trouble | None:
    """What the body of an answer says went wrong; None where it says nothing of the kind.

    Args:
        body: the parsed body: {"error": {...}}, {"error": "words"}, {"object": "error", "message": ...}, {"detail": ...}, a list
            with one of these, or a text.
        status: of the response, where it was an error already: then every body is a trouble.
    """
    while isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, Mapping):
        page = re.sub(r"<[^>]*>", " ", str(body or "")[:_PAGE])
        return Trouble(status, " ".join(page.split())) if status else None
    error = body.get("error")
    if isinstance(error, Mapping) and all(value in (None, "", 0, False, [], {}) for value in error.values()):
        error = None
    if error in (None, "", {}, False):
        choices = body.get("choices")
        errors = [one.get("error") for one in choices if isinstance(one, Mapping)] if isinstance(choices, list) else []
        if errors and all(errors) and len(errors) == len(choices or ()):
            return trouble_in({"error": errors[0]}, status)
        if status or (not choices and (body.get("object") == "error" or "detail" in body)):
            error = body
        else:
            return None
    return _trouble(error, body, status)


def _trouble(error: Any, body: Mapping[str, Any], status: int) -> Trouble:
    if not isinstance(error, Mapping):
        error = {"message": error, "type": body.get("error_type"), "code": body.get("code")}
    message = next((error[name] for name in ("message", "detail", "msg", "error") if error.get(name)), "") or error
    names = [error.get(name) for name in ("code", "type", "status", "status_code", "param")]
    number = next((int(str(name)) for name in names if re.fullmatch(r"[1-5]\d\d", str(name))), 0)
    code = next((name for name in names[:2] if isinstance(name, str) and not name.isdigit()), "")
    return Trouble(status or number, str(message), code)
