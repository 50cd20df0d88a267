"""Finds documents of a validation set that also occur in the training text, from the token stores of both.

Two documents are equal if their tokens are. The training tokens are read once, in stretches. For each document a
number is computed from its length and three of its tokens, and its tokens are hashed only if a validation document has
the same number. Memory grows with the validation set and the longest document, not with the training text. The
result for large stores is saved in the user's cache (:func:`lmcore.storage.cache_dir`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lmcore.data.store.store import TokenStore
from lmcore.storage import cache_dir, read_cached, write_cached

REMEMBERED_FROM_TOKENS = 10**8
_STRETCH_TOKENS = 2**22
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64
)


@dataclass(frozen=True)
class Overlap:
    """Validation documents that also occur in the training text.

    Attributes:
        documents, of_documents: number of such documents, and of all validation documents.
        tokens, of_tokens: the same in tokens.
        source: name of the training source that contains the first of them.
        start, stop: range of tokens of the first one in the validation store.
    """

    documents: int
    of_documents: int
    tokens: int
    of_tokens: int
    source: str
    start: int
    stop: int


def find_overlap(held_out: TokenStore, training: Sequence[TokenStore]) -> Overlap | None:
    """The documents of ``held_out`` that are also in ``training``; ``None`` if there is none.

    Both must have been made with the same tokenizer and the same ``eos``.
    """
    memory = None
    if sum(store.n_tokens for store in training) >= REMEMBERED_FROM_TOKENS:
        memory = _memory_file(held_out, training)
        known = read_cached(memory) if memory else None
        if known == {}:
            return None
        with contextlib.suppress(TypeError):  # written by another version
            if known:
                return Overlap(**known)
    found = _compare(held_out, training)
    if memory is not None:
        write_cached(memory, asdict(found) if found else {})
    return found


def _compare(held_out: TokenStore, training: Sequence[TokenStore]) -> Overlap | None:
    # Hash -> the places of the documents with this hash in the validation store
    wanted: dict[bytes, list[tuple[int, int]]] = {}
    numbers: list[np.ndarray] = []
    count = 0
    for first, tokens, ends in _stretches(held_out):
        starts = np.concatenate([[0], ends[:-1]])
        numbers.append(_numbers(tokens, starts, ends))
        count += len(ends)
        for start, stop in zip(starts.tolist(), ends.tolist()):
            wanted.setdefault(_digest(tokens[start:stop]), []).append((first + start, first + stop))
    rare = np.unique(np.concatenate(numbers)) if numbers else np.zeros(0, np.uint64)
    seen: dict[bytes, str] = {}
    for store in training:
        for _, tokens, ends in _stretches(store):
            starts = np.concatenate([[0], ends[:-1]])
            here = _numbers(tokens, starts, ends)
            at = np.searchsorted(rare, here).clip(max=max(len(rare) - 1, 0))
            for index in np.flatnonzero(rare[at] == here) if len(rare) else ():
                digest = _digest(tokens[starts[index] : ends[index]])
                if digest in wanted:
                    seen.setdefault(digest, store.name)
        if len(seen) == len(wanted):
            break
    if not seen:
        return None
    places = sorted((place, seen[digest]) for digest in seen for place in wanted[digest])
    (start, stop), source = places[0]
    return Overlap(
        documents=len(places),
        of_documents=count,
        tokens=sum(stop - start for (start, stop), _ in places),
        of_tokens=held_out.n_tokens,
        source=source,
        start=start,
        stop=stop,
    )


def _stretches(store: TokenStore) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(position of the first token, tokens of whole documents, their ends relative to it), in order."""
    start, length = 0, _STRETCH_TOKENS
    while start < store.n_tokens:
        stop = min(start + length, store.n_tokens)
        ends = store.document_ends(start, stop)
        if not len(ends):  # a document is longer than this
            length *= 2
            continue
        length = _STRETCH_TOKENS
        last = int(ends[-1])
        yield start, store.read(start, last - start), ends - start
        start = last


def _numbers(tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(D,) uint64, equal for equal documents: from length and first, middle and last-but-one token (the last is EOS)."""
    lengths = ends - starts
    parts = [lengths, tokens[starts], tokens[starts + lengths // 2], tokens[np.maximum(ends - 2, starts)]]
    total = np.zeros(len(ends), np.uint64)
    for part, factor in zip(parts, _FACTORS):
        total = (total ^ part.astype(np.uint64)) * factor
    return total


def _digest(tokens: np.ndarray) -> bytes:
    # As 32-bit integers, because a source with another dtype may contain the same document.
    return hashlib.blake2b(tokens.astype("<u4").data, digest_size=16).digest()


def _memory_file(held_out: TokenStore, training: Sequence[TokenStore]) -> Path | None:
    fingerprints = [held_out.fingerprint, *(store.fingerprint for store in training)]
    name = hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()[:32]
    try:
        return cache_dir() / "overlaps" / f"{name}.json"
    except RuntimeError:  # a user without a home
        return None
