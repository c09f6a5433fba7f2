"""Settings from TOML tables, checked by pydantic, and their help from the docstrings under the fields.

1. A settings class is a frozen dataclass. The range of a value stands in its type (``Count``, ``Share``, ``Range``).
2. ``parse`` turns one table into one dataclass. A plain dataclass of another package will do.
3. ``Settings`` is the base of evalkit's own classes: what Python code builds is held to the same types.
4. Rules across fields live in ``check_together``, behind the checks of single values.
5. ``Mistakes`` gathers what is wrong in several tables, so that one reading reports all of it.
6. ``help_text`` prints each field with its type, default and the string literal that stands under it in the source.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, ParamSpec, TypeVar, Union

from annotated_types import Interval as Range

from evalkit.errors import SuiteError, UsageError
from evalkit.util.registry import near_miss

if TYPE_CHECKING:
    from pydantic import TypeAdapter

C = TypeVar("C")
P = ParamSpec("P")

Count = Annotated[int, Range(ge=1)]
NotNegative = Annotated[int, Range(ge=0)]
Above0 = Annotated[float, Range(gt=0)]
AtLeast0 = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]


class SettingsError(SuiteError, ValueError):
    """A value that a settings class does not take; a ValueError too, as Python code expects of a constructor."""


class Mistakes(SuiteError):
    """Everything that is wrong in one file: a mistake a line."""

    def __init__(self, each: list[UsageError]) -> None:
        self.each = list({str(error): error for error in each}.values())
        lines = [f"{error.where}: {error.what}; {error.fix}" for error in self.each]
        super().__init__("\n  ".join([f"{len(lines)} mistakes", *lines]), fix="correct each of them")


class Collector:
    """Reads parts of a file one by one and keeps their mistakes until ``report``."""

    def __init__(self) -> None:
        self.found: list[UsageError] = []

    def read(self, part: Callable[P, C], *args: P.args, **kwargs: P.kwargs) -> C:
        """``part(*args)``; where it is wrong the mistake is kept, and the value returned must not be used."""
        try:
            return part(*args, **kwargs)
        except UsageError as error:
            self.found += error.each if isinstance(error, Mistakes) else [error]
            return typing.cast(C, None)

    def report(self) -> None:
        """Raise what was found: a single mistake as it is.

        Raises:
            UsageError: something was wrong.
        """
        if self.found:
            whole = Mistakes(self.found)
            raise whole if len(whole.each) > 1 else whole.each[0]


class Settings:
    """Base of settings classes: their values are checked when they are built, and never changed.

    Raises:
        UsageError: of the class ``refusal``, for the first value that its type does not allow.
    """

    refusal: ClassVar[type[UsageError]] = SettingsError
    removed: ClassVar[Mapping[str, str]] = {}
    """Keys of an earlier version, each with what became of it."""

    def __post_init__(self) -> None:
        # defaults need no check, and a class that is all defaults needs no pydantic: reading results does without it
        given = {f.name: getattr(self, f.name) for f in _fields(type(self)) if getattr(self, f.name) is not f.default}
        problems = _checked(type(self), given, "") if given else {}
        if isinstance(problems, list):
            raise problems[0]
        self.check_together()

    def check_together(self) -> None:
        """Refuse values that do not go together, by a ValueError or an error of evalkit's."""


def parse(cls: type[C], table: Mapping[str, Any], where: str) -> C:
    """Build ``cls`` from a TOML table.

    Args:
        cls: a dataclass whose fields are bool, int, float, str, tuples, Literals, Optionals of these.
        table: keys and values as TOML gives them.
        where: what the table is called in messages ("[model]", "[[dictionary]] 'pca'").

    Raises:
        UsageError: unknown key, wrong type, missing key, or a ValueError of ``cls.__post_init__``; all of the table at once.
    """
    values = _checked(cls, table, where)
    if isinstance(values, list):
        raise Mistakes(values) if len(values) > 1 else values[0]
    try:
        return cls(**values)
    except ValueError as error:
        raise SuiteError(str(error), where=where, fix="correct the value") from error


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _adapter(cls: type) -> TypeAdapter[dict[str, Any]]:
    """The check of a table for ``cls``: of a TypedDict, which works for any dataclass and calls no ``__post_init__``."""
    # imported on first use, so that reading results does without them; before Python 3.12 pydantic takes no typing.TypedDict
    import typing_extensions
    from pydantic import ConfigDict, TypeAdapter

    hints = typing.get_type_hints(cls, include_extras=True)
    keys = {f.name: hints[f.name] if _required(f) else typing.NotRequired[hints[f.name]] for f in _fields(cls)}
    table_type: Any = typing_extensions.TypedDict
    shape = table_type(cls.__name__, keys)
    shape.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(shape)


