"""Frozen dataclasses from TOML tables, and their help from the docstrings under the fields.

1. ``parse`` turns one table into one dataclass. Every key is checked: an unknown one names the near miss, a wrong type
   names what was expected, a missing one is named. Rules across fields live in the dataclass's ``__post_init__``.
2. ``help_text`` prints each field with its type, default and the string literal that stands under it in the source, so
   that the reference of the suite file is the code itself.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from evalkit.errors import SuiteError
from evalkit.registry import near_miss

C = TypeVar("C")


def parse(cls: type[C], table: Mapping[str, Any], where: str) -> C:
    """Build ``cls`` from a TOML table.

    Args:
        cls: a dataclass whose fields are bool, int, float, str, tuples, Literals, Optionals of these.
        table: keys and values as TOML gives them.
        where: what the table is called in messages ("[model]", "[[dictionary]] 'pca'").

    Raises:
        SuiteError: unknown key, wrong type, missing key, or a ValueError of ``cls.__post_init__``.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise SuiteError(f"unknown key '{key}'", where=where, fix=near_miss(key, fields))
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(table[name], hints[name], f"{where} {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SuiteError(
                f"the key '{name}' is missing", where=where, fix=f"add {name} = ...: {field_docs(cls).get(name, '')}"
            )
    try:
        built = cls(**values)
    except ValueError as error:
        raise SuiteError(str(error), where=where, fix="correct the value") from error
    return built


def _expected(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(part) for part in typing.get_args(hint) if part is not type(None))
    if origin is tuple:
        return f"a list of {_expected(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        for part in args:
            if part is type(None):
                continue
            try:
                return _convert(value, part, where)
            except SuiteError:
                continue
    elif origin is Literal:
        if value in args:
            return value
        raise SuiteError(f"{value!r} is not {_expected(hint)}", where=where, fix=near_miss(str(value), [str(a) for a in args]))
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(item, args[0], where) for item in value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is Any or (isinstance(hint, type) and isinstance(value, hint)):
        return value
    raise SuiteError(f"{value!r} is not {_expected(hint)}", where=where, fix=f"write {_expected(hint)}")


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
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    lines = [
        title,
        *textwrap.wrap((cls.__doc__ or "").split("\n\n")[0].strip(), 100, initial_indent="  ", subsequent_indent="  "),
    ]
    for field in dataclasses.fields(cls):
        if not field.init or field.name in leave_out:
            continue
        if field.default is not dataclasses.MISSING:
            default = f", default {field.default!r}" if field.default not in (None, ()) else ", optional"
        elif field.default_factory is not dataclasses.MISSING:
            default = ", optional"
        else:
            default = ", required"
        lines.append(f"  {field.name}  ({_expected(hints[field.name])}{default})")
        lines += textwrap.wrap(docs.get(field.name, ""), 96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
