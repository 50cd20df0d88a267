"""Converts a value from YAML or the command line to the type of its option, or refuses it with the reason.

>>> convert("5e5", int, typed=True)
500000
>>> convert("null", float | None, typed=True) is None
True
>>> convert(float("inf"), float, typed=False)
Traceback (most recent call last):
...
ValueError: must be a finite number (got inf)
"""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal

from lmcore.config import yaml
from lmcore.config.curves import Curve, is_curve
from lmcore.config.durations import Duration, Durations
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, short_repr

LARGEST_INTEGER = 2**63 - 1


def convert(value: Any, kind: Any, *, typed: bool) -> Any:
    """Convert ``value`` to ``kind``, a type of the schema.

    Args:
        typed: whether it comes from the command line, where every value is text and ``null`` means ``None``.

    Raises:
        ValueError: with the reason, but without the option's name, which the caller adds.
    """
    if kind in (Duration, Durations):
        try:
            return kind.parse(value)
        except RequestError as error:
            raise ValueError(str(error)) from error
    origin = typing.get_origin(kind)
    if origin is list:
        return _list(value, typing.get_args(kind)[0], typed)
    if origin is tuple:
        return _tuple(value, typing.get_args(kind), typed)
    alternatives = typing.get_args(kind) if origin in (typing.Union, types.UnionType) else (kind,)
    if typed and isinstance(value, str) and value in ("null", "None") and type(None) in alternatives:
        return None
    for alternative in alternatives:
        matched, result = _match(value, alternative, strict=str in alternatives)
        if matched:
            return result
    raise ValueError(f"must be {describe(kind)} (got {shown(value)}){_hint(value, alternatives)}")


def _list(value: Any, item: Any, typed: bool) -> list[Any]:
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if typed and len(values) == 1 and values[0] in ("null", "None"):
        return []
    return [convert(one, item, typed=typed) for one in values]


def _tuple(value: Any, items: tuple[Any, ...], typed: bool) -> tuple[Any, ...]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if typed:
        values = [part for one in values for part in str(one).strip("[]()").split(",") if part.strip()]
    if len(values) != len(items):
        raise ValueError(f"must be {len(items)} numbers (got {len(values)}: {shown(value)})")
    return tuple(convert(one, kind, typed=typed) for one, kind in zip(values, items))


def _match(value: Any, kind: Any, *, strict: bool) -> tuple[bool, Any]:
    """Whether ``value`` is of the given plain type, and the converted value. ``strict``: text stays text."""
    if kind is type(None):
        return value is None, None
    if kind is Curve:
        return _curve(value)
    if typing.get_origin(kind) is Literal:
        by_lower = {str(choice).lower(): choice for choice in typing.get_args(kind)}
        return str(value).lower() in by_lower and isinstance(value, str), by_lower.get(str(value).lower())
    if kind is str:
        return _text(value)
    if typing.get_origin(kind) is dict or kind is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value), value
    if isinstance(value, str) and not strict:
        value = _number(value)
    if kind is bool:
        return isinstance(value, bool), value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False, None
    if kind is float:
        if abs(value) > 1e300 or not math.isfinite(value):
            raise ValueError(f"must be a finite number (got {shown(value)})")
        return True, float(value)
    if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
        return False, None
    if abs(int(value)) > LARGEST_INTEGER:
        raise ValueError(f"must fit in 64 bits (got {shown(value)})")
    return True, int(value)


def _curve(value: Any) -> tuple[bool, Any]:
    if not is_curve(value):
        return False, None
    try:
        return True, Curve.parse(value)
    except RequestError as error:
        raise ValueError(str(error)) from error


def _text(value: Any) -> tuple[bool, str]:
    if isinstance(value, float):
        # YAML reads 1.10 as 1.1 and 1e5 as 100000.0; what was written is not known any more.
        raise ValueError(f"must be text (got the number {shown(value)}): write it in quotes")
    if isinstance(value, int) and not isinstance(value, bool):
        return True, str(value)  # a run that is named 2026, a skipped position
    if isinstance(value, str) and "\0" in value:
        raise ValueError("must not contain a zero byte")
    return isinstance(value, str), value


def _number(text: str) -> Any:
    """The number or boolean that ``text`` represents, otherwise ``text``."""
    try:
        value = yaml.load(text, "") if len(text) < 400 else text
    except RequestError:
        return text
    return value if isinstance(value, (int, float)) else text


def _hint(value: Any, alternatives: tuple[Any, ...]) -> str:
    choices = [
        choice
        for kind in alternatives
        if typing.get_origin(kind) is Literal
        for choice in typing.get_args(kind)
    ]
    # Not for numbers: the choice with the most similar spelling to 3M is 350M.
    return did_you_mean(value, choices) if isinstance(value, str) and not value[:1].isdigit() else ""


def shown(value: Any) -> str:
    """``value`` in an error message: one line, at most 60 characters, ``null`` for ``None``."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        # str() refuses more than 4,300 digits.
        return f"an integer of {len(hex(value)) - 2} hexadecimal digits"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return short_repr(value)


def describe(kind: Any) -> str:
    """A type in words, for an error message: ``an integer or null``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = typing.get_args(kind)
        return " or ".join(describe(part) for part in parts)
    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    names = {
        str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null",
        dict: "a dictionary", Curve: "a curve such as '0: 8, 10%: 32'",
    }  # fmt: skip
    return names[typing.get_origin(kind) or kind]


def type_name(kind: Any) -> str:
    """A type in the brackets of ``--help``: ``int | auto``, ``full | blocks | none``, ``list``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return ", ".join(type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " | ".join(str(value) for value in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    return {Durations: "durations", Duration: "duration", Curve: "curve", type(None): "null"}.get(
        origin, origin.__name__
    )
