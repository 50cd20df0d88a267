"""Text for people: sizes, counts, durations, a table of two columns, and suggestions for mistyped words.

Every message, log line, plan and report uses these functions, so that a number has the same format everywhere.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters: C0 (escape sequences start with one), DEL, C1, line separators and changes of text direction; and
lone surrogates (from file names that are not UTF-8), which UTF-8 cannot encode."""


def one_line(text: str) -> str:
    r"""``text`` as one line without control characters: a line break becomes ``\n``, an escape ``\x1b``.

    >>> one_line("a\nb\x1b[2J")
    'a\\nb\\x1b[2J'
    """
    text = text.replace("\r\n", "\n").replace("\n", "\\n").replace("\t", "    ")
    return CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def short_repr(value: object) -> str:
    """``value`` in an error message: its ``repr`` on one line, cut to at most 60 characters."""
    # repr escapes line breaks and control characters, and leaves other scripts readable.
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def message_of(error: BaseException) -> str:
    r"""The message of an error on one line.

    >>> message_of(ValueError("no such\n    layer"))
    'no such layer'
    """
    return " ".join(str(error).split())


def printable(text: str) -> str:
    """``text`` with control characters replaced by U+FFFD, so that it cannot control the terminal. Line breaks are kept."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def size(number: float) -> str:
    """Bytes with a binary unit.

    >>> size(3_650_722_201)
    '3.4 GiB'
    """
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        # A number that would round to four digits in the next smaller unit uses this unit; bytes are not rounded.
        if abs(number) >= (scale if unit == "KiB" else 999.5 * scale / 2**10):
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


def short(number: float) -> str:
    """A count of tokens, parameters or floating point operations, with three digits from 10,000 on.

    >>> short(9_999), short(124_439_808)
    ('9,999', '124M')
    """
    for scale, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= (1e4 if letter == "k" else 999.5 * scale / 1e3):
            return f"{number / scale:.3g}{letter}"
    return f"{number:,.0f}"


def amount(number: float, noun: str) -> str:
    """A number with its noun, in the singular or plural.

    >>> amount(1, "step"), amount(1_200, "step"), amount(2, "process")
    ('1 step', '1,200 steps', '2 processes')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, with days in front where there are any.

    >>> duration(178), duration(93_784)
    ('0:02:58', '1d 2:03:04')
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def did_you_mean(word: str, choices: Iterable[object], *, at_most: int = 1, cutoff: float = 0.5) -> str:
    """The end of an error message about an unknown ``word``: the most similar choices, or an empty string.

    >>> did_you_mean("AdamV", ["adamw", "sgd"])
    "; did you mean 'adamw'?"
    >>> did_you_mean("xyz", ["adamw", "sgd"])
    ''
    """
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    found = difflib.get_close_matches(str(word).lower(), by_lower, n=at_most, cutoff=cutoff)
    near = " or ".join(repr(by_lower[match]) for match in found)
    return f"; did you mean {near}?" if near else ""


def runs_near(path: str | os.PathLike[str]) -> str:
    """The end of an error message about a ``path`` that is not a run: the runs inside that folder, else the run with the
    most similar name, or an empty string."""
    given = Path(path)
    with contextlib.suppress(OSError, ValueError):
        if not given.is_dir():
            return did_you_mean(str(given), [file.parent for file in given.parent.glob("*/status.json")])
        found = sorted(str(file.parent) for file in given.glob("*/status.json"))
        if found:
            more = f" and {len(found) - 5:,} more" if len(found) > 5 else ""
            return f"; its runs are {', '.join(found[:5])}{more}"
    return ""


def multiples_near(number: int, unit: int) -> str:
    """The multiples of ``unit`` just below and above a number that is not one, for an error message; never 0.

    >>> multiples_near(1000, 256), multiples_near(100, 256)
    ('768 or 1024', '256')
    """
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def columns(text: str) -> int:
    r"""How many columns of a terminal ``text`` takes: two for each wide character (Chinese, Japanese, Korean), none for a
    mark on the character before it, as macOS keeps accents and voicing marks in the names of files.

    >>> columns("caf\N{LATIN SMALL LETTER E WITH ACUTE}"), columns("cafe\N{COMBINING ACUTE ACCENT}")
    (4, 4)
    """
    marks = ("Mn", "Me", "Cf")
    return sum(
        1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
        if unicodedata.category(character) not in marks
    )


def table(rows: Iterable[tuple[str, str]]) -> str:
    """One plain line for each (label, value), with the labels in one column."""
    rows = list(rows)
    width = max((columns(label) for label, _ in rows), default=0)
    return "\n".join(f"{label}{' ' * (width - columns(label))}  {value}" for label, value in rows)
