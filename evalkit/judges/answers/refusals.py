"""Lines that stand where an explanation should: refusals in several languages, errors, "none", and findings of no pattern.

1. A refusal begins the line and names the judge itself: an apology that ends its clause, "I cannot" with a verb of the task,
   "As an AI" followed by what it says of itself. A phrase about apologies does neither.
2. "N/A", "none", "unknown" and the like count where they are all of the line.
3. "There is no clear pattern" says nothing of the text. With more behind it, it is an explanation.
"""

from __future__ import annotations

import re
from http import HTTPStatus

_ENDS = r"\s*(?:[,.!;:\u2014\uff0c\u3002\u3001]|- |$)"
_CANNOT = (
    r"(?:can(?:not|'t| not)|could ?n[o']t|(?:am |was |'m )?(?:really |very |currently )?(?:unable to|not able to)|won't|will not"
    r"|do not|don't|did not|didn't|must decline to|have to decline to|am not comfortable)"
)
_VERB = (
    r"(?:help|assist|provide|comply|fulfil|fulfill|answer|do (?:that|this|so)|discuss|create|generate|engage|respond|continue"
    r"|support|participate|determine|identify|find|see|tell|discern|detect|infer|explain|describe|give|offer|summari[sz]e"
    r"|interpret|conclude|make out|access|view|analy[sz]e|process|recogni[sz]e|have (?:enough|sufficient|any|access)|know)"
)
_REFUSALS = (
    rf"(?:i'm |i am |we're |we are )?(?:so |very |really |terribly )?sorry(?:{_ENDS}|,? (?:but|for the|that i|i)\b)",
    rf"(?:my |our |please accept my )?apologies(?:{_ENDS}|,? (?:but|i)\b)",
    rf"i (?:do |must |would like to )?apologi[sz]e(?:{_ENDS}|,? (?:but|for (?:the|any)|that i)\b)",
    rf"unfortunately,? (?:i|we|there|the|this|it)\b.{{0,80}}(?:{_CANNOT}|\bno\b|\bnot\b)",
    r"i regret (?:that|to)\b",
    rf"(?:.{{0,40}}\b(?:but|so|and),? )?(?:i|we) ?{_CANNOT} {_VERB}\b",
    r"(?:i'm|i am) (?:just |only )?an? (?:ai|language model|large language model)\b",
    r"i(?:'m| am) not (?:sure|certain|able|comfortable|allowed|permitted)\b",
    r"i have no (?:idea|information|access|explanation)\b",
    r"i (?:must|have to) (?:respectfully )?decline",
    r"as an? (?:ai|artificial|large language|language) ?[^,.]{0,60}, ?(?:i|my|we|it)\b",
    r"as an? (?:ai|language model|ai language model|ai assistant),? i\b",
    rf"it(?:'s| is| was) (?:not possible|impossible|difficult|hard) (?:for me )?to {_VERB}\b",
    r"it(?:'s| is) (?:unclear|not clear) (?:what|which|whether|how|if)\b",
    # the same in other languages
    r"lo siento" + _ENDS,
    r"(?:yo )?no puedo (?!y\b)\w+",
    r"lamento (?:no|que|informar)",
    r"no es posible (?:determinar|identificar)",
    r"je suis (?:vraiment )?d\u00e9sol",
    r"d\u00e9sol\u00e9e?" + _ENDS,
    r"je (?:ne|n'|regrette)",
    r"(?:es )?tut mir (?:sehr )?leid" + _ENDS,
    r"entschuldigung" + _ENDS,
    r"ich kann .{0,60}\b(?:nicht|kein)",
    r"leider kann",
    r"(?:me )?desculpe" + _ENDS,
    r"sinto muito",
    r"(?:eu )?n\u00e3o (?:posso|consigo) \w+",
    r"mi dispiace",
    r"(?:io )?non posso \w+",
    r"het spijt me",
    r"ik kan .{0,60}\b(?:niet|geen)",
    r"przepraszam" + _ENDS,
    r"nie mog\u0119",
    r"\u00fczg\u00fcn\u00fcm",
    r"maalesef",
    r"\u0438\u0437\u0432\u0438\u043d\u0438\u0442\u0435",
    r"\u043f\u0440\u043e\u0441\u0442\u0438\u0442\u0435" + _ENDS,
    r"\u043a \u0441\u043e\u0436\u0430\u043b\u0435\u043d\u0438\u044e",
    r"\u044f \u043d\u0435 \u043c\u043e\u0433\u0443",
    r"\u5f88?\u62b1\u6b49",
    r"\u5bf9\u4e0d\u8d77",
    r"\u6211(?:\u65e0\u6cd5|\u4e0d\u80fd)",
    r"\u65e0\u6cd5(?:\u786e\u5b9a|\u63d0\u4f9b|\u56de\u7b54)",
    r"\u7533\u3057\u8a33",
    r"\u3059\u307f\u307e\u305b\u3093",
    r"\u3054\u3081\u3093\u306a\u3055\u3044",
    r"\uc8c4\uc1a1",
    r"\ubbf8\uc548",
    r"\u0639\u0630\u0631\u0627",
    r"\u0622\u0633\u0641",
)
_REFUSAL = re.compile("|".join(_REFUSALS), re.IGNORECASE)
_ERROR = re.compile(
    r"(?:(?:internal|server|http|api|request) )*error(?:\s*[:\u2014]|\s+\d{3}\b|$)"
    r"|(?:the )?(?:request|connection) (?:has )?timed out\W*$|rate limit (?:was |is )?(?:exceeded|reached)\W*$",
    re.IGNORECASE,
)
_STATUSES = {f"{status.value} {status.phrase}".lower() for status in HTTPStatus if status >= 400}
"""Lines such as "502 bad gateway"."""
_NOTHING = re.compile(
    r"\W*(?:n/a|n\.a|none|unknown|not applicable|not sure|unclear|uncertain|null|undefined|tbd|not available|thinking\.\.\."
    r"|no (?:idea|explanation|answer|response|comment|output)(?: (?:is |was )?(?:available|found|possible|given))?"
    r"|none of the above|nothing(?: found)?"
    r"|(?:there is )?(?:not enough|insufficient) (?:information|data|context|evidence|examples)(?: (?:to|for) [^,;:]*)?"
    r"|the (?:pattern|feature|meaning|explanation|concept) is (?:unclear|unknown|not clear)"
    r"|(?:(?:it|this|that|the (?:pattern|feature)) )?(?:cannot|can't|could not) be (?:determined|identified|explained)"
    r"|(?:unable to|not able to|cannot|can't|could not) (?:determine|identify|discern|tell|infer|explain|say)"
    r"(?: (?:an?|any|the|this|it|what|which)\b[^,;:]*)?)\W*",
    re.IGNORECASE,
)
_NO_PATTERN = re.compile(
    r"\W*(?:it (?:seems|appears) (?:that )?)?"
    r"(?:(?:the|these) [\w ]{3,40}? (?:do not|don't|does not|doesn't) (?:share|have|show|follow|exhibit)(?: an?y?)?"
    r"|(?:the|these) [\w ]{3,40}? (?:have|has|shares?|shows?|follows?) no"
    r"|(?:there (?:is|are|appears to be|seems to be)|i see|i find)? ?no|there (?:isn't|aren't) an?y?)"
    r"(?: (?:clear|obvious|discernible|common|consistent|apparent|single|specific|coherent|meaningful|recogni[sz]able|particular"
    r"|evident|real|or|,))* ?(?:pattern|theme|concept|feature|meaning|connection|correlation|commonality|relation)s?"
    r"(?: (?:here|visible|found|detected|that i can see"
    r"|(?:can be |is |was )?(?:found|seen|identified|determined|discerned)"
    r"|(?:in|among|between|across|to) (?:the|these|this|any|all)\b[\w ]{0,60})){0,2}\W*",
    re.IGNORECASE,
)


def no_explanation(line: str) -> bool:
    """Whether a line without quotes and emphasis around it stands where an explanation should, and is none."""
    whole = (_NOTHING, _NO_PATTERN)
    begins = bool(_REFUSAL.match(line) or _ERROR.match(line))
    return begins or line.lower().rstrip(".!") in _STATUSES or any(each.fullmatch(line) for each in whole)
