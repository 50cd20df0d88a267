"""Texts -> a SentencePiece model: the recipe, and what the trainer would drop without a word.

Comes in: documents. Goes out: the bytes of the model, the record of how it came to be, and notes. What always
holds: the same texts and options give the same bytes; every line reaches the trainer, long ones in pieces.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import sentencepiece

from lmcore.data.text import documents, hub
from lmcore.errors import RequestError

_LINE_BYTES = 16_384
"""A longer line is cut into several; the trainer would drop it silently."""


def sample_texts(
    sources: Sequence[documents.Source],
    *,
    max_bytes: int = 256 * 2**20,
    seed: int = 0,
    bad: Callable[[documents.BadRecord], None],
) -> Iterator[str]:
    """Texts to train on: all of a small corpus in its order; of a larger one, 1 MiB parts in seeded random
    order until ``max_bytes`` are reached. (A compressed file is one part: of a single huge one this is its
    head, and so it is of a data set of the Hub.)"""
    total = 0
    work = [(source, part) for source in sources for part in hub.parts_of(source, part_bytes=2**20)]
    if sum(part.n_bytes for _, part in work) > max_bytes:
        random.Random(f"{seed} tokenizer").shuffle(work)
    for source, part in work:
        for document in hub.documents_of(source, part, bad=bad):
            total += len(document.text.encode())
            yield document.text
            if total >= max_bytes:
                return


@final
class TrainingLines:
    """Lines for the trainer: none longer than it takes, none with its reserved character, all counted."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.error: BaseException | None = None
        self.sample: list[str] = []
        self.documents = self.lines = self.bytes = self.cut = self.reserved = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                self.documents += 1
                for line in text.split("\n"):
                    if line:
                        yield from self._line(line)
        except BaseException as error:  # it would come out of C++ as a RuntimeError without its type
            self.error = error
            return

    def _line(self, line: str) -> Iterator[str]:
        length = len(line.encode())
        self.lines += 1
        self.bytes += length
        # A stride that doubles keeps about 250 to 500 lines from the whole corpus.
        if self.lines % (1 + self.lines // 250) == 0 and len(self.sample) < 2000:
            self.sample.append(line[:1000])
        if "▅" in line:
            self.reserved += 1
            line = line.replace("▅", " ")
        if length <= _LINE_BYTES:
            yield line
            return
        self.cut += 1
        step = _LINE_BYTES // 4  # no character has more than 4 bytes
        for start in range(0, len(line), step):
            yield line[start : start + step]

    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, "lines": self.lines, "bytes": self.bytes, "cut_lines": self.cut}

    def notes(self) -> list[str]:
        notes = [f"trained on {self.documents:,} documents, {self.lines:,} lines, {self.bytes:,} bytes"]
        if self.cut:
            notes.append(f"{self.cut:,} lines of more than {_LINE_BYTES:,} bytes were cut, none was left out")
        if self.reserved:
            notes.append(
                f"{self.reserved:,} lines hold ▅ (U+2585), which SentencePiece reserves: spelt in bytes"
            )
        return notes


def _training_error(message: str, lines: TrainingLines, vocab_size: int) -> str:
    if not lines.lines:
        return "there is no text to train a tokenizer on"
    if found := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: 256 bytes, the special tokens and the characters of this"
            f" text need {found[2]}: set tokenizer.vocab_size above that"
        )
    return f"SentencePiece cannot train this: {message.strip().splitlines()[0]}"


def train_model(texts: Iterable[str], recipe: dict[str, Any]) -> tuple[bytes, TrainingLines]:
    """The model, and what was counted on the way. Raises ``RequestError``, or what ``texts`` raises."""
    lines = TrainingLines(texts)
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            max_sentence_length=2 * _LINE_BYTES,
            minloglevel=2,
            **recipe,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if lines.error is not None:
            raise lines.error from None
        raise RequestError(_training_error(str(error), lines, recipe["vocab_size"])) from error
    if lines.error is not None:
        raise lines.error
    return out.getvalue(), lines
