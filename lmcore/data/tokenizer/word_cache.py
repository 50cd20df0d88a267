"""Encodes text word by word, with a cache, so that SentencePiece encodes each word only once.

The ids are equal to those that SentencePiece gives for the whole text: byte-pair merging joins two adjacent characters only
if they are adjacent in some piece of the vocabulary, so that the ids on both sides of any other pair are independent. Texts
are cut only at such pairs. Most words of a corpus have been seen before, and a look-up takes a fraction of the time of
merging. Memory is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np

_LINE_END = "\n"
_WORDS = (
    # A word and the spaces before it; letters and other characters are separate words, and so is each digit.
    re.compile(r" *(?:[^\W\d_]+|(?:[^\w \n]|_)+)|\d| +|\n"),
    # The same with digits among the other characters, as SentencePiece merges them if they are not split.
    re.compile(r" *(?:[^\W\d_]+|(?:[^\w \n]|[\d_])+)| +|\n"),
    # Everything between two spaces.
    re.compile(r" *[^ \n]+| +|\n"),
)
"""Ways to cut, the finest first. In each, a line end is a word, and a cut depends only on the two adjacent characters."""
_GROUP_CHARACTERS = 2**18
"""Text that is cut into words at once: its words are about 15 MB of Python strings."""
_KEPT_CHARACTERS = 2**20
"""Size of the cache in characters of its words: about 100,000 words, 25 MB."""
_CALL_CHARACTERS = 2**12
"""New words that are encoded in one call: a call for each word would take longer than the merging."""
_TRIAL_CHARACTERS, _REST_CHARACTERS = 2**18, 2**22
"""If more than a third of this much text is new words (Japanese without spaces, base64), the cache does not pay; it is
tried again after the second number of characters."""


@final
class WordCache:
    """Encodes texts word by word. :meth:`of` creates one if that is exact for the model."""

    def __init__(self, model: Any, words: re.Pattern[str], line_end: int) -> None:
        self._model, self._words, self._line_end = model, words, line_end
        self._ascii_words = re.compile(words.pattern, re.ASCII)  # the same on ASCII text, in half the time
        self._ids: dict[str, bytes] = {}
        self._kept = self._seen = self._new = self._rest = 0
        self._forget()

    @staticmethod
    def of(model: Any, pairs: frozenset[str]) -> WordCache | None:
        """A cache for a model, or ``None`` if a piece crosses every kind of cut, or contains a line end and more.

        ``pairs`` are the adjacent characters in all pieces."""
        line_end = model.encode(_LINE_END)
        if len(line_end) != 1:
            return None
        exact = (words for words in _WORDS if all(words.fullmatch(pair) for pair in pairs))
        words = next(exact, None)
        return None if words is None else WordCache(model, words, line_end[0])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray] | None:
        """One int32 array of ids for each text (texts must not contain ``▁``); ``None`` while the cache does not pay."""
        if self._rest > 0:
            self._rest -= sum(map(len, texts))
            return None
        result: list[np.ndarray] = []
        for group in _groups(texts, _GROUP_CHARACTERS):
            if self._kept > _KEPT_CHARACTERS:
                self._forget()
            cut = [(self._ascii_words if text.isascii() else self._words).findall(text) for text in group]
            self._learn(set().union(*cut).difference(self._ids))
            self._seen += sum(map(len, group))
            ids_of = self._ids.__getitem__
            result += [np.frombuffer(bytearray().join(map(ids_of, words)), dtype=np.int32) for words in cut]
        if self._seen >= _TRIAL_CHARACTERS:
            self._rest = _REST_CHARACTERS if 3 * self._new > self._seen else 0
            self._seen = self._new = 0
        return result

    def _learn(self, words: set[str]) -> None:
        """Encode new words as lines of longer texts, and cache their ids."""
        found: dict[str, bytes] = {}
        for group in _groups(list(words), _CALL_CHARACTERS):
            ids = self._model.encode(_LINE_END.join(group) + _LINE_END, return_type="numpy")
            ends = np.flatnonzero(ids == self._line_end).tolist()
            raw, start = ids.astype(np.int32, copy=False).tobytes(), 0
            for word, end in zip(group, ends, strict=True):
                found[word] = raw[4 * start : 4 * end]
                start = end + 1
        characters = sum(map(len, words))
        self._new += characters
        self._kept += characters
        self._ids.update(found)

    def _forget(self) -> None:
        self._ids = {_LINE_END: np.array([self._line_end], dtype=np.int32).tobytes()}
        self._kept = 0


def _groups(texts: Sequence[str], characters: int) -> Iterator[Sequence[str]]:
    """Consecutive texts in groups of about ``characters`` characters."""
    start = size = 0
    for index, text in enumerate(texts):
        size += len(text) + 1
        if size >= characters:
            yield texts[start : index + 1]
            start, size = index + 1, 0
    if start < len(texts):
        yield texts[start:]
