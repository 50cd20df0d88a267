"""A cache of folder listings and file stats, used during the start of a run.

Defaults, checks, tokenizer and token stores all need the files of a corpus and their sizes. Between
:func:`remember` and :func:`forget` each folder is walked once and each file is looked up once; at other times nothing is
cached.
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
    """Start caching: each folder and file is looked up once."""
    global _answers, _stats
    _answers, _stats = {}, {}


def forget() -> None:
    """Stop caching, and free the cache."""
    global _answers, _stats
    _answers, _stats = None, None


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Context manager that calls :func:`remember`, if not done already, and :func:`forget` at the end."""
    if _answers is None:
        remember()
    try:
        yield
    finally:
        forget()


def stat(path: str) -> os.stat_result | None:
    """``os.stat`` of a file, following links; ``None`` if there is no such file."""
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
    """The result of ``work()``, cached by ``key`` (and the current folder); exceptions are not cached."""
    if _answers is None:
        return work()
    key = (os.getcwd(), key)
    if key not in _answers:
        _answers[key] = work()
    answer: Answer = _answers[key]
    return answer
