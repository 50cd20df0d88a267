"""Numbers for people, a part of the room ``plan``: bytes, counts, times, and a table of them."""

from __future__ import annotations

from collections.abc import Iterable


def size(number: float) -> str:
    """Bytes for a person: ``3.4 GiB``."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


def short(number: float) -> str:
    """Counts for a person: ``124.4 M``."""
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:.4g}"


def duration(seconds: float) -> str:
    """``2 d 3 h``, ``5 min``, ``12 s``: the two largest units."""
    parts: list[str] = []
    rest = round(seconds)
    for unit, scale in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if rest >= scale or (unit == "s" and not parts):
            parts.append(f"{rest // scale} {unit}")
            rest %= scale
        elif parts:
            break
    return " ".join(parts[:2])


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Plain lines, labels in one column."""
    rows = list(rows)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
