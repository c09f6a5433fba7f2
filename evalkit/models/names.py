"""Whether two names mean one language model: the one a dictionary was made for, and the one a run reads.

1. Names are compared by their last part, without regard to case, underscores and known aliases: "gpt2-small" is "gpt2", and
   "EleutherAI/pythia-70m-deduped" is "pythia-70m-deduped". A folder is a match where any part of its path is the name.
2. Dictionaries of evalkit hold an identity in place of a name (``models.loading``). Of a hub model it has the name; of a folder
   or a GGUF file it has a checksum, which is compared with that of a model of the same kind. Random weights are the control of
   their own model.
"""

from __future__ import annotations

import re

ALIASES = {"gpt2-small": "gpt2", "gpt-2": "gpt2", "gpt-2-small": "gpt2", "distillgpt2": "distilgpt2"}
"""Names that libraries have for the same weights, in lower case with hyphens."""
_IDENTITY = re.compile(r"(hub|folder|gguf):(.+?)(?:@[^:@]*)?:(?:float32|bfloat16|float16)(?::random-\d+)?")


def canonical(name: str) -> str:
    """The part of a model's name that is compared."""
    last = name.strip().rstrip("/").rsplit("/", 1)[-1].lower().replace("_", "-").removesuffix(".gguf").removeprefix("meta-")
    return ALIASES.get(last, last)


def other_model(dictionary: str, made_for: str, name: str, identity: str) -> str:
    """A note that a dictionary was made for another model than the run's, in one line; '' where nothing says so.

    Args:
        dictionary: what the dictionary is called.
        made_for: name or identity of its model; '' where its file names none.
        name: the run's model as the suite names it: hub name, packaged model or path.
        identity: identity of the run's model.
    """
    if not made_for or not name:
        return ""
    theirs, own = _IDENTITY.fullmatch(made_for), _IDENTITY.fullmatch(identity)
    if theirs is not None and theirs[1] != "hub":
        if own is None or own[1] != theirs[1] or own[2] == theirs[2]:
            return ""
        other = "another one, by the checksum of its weights"
    else:
        other = theirs[2] if theirs is not None else made_for
        parts = [part for piece in re.split(r"[/\\]", name) for part in piece.split("--")]
        if canonical(other) in {canonical(part) for part in parts if part}:
            return ""
    return f"{dictionary} was made for the model {other}; this run reads {name} ([model])."
