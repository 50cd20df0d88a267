"""What is on the disk, asked once in a start.

Defaults, checks, tokenizer and token stores all ask which files a corpus has, and how large they are. Between
:func:`remember` and :func:`forget` a folder is walked once and a file is looked at once; at other times each question
goes to the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from lmcore.data.text import remote

Answer = TypeVar("Answer")

_answers: dict[Hashable, Any] | None = None
_stats: dict[str, os.stat_result | None] | None = None


def remember() -> None:
    """From now on the disk is asked once for each folder and file."""
    global _answers, _stats
    _answers, _stats = {}, {}


def forget() -> None:
    """From now on the disk is asked each time, and the memory is free."""
    global _answers, _stats
    _answers, _stats = None, None


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """:func:`remember` unless that was done already, and :func:`forget` at the end."""
    if _answers is None:
        remember()
    try:
        yield
    finally:
        forget()


def stat(path: str) -> os.stat_result | None:
    """What ``os.stat`` says of a file, links followed; ``None`` where there is none."""
    if _stats is not None and path in _stats:
        return _stats[path]
    try:
        found = remote.stat(path) if remote.is_remote(path) else os.stat(path)
    except (OSError, ValueError):
        found = None
    if _stats is not None:
        _stats[path] = found
    return found


def once(key: Hashable, work: Callable[[], Answer]) -> Answer:
    """``work()``, done once for each key; what it raises is not remembered."""
    if _answers is None:
        return work()
    key = (os.getcwd(), key)
    if key not in _answers:
        _answers[key] = work()
    answer: Answer = _answers[key]
    return answer
