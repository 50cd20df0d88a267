"""Data for tests: tokenizers that are plain arithmetic, and texts and stores whose tokens tell where they lie."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np

from lmcore.data import corpus
from lmcore.data.store.store import Piece, TokenStore


@final
class Bytes:
    """Ids 0 to 255 are UTF-8 bytes, 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    pad_id = None
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(one for one in ids if one < 256).decode("utf-8", "replace")


@final
class SlowBytes:
    """The same, but each call takes its time, so that there is something to kill."""

    vocab_size, eos_id, fingerprint = 257, 256, "bytes"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        time.sleep(self.seconds)
        return Bytes().encode_batch(texts)


@final
class Tagged:
    """A document ``7 12`` becomes 12 tokens that tell document and place: 1000 * 7 + 0, 1, ..., and an end."""

    vocab_size, eos_id, fingerprint = 10**8, 10**8 - 1, "tagged"

    def __init__(self) -> None:
        self.tokens = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        out = []
        for one in texts:
            number, length = map(int, one.split())
            out.append(1000 * number + np.arange(length, dtype=np.int64))
            self.tokens += length + 1
        return out


def tagged_text(folder: Path, name: str = "a", n: int = 400, first: int = 0, files: int = 1) -> Path:
    """n documents of 1 to 40 tokens in text files, one to a line, padded so that files have several parts."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [f"{first + i} {(i * 7) % 40 + 1}" for i in range(number, n, files)]
        (folder / f"{name}{number}.txt").write_text("\n".join(line + " " * 500 for line in lines))
    return folder


def counting_store(
    folder: Path,
    n_tokens: int,
    *,
    first: int = 0,
    pieces: int = 1,
    name: str = "counting",
    documents: int = 0,
) -> TokenStore:
    """A store whose token i is the number ``first + i``, in several files; documents of equal length if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    cuts = np.linspace(0, n_tokens, pieces + 1).astype(int).tolist()
    made = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        path = folder / f"{name}-{number}.bin"
        np.arange(first + start, first + stop, dtype="<u4").tofile(path)
        ends = np.arange(documents, stop - start, documents or 1, dtype="<u4") if documents else None
        if ends is not None:
            ends.tofile(folder / f"{name}-{number}.ends")
        made.append(
            Piece(
                path=str(path),
                n_tokens=stop - start,
                ends=None if ends is None else str(folder / f"{name}-{number}.ends"),
                n_ends=0 if ends is None else len(ends),
            )
        )
    return TokenStore(name=name, fingerprint=f"{first}-{n_tokens}".ljust(16, "0"), dtype="<u4", pieces=made)


def open_bytes_corpus(
    folder: Path,
    *,
    train: Sequence[Any],
    valid: Sequence[Any] = (),
    test: Sequence[Any] = (),
    valid_fraction: float = 0.0,
    splits: corpus.Splits | None = None,
    reading: corpus.Reading,
) -> tuple[corpus.Corpus, list[str]]:
    """The corpus in bytes, with stores below ``folder``, and the notes of its opening."""
    notes: list[str] = []
    made = corpus.open_corpus(
        Bytes(),
        train=train,
        valid=valid,
        test=test,
        valid_fraction=valid_fraction,
        splits=splits or {},
        reading=reading,
        store_dir=str(folder / "stores"),
        eos=True,
        processes=1,
        worker=0,
        on_error="raise",
        max_bad_fraction=0.0,
        note=notes.append,
    )
    return made, notes
