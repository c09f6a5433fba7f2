"""What an endpoint's no means: pass it over, wait, fail one call, or end the run.

1. A trouble has a status, a message and a code. It comes with an HTTP status, or inside the body of an answer with status 200, as
   gateways send it; both are read alike, in the forms that servers use.
2. Its kind decides what is done. 'passing': the same request may succeed later. 'prompt': this prompt is refused (too long, held
   back by a filter), others are not. 'key' and 'credit': nothing will be served. 'absent': no such model or address.
   'forbidden': a 403 without a reason, by the key or by a firewall that dislikes the prompt; what was answered before decides.
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
    r"content[ _-]?(filter|management|policy)|moderat|flagged|safety(?!_)|usage polic|polic(y|ies) violation|violat\w+ .*polic"
    r"|responsible.?ai|prohibited|harmful|inappropriate|data_inspection|(?<!case)(?<!case[ _-])sensitive"
)
_FILTER_CODE = re.compile(r"content[ _-]?(filter|policy)|moderation|data_inspection")
_TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|maximum context|too (long|large)|too many (\w+ )?tokens|token (count|limit)"
    r"|maximum .*tokens|tokens? .*(exceed|<=|at most|maximum)|exceed\w* .*(context|length|tokens)|max(imum)?[ _](model|seq|input)"
    r"|reduce the length|string_above_max|n_ctx|input length"
)
_OWN_LIMIT = re.compile(r"max_(completion_|output_|new_)?tokens")
_PROMPT = re.compile(r"context|prompt|inputs?\b|messages")
"""What a refusal names beside the limit on the answer where the prompt is what is too long."""
_UNPAID = re.compile(r"billing[ _](hard[ _])?limit|billing_not_active|insufficient[ _](user[ _])?quota|exceeded_current_quota")
"""What a 429 has to say to be about money."""
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
_FORBIDDING = re.compile(r"api[ _-]?key|\bkeys?\b|credential|authori[sz]|\baccount\b|\bproject\b|subscription")
"""What a 403 has to say to be about the key."""
_FIREWALL = re.compile(
    r"firewall|\bwaf\b|cloudflare|captcha|\bray id\b|security (service|solution|rule)"
    r"|(request|access|connection) (was |is |has been )?blocked|you (have been|were|are) blocked"
)
"""What the page of a firewall says, which may speak of accounts and key words as well."""
_UNTAKEN = re.compile(
    r"(unsupported|unknown|unrecogni[sz]ed|unexpected|extra|illegal)[ _](request )?(keyword )?"
    r"(parameter|argument|field|option|value|input)|extra_forbidden"
    r"|(parameter|argument|field|option)s? .{0,60}(not (supported|permitted|recogni[sz]ed|allowed)|unsupported)"
)
"""A setting that is not taken, whatever its name sounds like."""
_NO_MODEL = re.compile(r"model_not_found|unknown_model|model .{0,120}(not found|does ?n[o']t exist|not available)|no such model")
_WORDS = ("message", "detail", "msg", "status_msg", "error_msg", "error_message", "errorMessage", "title")
"""Fields that hold the words of an error, in the order in which they are looked for."""


class Trouble(NamedTuple):
    """What an endpoint sent instead of an answer, as it is; ``Transport.printable`` makes a message of it."""

    status: int
    """As HTTP has it; 0 where none was given."""
    message: str
    code: str = ""
    """The endpoint's own name for it, '' where it gives none."""

    @property
    def kind(self) -> str:
        """'passing', 'prompt', 'key', 'forbidden', 'credit', 'absent' or 'request'."""
        status, code = self.status, self.code.lower()
        text = f"{self.message} {code}".lower()
        if status == 402 or _UNPAID.search(text if status == 429 else code) or (status != 429 and _CREDIT.search(text)):
            return "credit"
        if status == 401 or (status == 0 and _KEY.search(text)) or (status in (0, 400) and _API_KEY.search(text)):
            return "key"
        if status in (408, 425, 429):
            return "passing"
        setting, model = _UNTAKEN.search(text), _NO_MODEL.search(text) if status < 500 else None
        if not setting and not model and self._too_long(text):
            return "prompt"
        if status >= 500 and status != 501:
            return "passing"
        filtered = _FILTER_CODE.search(code) or (not setting and not model and _FILTER.search(text))
        if filtered and (status not in (404, 405, 410, 501) or _FILTER_CODE.search(code)):
            return "prompt"
        if status == 0 and not model and _PASSING.search(text):
            return "passing"
        if status == 403:
            about_key = _KEY.search(text) or _API_KEY.search(text)
            return "key" if about_key or (_FORBIDDING.search(text) and not _FIREWALL.search(text)) else "forbidden"
        if model or status in (404, 405, 410, 501) or 300 <= status < 400:
            return "absent"
        return "request"

    def _too_long(self, text: str) -> bool:
        """Whether the prompt is; a limit on the answer that is out of range is not about the prompt."""
        if _OWN_LIMIT.search(text) and not _PROMPT.search(text):
            return False
        return self.status == 413 or bool(_TOO_LONG.search(text)) or (self.status in (400, 422) and "context" in text)


def trouble_in(body: Any, status: int = 0) -> Trouble | None:
    """What the body of an answer says went wrong; None where it says nothing of the kind.

    Args:
        body: the parsed body: {"error": {...}}, {"error": "words"}, {"errors": [...]}, {"message": ...}, {"msg": ...},
            {"detail": ...}, {"base_resp": {...}}, {"status": "error"}, {"success": false}, a list with one of these, or a text.
            A body with choices is an answer, unless it has an ``error``.
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
        error = None if choices else _unnamed(body)
        if error is None and status:
            error = body
        if error is None:
            return None
    return _trouble(error, body, status)


def _unnamed(body: Mapping[str, Any]) -> Any:
    """The error in a body without choices that has no field ``error``; None where it says nothing of one."""
    if errors := body.get("errors"):
        return errors[0] if isinstance(errors, list) else errors
    if isinstance(base := body.get("base_resp"), Mapping) and base.get("status_code") not in (None, 0, "0"):
        return base
    state = str(body.get("status", "")).lower()
    failed = body.get("success") is False or state in ("error", "failed", "failure", "fail") or re.fullmatch(r"[45]\d\d", state)
    words = any(isinstance(body.get(name), str) and body[name] for name in _WORDS) or "detail" in body
    return body if failed or words or body.get("object") == "error" else None


def _trouble(error: Any, body: Mapping[str, Any], status: int) -> Trouble:
    if not isinstance(error, Mapping):
        error = {"message": error, "type": body.get("error_type"), "code": body.get("code"), "status": body.get("status")}
    message = next((error[name] for name in (*_WORDS, "error") if error.get(name)), "") or error
    names = [error.get(name) for name in ("code", "type", "error_code", "status", "status_code", "param")]
    number = next((int(str(name)) for name in names if re.fullmatch(r"[1-5]\d\d", str(name))), 0)
    codes = [name for name in names[:3] if isinstance(name, str) and not name.isdigit()]
    code = next((name for name in codes if _UNPAID.search(name.lower())), codes[0] if codes else "")
    return Trouble(status or number, str(message), code)
