"""Documents -> a trained SentencePiece model; text -> ids; -> the tokenizer folder for transformers.

Comes in: text to train on, or a ``.model``, a transformers folder, or a Hub id. Goes out: a
:class:`Tokenizer`. What always holds: no special tokens are added to a text and none is found in it (a
literal ``<s>`` is text); a tokenizer trained here gives back every text exactly (but ``▁``, U+2581, which
comes back as a space, as in every SentencePiece model), and its folder gives the same ids in transformers 4
and 5, which is tested each time it is built; a tokenizer that was brought along keeps its own behaviour. Code
of a stranger (``trust_remote_code``) is never run.

The recipe: byte-pair merges with byte fallback, no normalization, no space put in front, all white space
kept, digits one by one. It is trained on single lines, so that a line end is always its own token.

    tokenizer = train(texts, vocab_size=8000, folder="tokenizer")
    tokenizer.decode(tokenizer.encode("吾輩は猫である。")) == "吾輩は猫である。"
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import sentencepiece

from lmcore.data.tokenizer import convert, huggingface
from lmcore.data.tokenizer.training import sample_texts, train_model
from lmcore.data.tokenizer.word_cache import WordCache
from lmcore.errors import FaultError, RequestError

__all__ = ["Tokenizer", "load", "sample_texts", "train"]

MODEL_FILE = "tokenizer.model"
RECORD_FILE = "lmcore_tokenizer.json"
"""In a folder of ours: how the tokenizer came to be, and the hash of its model."""
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls")
_SEP_CLS = {"[SEP]": "sep", "<sep>": "sep", "[CLS]": "cls", "<cls>": "cls"}

_CUT_CHARACTERS = 4096
"""Long documents are encoded in pieces of about this size, where the ids are provably the same: a third
faster."""
_LONGEST_CHARACTERS = 2**20
"""Without a provable cut for this long, a document is cut anyway: its time and memory must stay bounded."""


@final
class Tokenizer:
    """Text <-> ids.

    Attributes:
        vocab_size: V; every id is below it. eos_id: ends a document. bos_id, pad_id, unk_id: or ``None``.
        special_ids: the ids a model's config wants, by its names (``bos_token_id``, ``pad_token_id``, ...),
        as far as
            the tokenizer defines them.
        fingerprint: SHA-256 over what decides the ids; equal fingerprints mean equal tokens.
        notes: what a user should know about how it was made or loaded, one line each.
    """

    def __init__(self, files: dict[str, bytes], *, native: bool, notes: Sequence[str] = ()) -> None:
        self.files = files
        self.notes = tuple(notes)
        self._is_native = native
        self._exact = False
        if native:
            self._proto = convert.parse(files[MODEL_FILE])
            self._exact = convert.is_exact(self._proto)
            self._model = sentencepiece.SentencePieceProcessor(model_proto=files[MODEL_FILE])
            tokens = {
                role: self._model.id_to_piece(number)
                for role in ("bos", "eos", "unk", "pad")
                if (number := getattr(self._model, f"{role}_id")()) >= 0
            }
            controls = {
                p.piece for p in self._proto.pieces if p.type in (convert.CONTROL, convert.USER_DEFINED)
            }
            tokens |= {role: piece for piece, role in _SEP_CLS.items() if piece in controls}
            ids = {role: self._model.piece_to_id(piece) for role, piece in tokens.items()}
            self.vocab_size = self._model.get_piece_size()
            parts = {MODEL_FILE: files[MODEL_FILE]}
        else:
            self._hub = huggingface.open_transformers(files)
            self._fast = huggingface.as_plain_text(self._hub)
            tokens = {r: str(t) for r in _ROLES if (t := getattr(self._hub, f"{r}_token", None)) is not None}
            ids = {role: getattr(self._hub, f"{role}_token_id") for role in tokens}
            self.vocab_size = max(len(self._hub), max(self._hub.get_vocab().values()) + 1)
            parts = {name: huggingface.without_length(name, data) for name, data in files.items()}
            if "auto_map" in json.loads(files.get("tokenizer_config.json", b"{}")):
                self.notes += ("it brings code of its own (auto_map), which is not run",)
        self.special_tokens = {f"{role}_token": token for role, token in tokens.items()}
        self.special_ids = {f"{role}_token_id": number for role, number in ids.items()}
        self.bos_id, self.pad_id, self.unk_id = ids.get("bos"), ids.get("pad"), ids.get("unk")
        eos = ids.get("eos", ids.get("sep"))
        if eos is None:
            raise RequestError(
                "the tokenizer has no end-of-text token (eos): documents could not be told apart"
            )
        self.eos_id: int = eos
        digest = hashlib.sha256(b"native" if native else b"transformers")
        for name in sorted(parts):
            digest.update(f"\0{name}\0{len(parts[name])}\0".encode() + parts[name])
        self.fingerprint = digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to worker processes as its files."""
        return _rebuild, (self.files, self._is_native, self.notes)

    def __len__(self) -> int:
        return self.vocab_size

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[np.ndarray]:
        """One int32 array of ids for each text."""
        if not self._is_native:
            if self._fast is not None:
                encoded = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
                return [np.array(one.ids, dtype=np.int32) for one in encoded]
            return [
                np.array(self._hub.encode(text, add_special_tokens=False), dtype=np.int32) for text in texts
            ]
        if self._pairs is None:
            return self._model.encode(list(texts), num_threads=threads, return_type="numpy")
        pieces: list[str] = []
        counts = []
        for text in texts:
            before = len(pieces)
            pieces.extend(self._cut(text))
            counts.append(len(pieces) - before)
        encoded = self._words.encode_batch(pieces) if self._words is not None and threads == 1 else None
        if encoded is None:
            encoded = self._model.encode(pieces, num_threads=threads, return_type="numpy")
        result, at = [], 0
        for count in counts:
            result.append(encoded[at] if count == 1 else np.concatenate(encoded[at : at + count]))
            at += count
        return result

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special tokens stand for nothing, broken UTF-8 for U+FFFD."""
        plain = [int(number) for number in ids]
        if self._is_native:
            return self._model.decode(plain)
        return self._hub.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece(self, number: int) -> str:
        """What an id looks like in the vocabulary."""
        return self._model.id_to_piece(number) if self._is_native else self._hub.convert_ids_to_tokens(number)

    def _cut(self, text: str) -> Iterator[str]:
        """Pieces of a text whose ids, one after another, are the ids of the whole.

        A merge across a cut would make a vocabulary piece that contains the two characters beside it. So
        between two characters that stand beside one another in no piece, nothing is ever merged, and the cut
        changes nothing. (For byte-pair and character models without normalization; others are not cut.)
        """
        assert self._pairs is not None
        text = text.replace(convert.SPACE, " ")  # the model does not tell them apart either
        start = 0
        while len(text) - start > _CUT_CHARACTERS:
            cut = start + _CUT_CHARACTERS
            last = min(start + _LONGEST_CHARACTERS, len(text))
            while cut < last and text[cut - 1 : cut + 1] in self._pairs:
                cut += 1
            yield text[start:cut]
            start = cut
        if start < len(text) or not start:
            yield text[start:]

    @cached_property
    def _pairs(self) -> frozenset[str] | None:
        """The characters that stand side by side in some piece; ``None`` where a text may not be cut."""
        if not self._exact or self._proto.trainer_spec.model_type == convert.UNIGRAM:
            return None
        return _adjacent_characters(self._proto)

    @cached_property
    def _words(self) -> WordCache | None:
        return None if self._pairs is None else WordCache.of(self._model, self._pairs)

    def byte_lengths(self) -> np.ndarray | None:
        """(V,) int32: how many UTF-8 bytes of text each id stands for, special tokens 0; ``None`` where that
        is not exact (a tokenizer that normalizes text or puts a space in front)."""
        if self._is_native:
            if not self._exact:
                return None
            pieces = ((p.type, p.piece) for p in self._proto.pieces)
            return np.array([_native_length(kind, piece) for kind, piece in pieces], dtype=np.int32)
        return huggingface.byte_level_lengths(self._hub, self._fast, self.vocab_size)

    def save(self, folder: str | os.PathLike[str], *, model_max_length: int | None = None) -> None:
        """Write the folder that ``AutoTokenizer.from_pretrained`` opens, in transformers 4 and 5, with these
        ids.

        Raises:
            FaultError: the folder would not give the same ids (nothing is written then).
        """
        files = dict(self.files)
        if self._is_native:
            wrapped = convert.convert(self._proto)
            found = convert.difference(self._model, wrapped, convert.HARD_TEXTS)
            if found and self._exact and self._proto.trainer_spec.model_type != convert.UNIGRAM:
                raise FaultError(f"the tokenizer does not survive its conversion to transformers: {found}")
            if found:
                # Its normalization works on other units there, and unigram ties are broken otherwise: rare texts only.
                self.notes += (f"in transformers some texts are not the same as here: {found}",)
            wrapped.encode_special_tokens = False
            files["tokenizer.json"] = wrapped.to_str(pretty=True).encode()
            prefix = self._proto.normalizer_spec.add_dummy_prefix
            files["tokenizer_config.json"] = convert.config(
                self.special_tokens, model_max_length=model_max_length, add_prefix_space=prefix
            ).encode()
            record = json.loads(files.get(RECORD_FILE, b"{}"))
            record |= {"version": 1, "sha256": hashlib.sha256(files[MODEL_FILE]).hexdigest()}
            files[RECORD_FILE] = (json.dumps(record, indent=2) + "\n").encode()
        else:
            files.pop("config.json", None)  # it is the model's, and tells which class the tokenizer is
            own = json.loads(files.get("tokenizer_config.json", b"{}"))
            kind = type(self._hub).__name__
            own.setdefault(
                "tokenizer_class", "PreTrainedTokenizerFast" if kind == "TokenizersBackend" else kind
            )
            if model_max_length:
                own["model_max_length"] = model_max_length
            files["tokenizer_config.json"] = (json.dumps(own, ensure_ascii=False, indent=2) + "\n").encode()
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        # The record comes last: without it the folder is not taken for a finished one of ours.
        for name in sorted(files, key=lambda one: one == RECORD_FILE):
            temporary = target / f".{name}.{os.getpid()}"
            temporary.write_bytes(files[name])
            temporary.replace(target / name)


def _rebuild(files: dict[str, bytes], native: bool, notes: tuple[str, ...]) -> Tokenizer:
    return Tokenizer(files, native=native, notes=notes)


def _native_length(kind: int, piece: str) -> int:
    if kind == convert.BYTE:
        return 1
    if kind in (convert.CONTROL, convert.UNKNOWN):
        return 0
    return len(piece.replace(convert.SPACE, " ").encode())


def _adjacent_characters(proto: Any) -> frozenset[str]:
    others = (convert.CONTROL, convert.UNKNOWN, convert.BYTE)
    pieces = (p.piece for p in proto.pieces if p.type not in others)
    texts = (piece.replace(convert.SPACE, " ") for piece in pieces)
    return frozenset(piece[at : at + 2] for piece in texts for at in range(len(piece) - 1))


def load(path: str | os.PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """Open a SentencePiece ``.model``, a folder (ours or any transformers one), or a Hub id.

    Args:
        path: file, folder, or ``owner/name`` on the Hub (also ``owner/name@revision``).
        revision: commit, tag or branch of a Hub id.

    Raises:
        RequestError: it is none of these, has no end-of-text token, or would need code of its own.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _native(place.read_bytes(), str(path))
    if place.is_dir():
        files = {
            n: (place / n).read_bytes()
            for n in (*huggingface.TOKENIZER_FILES, "config.json")
            if (place / n).is_file()
        }
        record = place / RECORD_FILE
        if record.is_file() and MODEL_FILE in files:
            stored = record.read_bytes()
            if json.loads(stored).get("sha256") != hashlib.sha256(files[MODEL_FILE]).hexdigest():
                raise RequestError(
                    f"{place / MODEL_FILE} is not the model that {RECORD_FILE} beside it describes"
                )
            return Tokenizer({MODEL_FILE: files[MODEL_FILE], RECORD_FILE: stored}, native=True)
        models = sorted(place.glob("*.model"))
        if not files.keys() - {MODEL_FILE, "spiece.model", "config.json"}:
            if len(models) != 1:
                raise RequestError(
                    f"folder {path} holds no tokenizer (no tokenizer.json and {len(models)} .model files)"
                )
            return _native(models[0].read_bytes(), str(models[0]))
        return Tokenizer(files, native=False)
    name, _, inline = str(path).partition("@")
    if str(path).endswith(".model") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise RequestError(
            f"no such tokenizer: {path} (a .model file, a folder, or a Hub id like owner/name)"
        )
    files, commit = huggingface.from_hub(name, revision or inline or None)
    pinned = "" if revision or inline else " (give tokenizer.revision to pin it)"
    return Tokenizer(files, native=False, notes=[f"{name}: commit {commit}{pinned}"])


