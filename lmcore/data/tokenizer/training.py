"""Training of a SentencePiece tokenizer.

The same texts and options give the same bytes, and every line reaches the trainer, long lines in pieces (the trainer
would silently drop them). The recipe: byte-pair merges with byte fallback, no normalization, no space added in front, all
white space kept, digits split. Training sees single lines, so that a line end is always a token of its own.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import sentencepiece

from lmcore.data.tokenizer import huggingface
from lmcore.data.tokenizer.tokenizer import MODEL_FILE, RECORD_FILE, SentencePieceTokenizer, Tokenizer
from lmcore.errors import FaultError, RequestError
from lmcore.humanize import amount

RECIPE_VERSIONS = {"bpe": 1, "char": 1, "unigram": 2}
"""Version by ``model_type``, increased when the same texts and options would give another tokenizer."""
_LINE_BYTES = 16_384
"""A longer line is cut into several lines; the trainer would silently drop it."""
_MOST_PIECES = 2**24
"""Largest ``tokenizer.vocab_size``; the trainer accepts up to 2^31 and needs memory for all of them."""
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


@final
class TrainingLines:
    """Iterates over lines for the trainer, not longer than it accepts and without its reserved character, and counts them."""

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
        except BaseException as error:  # C++ would turn it into a RuntimeError
            self.error = error
            return

    def _line(self, line: str) -> Iterator[str]:
        length = len(line.encode())
        self.lines += 1
        self.bytes += length
        # A stride that grows with the line number spreads at most 2,000 sample lines over the corpus.
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
        notes = [
            f"trained on {amount(self.documents, 'document')}, {amount(self.lines, 'line')}, {amount(self.bytes, 'byte')}"
        ]
        if self.cut:
            notes.append(
                f"cut {amount(self.cut, 'line')} of more than {_LINE_BYTES:,} bytes, none was left out"
            )
        if self.reserved:
            notes.append(
                f"encoded ▅ (U+2585), which SentencePiece reserves, as bytes in {amount(self.reserved, 'line')}"
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
    if "char_model_trainer" in message and "vocab_size" in message:
        return (
            f"vocab_size {vocab_size} is too small: 256 bytes, {len(_SPECIAL)} special tokens and the symbols of "
            f"tokenizer.user_symbols come first: set tokenizer.vocab_size above that"
        )
    if "(sum) > (0)" in message or "seed_sentencepieces.empty" in message:
        return (
            "the text holds nothing but the symbols of tokenizer.user_symbols, so that there is nothing to train a "
            "tokenizer on: give text, or leave them out"
        )
    if "insert_id(" in message:
        return f"vocab_size {vocab_size} is too small: the special tokens alone need 4; set tokenizer.vocab_size above that"
    return f"SentencePiece cannot train this: {message.strip().splitlines()[0]}"


def train_model(texts: Iterable[str], recipe: dict[str, Any]) -> tuple[bytes, TrainingLines]:
    """The trained model, and the lines with their counts. Raises ``RequestError``, or what ``texts`` raises."""
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
    model = out.getvalue()
    return _exact_scores(model) if recipe["model_type"] == "unigram" else model, lines


def _exact_scores(model: bytes) -> bytes:
    """Round the scores of a unigram model so that SentencePiece and transformers break ties in the same way.

    Two ways to split a run of spaces often have the same pieces in different order. Both libraries choose the first of the
    best ones, but SentencePiece adds scores in float32 and transformers in float64, so that rounding decided, and 279 of
    2,349 lines of Python had other ids in the export. Both add multiples of 1/64 exactly.
    """
    proto = huggingface.parse_model(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * huggingface.SCORE_STEPS) / huggingface.SCORE_STEPS
    exact: bytes = proto.SerializeToString(deterministic=True)
    return exact


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = 8000,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    split_digits: bool = True,
    user_symbols: Sequence[str] = (),
    model_max_length: int | None = None,
    made_from: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tokenizer:
    """Train a SentencePiece model on ``texts`` and, with ``folder``, save it. The same texts give the same bytes.

    Args:
        texts: documents; all of them are used, line by line.
        vocab_size: V, including 256 bytes, 4 special tokens and the characters. If the corpus does not contain enough
            pieces, the vocabulary is smaller, and ``notes`` says so.
        folder: where to save the tokenizer, see :meth:`lmcore.data.tokenizer.tokenizer.Tokenizer.save`.
        seed: stored in the record; training itself uses no random numbers.
        model_type: ``bpe``, ``char`` or ``unigram`` (slow).
        character_coverage: share of all characters that get a token of their own; the rest is encoded as bytes.
        split_digits: make each digit a token of its own.
        user_symbols: texts that are always one token, including spaces inside them.
        model_max_length: tokens, for ``tokenizer_config.json``.
        made_from: stored in the record: everything that determines the tokenizer
            (:func:`lmcore.data.corpus.tokenizer_source`).
        options: further options of SentencePiece's trainer.

    Raises:
        RequestError: no text, a vocabulary too small for the characters, an unknown option or an impossible symbol.
        FaultError: the self-test failed: a text is not decoded exactly, or has other ids in transformers.

    Example::

        tokenizer = train_tokenizer(["吾輩は猫である。", "名前はまだ無い。"] * 100, vocab_size=400)
    """
    if model_type not in ("bpe", "char", "unigram"):
        raise RequestError(
            f"unknown model_type {model_type!r}; choose from bpe, char, unigram (transformers has no word models)"
        )
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size <= _MOST_PIECES:
        raise RequestError(
            f"tokenizer.vocab_size must be a whole number from 1 to {_MOST_PIECES:,}, not {vocab_size!r}"
        )
    if not 0.98 <= character_coverage <= 1:  # NaN too
        raise RequestError(
            f"tokenizer.character_coverage must be from 0.98 to 1, not {character_coverage!r}: a share of the characters"
        )
    recipe = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "character_coverage": character_coverage,
        "split_digits": split_digits,
        "user_defined_symbols": _checked(user_symbols),
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        # Japanese text may contain no space at all; without a piece for it, a space would be decoded as "▁".
        "required_chars": huggingface.SPACE,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 3,
        "hard_vocab_limit": False,
        # Fixed, because it is written into the model, which must not depend on the machine.
        "num_threads": 4,
        **options,
    }
    model, lines = train_model(texts, recipe)
    record = {"recipe": recipe, "seed": seed, "sentencepiece": sentencepiece.__version__, **lines.counts()}
    if made_from is not None:
        record["made_from"] = dict(made_from)
    notes = lines.notes()
    tokenizer = SentencePieceTokenizer({MODEL_FILE: model, RECORD_FILE: json.dumps(record).encode()})
    if tokenizer.vocab_size < vocab_size:
        notes.append(
            f"the corpus holds only {tokenizer.vocab_size:,} pieces: the vocabulary is not {vocab_size:,}"
        )
    tokenizer.notes = tuple(notes)
    _self_test(tokenizer, lines.sample)
    if folder is not None:
        tokenizer.save(folder, model_max_length=model_max_length)
    return tokenizer


def _checked(symbols: Sequence[str]) -> list[str]:
    """Check the user's symbols, and return them as SentencePiece searches for them: with ``▁`` instead of spaces."""
    found: list[str] = []
    for symbol in symbols:
        piece = symbol.replace(" ", huggingface.SPACE)
        if not symbol or re.search("[\0\ud800-\udfff]", symbol):  # surrogates: bytes that are not UTF-8
            raise RequestError(
                f"tokenizer.user_symbols: {symbol!a} cannot be a symbol; give text of at least one character, in UTF-8"
            )
        if piece in (*_SPECIAL, huggingface.SPACE, "▅") or re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            raise RequestError(
                f"tokenizer.user_symbols: {symbol!r} is a piece of every SentencePiece model already; leave it out"
            )
        if piece in found:
            raise RequestError(f"tokenizer.user_symbols: {symbol!r} is given twice; give it once")
        found.append(piece)
    return found


def _self_test(tokenizer: SentencePieceTokenizer, lines: Sequence[str]) -> None:
    """Test a new tokenizer: sampled lines and hard texts must be decoded exactly and have the same ids in transformers, and
    each of the user's symbols must be one token."""
    texts = [*lines, "\n".join(lines[:50])]
    tokenizer.check(texts)
    texts += [*huggingface.TEST_TEXTS, *huggingface.symbol_texts(tokenizer.proto)]
    lost = [t for t, ids in zip(texts, tokenizer.encode_batch(texts)) if tokenizer.decode(ids) != t]
    lost = [text for text in lost if huggingface.SPACE not in text]
    if lost and tokenizer.is_exact:
        raise FaultError(f"self-test of the tokenizer: {lost[0][:200]!r} does not come back")
    if lost:
        tokenizer.notes += (
            f"with these options {len(lost):,} of {len(texts):,} sampled texts do not come back exactly from their ids",
        )
    for number, piece in enumerate(tokenizer.proto.pieces):
        symbol = piece.piece.replace(huggingface.SPACE, " ")
        if piece.type == huggingface.USER_DEFINED and tokenizer.encode(symbol) != [number]:
            raise FaultError(f"self-test of the tokenizer: the symbol {symbol!r} is not one token")
