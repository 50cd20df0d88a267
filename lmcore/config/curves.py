"""Values that change during a run: ``0.1``, ``linear 0.1 0``, ``cosine 0.95 0.85`` or ``0: 32, 10%: 128, 1e9 tokens: 512``.

The learning rate (as a multiple of ``optim.lr``), the global batch, the momentum and the weight decay use the same syntax.
A place is a position in the run in steps, tokens, epochs or percent of the run, counted by the blocks that were trained
on. It is never a time, so that a resumed run, or a run on another machine, uses the same values.

>>> str(Curve.parse("0: 32, 10%:128"))
'0: 32, 10%: 128'
>>> Curve.parse("linear 0.1 0").points
((Duration(value=0, unit='steps'), 0.1), (Duration(value=100, unit='percent'), 0.0))
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from lmcore.config.durations import SUFFIXES, Duration, unit_of
from lmcore.errors import RequestError

SHAPES = ("linear", "cosine")
"""Names of curves between two values over the whole run."""
START = Duration(0, "steps")
END = Duration(100, "percent")
EXAMPLES = "'0: 1, 20%: 1, 100%: 0' (place: value, ...) or 'linear 1 0'"
_VALUE = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,2})?)\s*([KkMBGT]?)")


@dataclass(frozen=True)
class Curve:
    """Values at places of the run.

    Attributes:
        points: (place, value), the first at the start of the run. Between two points the value is interpolated linearly (the
            global batch is constant until the next point); after the last it is constant.
        shape: for ``cosine``, the value between the two points follows half a cosine wave.
        name: ``linear`` or ``cosine`` as written by the user; empty for points.
    """

    points: tuple[tuple[Duration, float], ...]
    shape: str = "linear"
    name: str = ""

    @classmethod
    def parse(cls, text: Any) -> Curve:
        """Parse text, or a mapping of places to values from YAML. Raises :class:`RequestError`."""
        if isinstance(text, Curve):
            return text
        if isinstance(text, dict):
            pairs = [(str(place), str(value)) for place, value in text.items()]
        else:
            words = str(text).split()
            if words and words[0].lower() in SHAPES:
                if len(words) != 3:
                    raise RequestError(f"{text!r}: {words[0]} takes two values, such as '{words[0]} 1 0'")
                first, last = (_value(word, text) for word in words[1:])
                return cls(((START, first), (END, last)), shape=words[0].lower(), name=words[0].lower())
            if ":" not in str(text):
                raise RequestError(f"{str(text)[:60]!r} is not a curve: write {EXAMPLES}")
            items = [item for item in str(text).strip().strip("{}").split(",") if item.strip()]
            pairs = [(place, value) for place, _, value in (item.partition(":") for item in items)]
        points = tuple((_place(place, text), _value(value, text)) for place, value in pairs)
        if not points or points[0][0] != START:
            raise RequestError(f"{str(text)[:60]!r}: the first point must be at 0; write {EXAMPLES}")
        for (one, _), (other, _) in pairwise(points):
            if one.unit == other.unit and other.value <= one.value:
                raise RequestError(f"{str(text)[:60]!r}: {other} must come after {one}")
        return cls(points)

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(value for _, value in self.points)

    @property
    def first(self) -> float:
        """The value at the start of the run."""
        return self.points[0][1]

    def __str__(self) -> str:
        if self.name:
            return " ".join([self.name, *map(_shown, self.values)])
        return ", ".join(
            f"{'0' if place == START else place}: {_shown(value)}" for place, value in self.points
        )


def is_curve(value: Any) -> bool:
    """Whether the value of an option is written as a curve."""
    return isinstance(value, (dict, Curve)) or (isinstance(value, str) and (":" in value or " " in value))


def first_value(value: float | Curve) -> float:
    """The value at the start of the run."""
    return value.first if isinstance(value, Curve) else value


def values_of(value: float | Curve) -> tuple[float, ...]:
    """The value, or all values in a curve."""
    return value.values if isinstance(value, Curve) else (value,)


def _place(text: str, whole: Any) -> Duration:
    stripped = text.strip().strip("'\"")
    at_start = re.fullmatch(r"0+(\.0*)?\s*(%|[a-z]+)?", stripped)
    try:
        if at_start:
            unit_of(at_start[2] or "steps", stripped)
            return START
        place = Duration.parse(stripped)
    except RequestError as error:
        raise RequestError(f"{str(whole)[:60]!r}: {error}") from error
    if place.unit in ("never", "minutes") or (place.unit == "percent" and place.value > 100):
        raise RequestError(
            f"{str(whole)[:60]!r}: a place is in steps, tokens, epochs or 0-100% of the run (got {stripped}); a time "
            "would be another position on every machine"
        )
    return place


def _value(text: str, whole: Any) -> float:
    match = _VALUE.fullmatch(text.strip().strip("'\""))
    if match is None:
        raise RequestError(f"{str(whole)[:60]!r}: {text.strip()[:20]!r} is not a number; write {EXAMPLES}")
    exact = Fraction(match[1].replace("_", "")) * SUFFIXES[match[2]]
    if abs(exact) > 10**18:
        raise RequestError(f"{str(whole)[:60]!r}: {text.strip()[:20]} is larger than 1e18")
    return float(exact)


def _shown(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