def _native(model: bytes, path: str) -> Tokenizer:
    try:
        return Tokenizer({MODEL_FILE: model}, native=True)
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"{path}: {error}") from error


def train(
    texts: Iterable[str],
    *,
    vocab_size: int = 8000,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    split_digits: bool = True,
    model_max_length: int | None = None,
    **options: Any,
) -> Tokenizer:
    """Train a SentencePiece model on ``texts`` and, with ``folder``, save it. The same texts give the same
    bytes.

    Args:
        texts: documents; all of them are used, line by line (bound them with :func:`sample_texts`).
        vocab_size: V, with 256 bytes, 4 special tokens and the characters among it. A corpus that does not
        hold so many
            pieces gives fewer, and ``notes`` says so.
        seed: kept in the record; training itself draws nothing. model_type: ``bpe``, ``char`` or ``unigram``
        (slow, and its ids may differ between the libraries in ties). character_coverage: share of all
        characters that get a token of their own; the rest is spelt in bytes. split_digits: each digit its own
        token. options: further options of SentencePiece's trainer.

    Raises:
        RequestError: no text, a vocabulary too small for the characters, an unknown option.
    """
    recipe = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "character_coverage": character_coverage,
        "split_digits": split_digits,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        # Japanese text may hold no space at all; without a piece for it, a space would come back as "▁".
        "required_chars": convert.SPACE,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 3,
        "hard_vocab_limit": False,
        # Fixed: it is written into the model, and must not depend on the machine.
        "num_threads": 4,
        **options,
    }
    if model_type not in ("bpe", "char", "unigram"):
        raise RequestError(
            f"model_type {model_type!r}: bpe, char or unigram (transformers has no word models)"
        )
    model, lines = train_model(texts, recipe)
    record = {"recipe": recipe, "seed": seed, "sentencepiece": sentencepiece.__version__, **lines.counts()}
    notes = lines.notes()
    files = {MODEL_FILE: model, RECORD_FILE: json.dumps(record).encode()}
    tokenizer = Tokenizer(files, native=True)
    if tokenizer.vocab_size < vocab_size:
        notes.append(
            f"the corpus holds only {tokenizer.vocab_size:,} pieces: the vocabulary is not {vocab_size:,}"
        )
    tokenizer.notes = tuple(notes)
    _self_test(tokenizer, lines.sample)
    if folder is not None:
        tokenizer.save(folder, model_max_length=model_max_length)
    return tokenizer


def _self_test(tokenizer: Tokenizer, lines: Sequence[str]) -> None:
    """Before anyone uses it: every sampled line comes back exactly, with the same ids in transformers."""
    texts = [*lines, "\n".join(lines[:50]), *convert.HARD_TEXTS]
    # Unigram may choose differently between equal scores; a normalization that was asked for is not the same there.
    if tokenizer._exact and tokenizer._proto.trainer_spec.model_type != convert.UNIGRAM:
        found = convert.difference(tokenizer._model, convert.convert(tokenizer._proto), texts)
        if found:
            raise FaultError(f"self-test of the tokenizer: {found}")
    lost = [t for t, ids in zip(texts, tokenizer.encode_batch(texts)) if tokenizer.decode(ids) != t]
    lost = [text for text in lost if convert.SPACE not in text]
    if lost and tokenizer._exact:
        raise FaultError(f"self-test of the tokenizer: {lost[0][:200]!r} does not come back")
    if lost:
        tokenizer.notes += (
            f"with these options {len(lost):,} of {len(texts):,} sampled texts do not come back exactly from their ids",
        )