def _tuples(value: Any) -> Any:
    """TOML's lists as the tuples that frozen settings hold; a strict check takes no list for a tuple."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _checked(cls: type, table: Mapping[str, Any], where: str) -> dict[str, Any] | list[UsageError]:
    """The values of ``table`` as ``cls`` holds them, or one error for each key that is wrong."""
    from pydantic import ValidationError

    try:
        return _adapter(cls).validate_python({key: _tuples(value) for key, value in table.items()})
    except ValidationError as error:
        details: dict[str, Any] = {}
        for detail in error.errors(include_url=False):
            # halves of characters, as file names may hold them, are no mistake
            key = str(detail["loc"][0])
            # of several ways to read a value, the one that got furthest says what is wrong
            if detail["type"] != "string_unicode" and (key not in details or len(detail["loc"]) > len(details[key]["loc"])):
                details[key] = detail
    return [_problem(cls, key, detail, table, where) for key, detail in details.items()] or dict(table)


def _problem(cls: type, key: str, detail: Mapping[str, Any], table: Mapping[str, Any], where: str) -> UsageError:
    """The error for one key, from pydantic's ``detail``: what is wrong, where, what to do."""
    refusal = cls.refusal if issubclass(cls, Settings) else SettingsError
    if detail["type"] == "extra_forbidden" and issubclass(cls, Settings) and key in cls.removed:
        return refusal(f"the key '{key}' was removed", where=where, fix=f"take it out: {cls.removed[key]}")
    if detail["type"] == "extra_forbidden":
        return refusal(f"unknown key '{key}'", where=where, fix=near_miss(key, [field.name for field in _fields(cls)]))
    if detail["type"] == "missing":
        return refusal(f"the key '{key}' is missing", where=where, fix=f"add {key} = ...: {field_docs(cls).get(key, '')}")
    hint, place = typing.get_type_hints(cls, include_extras=True)[key], f"{where} {key}".strip()
    bounds = _range(hint)
    if bounds is not None and detail["type"].startswith(("greater_than", "less_than")):
        value, allowed = detail["input"], _allowed(bounds)
        low = "cannot be negative" if bounds.ge == 0 else "is too small"
        two_sided = bounds.le is not None or bounds.lt is not None
        what = f"{key} = {value}, but {key} is {allowed}" if two_sided else f"{key} = {value} {low}"
        return refusal(what, where=place, fix=f"choose {'' if allowed.endswith('more') else 'a number '}{allowed}")
    element = _element(hint)
    if element is not None and isinstance(detail["loc"][-1], int):
        return refusal(f"{detail['input']!r} is not {_expected(element)}", where=place, fix=f"write {_expected(hint)}")
    fix = (
        near_miss(str(table[key]), map(str, typing.get_args(hint)))
        if typing.get_origin(hint) is Literal
        else f"write {_expected(hint)}"
    )
    return refusal(f"{table[key]!r} is not {_expected(hint)}", where=place, fix=fix)


def _range(hint: Any) -> Range | None:
    """The range within a type, of an Optional or a tuple too."""
    found = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Range)]
    return next((mark for mark in (*found, *map(_range, typing.get_args(hint))) if mark is not None), None)


def _allowed(bounds: Range) -> str:
    if bounds.ge is not None and bounds.le is not None:
        return f"from {bounds.ge} to {bounds.le}"
    if bounds.gt is not None and bounds.lt is not None:
        return f"between {bounds.gt} and {bounds.lt}"
    ends = (("{} or more", bounds.ge), ("above {}", bounds.gt), ("at most {}", bounds.le), ("below {}", bounds.lt))
    return ", ".join(words.format(end) for words, end in ends if end is not None)


def _element(hint: Any) -> Any:
    """The type of the elements of what can be a list alone; None for everything else."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _element(parts[0]) if len(parts) == 1 else None
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _expected(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _expected(hint.__origin__)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(part) for part in typing.get_args(hint) if part is not type(None))
    if origin is tuple:
        return f"a list of {_expected(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of ``cls`` and of its bases, whitespace folded."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def help_text(cls: type, title: str, leave_out: tuple[str, ...] = ()) -> str:
    """Reference of one section: its first docstring line, then each key with type, default and meaning."""
    docs, hints = field_docs(cls), typing.get_type_hints(cls, include_extras=True)
    lines = [
        title,
        *textwrap.wrap((cls.__doc__ or "").split("\n\n")[0].strip(), 100, initial_indent="  ", subsequent_indent="  "),
    ]
    for field in _fields(cls):
        if field.name in leave_out:
            continue
        bounds = _range(hints[field.name])
        facts = [_expected(hints[field.name]), *([_allowed(bounds)] if bounds else [])]
        given = field.default not in (dataclasses.MISSING, None, ())
        facts.append("required" if _required(field) else f"default {field.default!r}" if given else "optional")
        lines.append(f"  {field.name}  ({', '.join(facts)})")
        lines += textwrap.wrap(docs.get(field.name, ""), 96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
