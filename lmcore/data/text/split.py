"""Which text of a source is for training and which for validation, when ``data.valid_fraction`` splits it.

==========================  ===============================================================================
``("all", 0)``              everything: the source is not split
``("train" | "valid", f)``  whole documents, by a hash of their content: a fraction ``f`` of them is validation
``("head" | "tail", f)``    every document is cut: the last fraction ``f`` of its characters is validation
==========================  ===============================================================================

:func:`choose` splits by whole documents if possible. Both kinds of splits depend only on the content of a document, so that
its copies in other files are treated alike. The two sides together are the whole text, each character once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Literal

Split = tuple[str, float]

LARGEST_SHARE = 0.1
"""Largest share of the characters of a small corpus that whole documents may take for validation."""
FEW_DOCUMENTS = 100
"""With more documents than this, the share of the characters that a hash selects is close to the share of the documents."""
MANY_CHARACTERS = 2**28
"""A corpus is not read further than this to choose its split."""
_ENDS = ("\n", "。", ". ", "、", " ")
"""A document is cut after the first of these that is found, in this order of preference."""


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def side(text: str, fraction: float) -> Literal["train", "valid"]:
    """The side of a document when ``fraction`` of the documents are held out for validation.

    Decided by a hash of its content alone, so that the same text is always on the same side.
    """
    return "valid" if _hash(text) < fraction * 2**64 else "train"


def cut_of(text: str, fraction: float) -> int:
    """Where the validation part of a document begins, if ``fraction`` of each document is held out.

    The document is cut at the start of a line, sentence or word at or before the exact place, so that the validation part
    is at most twice as long as ``fraction`` says; if there is none, it is cut at the exact place. With two characters or
    more, neither part of a document is empty.

    >>> cut_of("one. two. three. four. five.", 0.2)
    17
    """
    held = min(max(1, math.ceil(len(text) * fraction)), len(text) - 1)
    at = len(text) - held
    for mark in _ENDS:
        found = text.rfind(mark, max(0, at - held), at)
        if found >= 0:
            return found + len(mark)
    return at


def part_of(text: str, split: Split) -> str | None:
    """The part of a document that belongs to one side of a split; ``None`` if nothing does."""
    kind, fraction = split
    if kind == "all":
        return text
    if kind in ("train", "valid"):
        return text if side(text, fraction) == kind else None
    cut = cut_of(text, fraction)
    return (text[:cut] if kind == "head" else text[cut:]) or None


def choose(texts: Iterable[str], fraction: float) -> tuple[Split, Split]:
    """Choose the training and the validation side of the documents ``texts``, which are read only as far as needed.

    The first of these that is possible:

    1. By documents, ``fraction`` of them, if that leaves documents on both sides. If there are few documents
       (:data:`FEW_DOCUMENTS`), the validation side may have at most :data:`LARGEST_SHARE` of the characters, or twice
       ``fraction``; otherwise one long validation document could leave little text for training.
    2. By documents, only the one with the smallest hash, if it has at most :data:`LARGEST_SHARE` of the characters.
    3. The ends of all documents.
    """
    by_documents: tuple[Split, Split] = ("train", fraction), ("valid", fraction)
    characters = {"train": 0, "valid": 0}
    smallest: int | None = None
    held = 0
    for read, text in enumerate(texts, 1):
        number = _hash(text)
        characters["valid" if number < fraction * 2**64 else "train"] += len(text)
        if smallest is None or number < smallest:
            smallest, held = number, 0
        held += len(text) * (number == smallest)
        many = read > FEW_DOCUMENTS or sum(characters.values()) > MANY_CHARACTERS
        if many and all(characters.values()):
            return by_documents
    total = sum(characters.values())
    if smallest is None:  # no text, which is reported when the corpus is opened
        return by_documents
    if all(characters.values()) and characters["valid"] <= max(LARGEST_SHARE, 2 * fraction) * total:
        return by_documents
    if held <= LARGEST_SHARE * total:
        only_it = math.nextafter(smallest / 2**64, 1.0)
        return ("train", only_it), ("valid", only_it)
    return ("head", fraction), ("tail", fraction)
