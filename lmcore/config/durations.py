"""Lengths and intervals of training: ``500``, ``"1e9 tokens"``, ``"2 epochs"``, ``"10%"``, ``"30 min"``, ``"never"``.

The arithmetic is exact (fractions, no floats), so that ``10%`` of 1,000 steps is 100 and not 101. Minutes are never
converted to steps: a schedule must be a pure function of the step.

>>> Duration.parse("1e9 tokens")
Duration(value=1000000000, unit='tokens')
>>> percent = lambda step: {"percent": (Fraction(10 * step - 10), Fraction(10 * step))}  # of a run of 10 steps
>>> [step for step in range(1, 11) if is_reached(Durations.parse("25%"), percent(step))]
[3, 5, 8, 10]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean

_UNITS = {
    "step": "steps", "steps": "steps",
    "token": "tokens", "tokens": "tokens",
    "epoch": "epochs", "epochs": "epochs",
    "%": "percent", "percent": "percent",
    "min": "minutes", "minute": "minutes", "minutes": "minutes",
}  # fmt: skip
_SECOND = Fraction(1, 60)
_IN_MINUTES: dict[str, int | Fraction] = {
    "h": 60, "hour": 60, "hours": 60,
    "s": _SECOND, "sec": _SECOND, "second": _SECOND, "seconds": _SECOND,
}  # fmt: skip
SUFFIXES = {"": 1, "K": 10**3, "k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
"""Factors for the letter after a number, as in ``1.5B tokens``."""
_PATTERN = re.compile(
    r"([0-9][0-9_]{0,30}(?:\.[0-9]{0,30})?(?:[eE][+-]?[0-9]{1,2})?)\s*([KkMBGT]?)(?:\s*([a-z]+|%))?"
)
LARGEST = 10**18
"""Largest number of steps, tokens, epochs, percent or minutes in a duration."""
EXAMPLES = "500, '500 steps', '1e9 tokens', '2 epochs', '10%', '30 min' or 'never'"
LENGTHS = "500, '500 steps', '1e9 tokens' or '2 epochs' (train.max_minutes limits the time)"
""":data:`EXAMPLES` for the length of a run."""


class Duration(NamedTuple):
    """A length of training. ``unit`` is never, steps, tokens, epochs, percent (of the run) or minutes."""

    value: float
    unit: str = "steps"

    @classmethod
    def parse(cls, text: Any) -> Duration:
        """Parse a number or text; a bare number means steps. Raises :class:`RequestError`."""
        if isinstance(text, Duration):
            return text
        word = text.strip().lower() if isinstance(text, str) else ""
        if text is None or text is False or word in ("never", "off", "none", "null"):
            return NEVER
        plain = isinstance(text, (str, int, float)) and not isinstance(text, bool)
        if isinstance(text, int) and abs(text) > LARGEST:
            plain = False  # str() refuses integers of more than 4,300 digits
        match = _PATTERN.fullmatch(str(text).strip()) if plain else None
        if match is None:
            raise RequestError(f"{_shown(text)} is not a duration: write {EXAMPLES}")
        number, suffix, unit = match.groups()
        value = Fraction(number.replace("_", "")) * SUFFIXES[suffix]
        value *= _IN_MINUTES.get(unit, 1)
        unit = unit_of(unit or "steps", text)
        if value <= 0:
            raise RequestError(
                f"{_shown(text)}: a duration must be above zero; write 'never' to switch it off"
            )
        if value > LARGEST:
            raise RequestError(f"{_shown(text)}: a duration must be at most {LARGEST:.0e} {unit}")
        if unit in ("steps", "tokens") and value.denominator != 1:
            raise RequestError(f"{_shown(text)}: must be a whole number of {unit}")
        whole = value.denominator == 1 and abs(value) < 2**53
        return cls(int(value) if whole else float(value), unit)

    def __str__(self) -> str:
        if self.unit == "never":
            return "never"
        number = f"{int(self.value)}" if self.value == int(self.value) else repr(self.value)
        if self.unit == "percent":
            return f"{number}%"
        if self.unit == "minutes":
            seconds = round(self.value * 60)
            in_seconds = len(number) > 6 and seconds > 0 and Duration.parse(f"{seconds} s") == self
            return f"{seconds} s" if in_seconds else f"{number} min"
        return f"{number} {self.unit}"

    def exact(self) -> Fraction:
        """The value as the exact decimal number that was written: 0.1 is one tenth, not the nearest double."""
        return Fraction(repr(self.value))


NEVER = Duration(0, "never")


def is_unit(word: str) -> bool:
    """Whether ``word`` is a unit alone, such as ``epochs`` or ``min``."""
    return word in _UNITS or word in _IN_MINUTES


def unit_of(word: str, text: Any) -> str:
    """The unit that ``word`` of ``text`` means, such as ``minutes`` for ``h``. Raises :class:`RequestError`."""
    if word in _IN_MINUTES:
        return "minutes"
    if word not in _UNITS:
        raise RequestError(
            f"{_shown(text)}: unknown unit {word!r}{did_you_mean(word, _UNITS)}; write {EXAMPLES}"
        )
    return _UNITS[word]


class Durations(tuple[Duration, ...]):
    """The value of an ``every`` option: one duration or several; ``never`` is the empty tuple."""

    @classmethod
    def parse(cls, value: Any) -> Durations:
        """Parse a number, a string (several are separated by commas), or a list of them."""
        if isinstance(value, Durations):
            return value
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            value = value[1:-1]
        elif isinstance(value, str) and (thousands := re.search(r"\b[0-9]{1,3}(,[0-9]{3})+(?![0-9])", value)):
            # Otherwise "1,500" would include an interval of one step.
            number = thousands[0]
            raise RequestError(
                f"{_shown(value)}: write {number.replace(',', '')} for one number, or [{number}] for several"
            )
        if isinstance(value, str):
            value = [part.strip(" '\"") for part in value.split(",")]
        if isinstance(value, Duration) or not isinstance(value, (list, tuple)):
            value = [value]
        parsed = dict.fromkeys(Duration.parse(item) for item in value)
        return cls(duration for duration in parsed if duration != NEVER)

    def __str__(self) -> str:
        return ", ".join(str(duration) for duration in self) or "never"

    def plain(self) -> str | list[str]:
        """The form for YAML: a string, or a list if there are several."""
        return [str(duration) for duration in self] if len(self) > 1 else str(self)


Spans = Mapping[str, tuple[int | Fraction, int | Fraction]]
"""Unit -> the progress in this unit before and after a step. A missing unit is not known."""


def is_reached(every: Iterable[Duration], spans: Spans) -> bool:
    """Whether a step reaches a multiple of one of the intervals. Intervals in minutes are ignored.

    An interval that is not a whole number of steps is due at the first step that reaches each multiple, so that no multiple
    is lost or counted twice.

    Raises:
        RequestError: an interval has a unit that is not in ``spans``.
    """
    for duration in every:
        if duration.unit in ("never", "minutes"):
            continue
        if duration.unit not in spans:
            raise RequestError(f"every {duration} cannot be converted to steps here: give it in steps")
        before, after = spans[duration.unit]
        interval = duration.exact()
        if after // interval > before // interval:
            return True
    return False


def _shown(text: Any) -> str:
    shown = (
        " ".join(repr(text).split()) if not isinstance(text, int) or abs(text) < 10**30 else "this integer"
    )
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
