"""Text <-> token ids, by SentencePiece or by a tokenizer of transformers.

No special token is added to a text, and none is recognized in it: a literal ``<s>`` in a text is text. A tokenizer that
was trained here decodes every text exactly (except ``▁``, U+2581, which decodes to a space in every SentencePiece model),
and the folder that it saves gives the same ids in transformers 4 and 5. Other tokenizers keep their own behaviour; code
that comes with them is never run.

Example::

    tokenizer = load_tokenizer("runs/demo/tokenizer")          # or a .model file, a folder, a Hub id
    ids = tokenizer.encode("吾輩は猫である。")                     # a list of int
    tokenizer.decode(ids)                                       # '吾輩は猫である。'
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import sentencepiece

from lmcore.data.tokenizer import huggingface
from lmcore.data.tokenizer.word_cache import WordCache
from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError

MODEL_FILE = "tokenizer.model"
RECORD_FILE = "lmcore_tokenizer.json"
"""File in a folder that lmcore saved: how the tokenizer was trained, and the hash of its model."""
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls")
_SEP_CLS = {"[SEP]": "sep", "<sep>": "sep", "[CLS]": "cls", "<cls>": "cls"}

_CUT_CHARACTERS = 4096
"""Long documents are encoded in pieces of about this size, cut where the ids are provably the same: a third faster."""
_LONGEST_CHARACTERS = 2**20
"""If there is no such place for this long, a document is cut anyway, so that time and memory stay bounded."""


class Tokenizer(ABC):
    """Text <-> ids. :func:`load_tokenizer` and :func:`lmcore.data.tokenizer.training.train_tokenizer` create one.

    Attributes:
        vocab_size: V, also ``len(tokenizer)``; every id is in [0, V).
        eos_id: the token that ends a document. bos_id, pad_id, unk_id: an id, or ``None`` if the tokenizer has none. They
            also have their names in transformers: ``eos_token_id``, ``bos_token_id``, ``pad_token_id``, ``unk_token_id``.
        special_ids: ``{"bos_token_id": 1, ...}``, for a model's config, as far as they are defined.
        special_tokens: ``{"bos_token": "<s>", ...}``, the same as text.
        fingerprint: SHA-256 in hex over everything that determines the ids; equal fingerprints mean equal ids.
        former_fingerprints: fingerprints that earlier versions computed; token stores and checkpoints may contain them.
        notes: what a user should know about how it was trained or loaded, one line each.
        files: contents of the files to save, by file name.
    """

    files: dict[str, bytes]
    notes: tuple[str, ...]
    vocab_size: int
    fingerprint: str
    former_fingerprints: tuple[str, ...] = ()

    def _take_special_tokens(self, tokens: Mapping[str, str], ids: Mapping[str, int]) -> None:
        self.special_tokens = {f"{role}_token": token for role, token in tokens.items()}
        self.special_ids = {f"{role}_token_id": number for role, number in ids.items()}
        self.bos_id, self.pad_id, self.unk_id = ids.get("bos"), ids.get("pad"), ids.get("unk")
        eos = ids.get("eos", ids.get("sep"))
        if eos is None:
            raise RequestError(
                "the tokenizer has no end-of-text token: give eos_token in its tokenizer_config.json "
                "(documents could not be told apart)"
            )
        self.eos_id: int = eos
        self.bos_token_id, self.eos_token_id = self.bos_id, self.eos_id
        self.pad_token_id, self.unk_token_id = self.pad_id, self.unk_id

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: str | Sequence[str], **_: Any) -> dict[str, Any]:
        """``{"input_ids": ..., "attention_mask": ...}``: lists of int for one text, lists of such lists for several.

        No special tokens are added. Further options of transformers' tokenizers are accepted and ignored."""
        if isinstance(text, str):
            ids: Any = self.encode(text)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        ids = [one.tolist() for one in self.encode_batch(text)]
        return {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[np.ndarray]:
        """One int32 array of ids for each text."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0].tolist()

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def piece(self, number: int) -> str:
        """The piece of an id, as it is in the vocabulary."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray | None:
        """(V,) int32: the number of UTF-8 bytes of text of each id, 0 for special tokens; ``None`` if that is not exact
        (for a tokenizer that normalizes text or adds a space in front)."""

    @abstractmethod
    def _files_to_save(self, model_max_length: int | None) -> dict[str, bytes]:
        """The contents of all files of the folder, by file name."""

    def save(self, folder: str | os.PathLike[str], *, model_max_length: int | None = None) -> None:
        """Write a folder that ``AutoTokenizer.from_pretrained`` of transformers 4 and 5 opens, with the same ids.

        Files of another tokenizer in the folder are removed; everything else is kept. The record of a trained
        tokenizer is written last, so that a folder left incomplete by a kill has none.

        Args:
            model_max_length: tokens, for ``tokenizer_config.json``; default: unlimited.

        Raises:
            FaultError: the folder would not give the same ids; nothing is written.
        """
        files = self._files_to_save(model_max_length)
        target = Path(folder)
        DISK.makedirs(target)
        if (target / RECORD_FILE).exists():
            DISK.unlink(target / RECORD_FILE)
        for path in huggingface.stale_files(target, list(files)):
            DISK.unlink(path)
        for name in sorted(files, key=lambda one: one == RECORD_FILE):
            DISK.makedirs((target / name).parent)
            DISK.write_bytes(target / name, files[name])


@final
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, encoded by SentencePiece itself.

    Args:
        files: ``tokenizer.model``, and the record of its training if there is one.

    Raises:
        ValueError: it is not a SentencePiece model.
        RequestError: it has no end-of-text token, or is a word model.
    """

    def __init__(self, files: dict[str, bytes], *, notes: Sequence[str] = ()) -> None:
        self.files, self.notes = files, tuple(notes)
        model = files[MODEL_FILE]
        self.proto = huggingface.parse_model(model)
        if self.proto.trainer_spec.model_type == huggingface.WORD:
            raise RequestError(
                "SentencePiece word models have no equivalent in transformers; give one of bpe, unigram or char"
            )
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.is_exact = huggingface.is_exact(self.proto)
        self.is_unigram = self.proto.trainer_spec.model_type == huggingface.UNIGRAM
        self.vocab_size = self.processor.get_piece_size()
        tokens = {
            role: self.processor.id_to_piece(number)
            for role in ("bos", "eos", "unk", "pad")
            if (number := getattr(self.processor, f"{role}_id")()) >= 0
        }
        symbols = (huggingface.CONTROL, huggingface.USER_DEFINED)
        named = {piece.piece for piece in self.proto.pieces if piece.type in symbols}
        tokens |= {role: piece for piece, role in _SEP_CLS.items() if piece in named}
        ids = {role: self.processor.piece_to_id(piece) for role, piece in tokens.items()}
        # A user-defined symbol is recognized in text; as a special token of the saved folder it would not be.
        kinds = {role: self.proto.pieces[number].type for role, number in ids.items()}
        shown = {role: t for role, t in tokens.items() if kinds[role] != huggingface.USER_DEFINED}
        self._take_special_tokens(shown, ids)
        digest = hashlib.sha256(b"native")
        digest.update(f"\0{MODEL_FILE}\0{len(model)}\0".encode() + model)
        self.fingerprint = digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_sentencepiece, (self.files, self.notes)

    @property
    def record(self) -> dict[str, Any]:
        """How it was trained; empty for a model that was not trained by lmcore."""
        try:
            value = json.loads(self.files.get(RECORD_FILE, b"{}"))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[np.ndarray]:
        if self._pairs is None and self._names is None:
            return self.processor.encode(list(texts), num_threads=threads, return_type="numpy")
        pieces: list[str] = []
        counts = []
        for text in texts:
            before = len(pieces)
            pieces.extend(self._cut(text) if self._names is None else self._names.split(text))
            counts.append(len(pieces) - before)
        encoded = self._words.encode_batch(pieces) if self._words is not None and threads == 1 else None
        if encoded is None:
            encoded = self.processor.encode(pieces, num_threads=threads, return_type="numpy")
        result, at = [], 0
        for count in counts:
            result.append(encoded[at] if count == 1 else np.concatenate(encoded[at : at + count]))
            at += count
        return result

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(number) for number in ids])

    def piece(self, number: int) -> str:
        return self.processor.id_to_piece(number)

    def byte_lengths(self) -> np.ndarray | None:
        if not self.is_exact:
            return None
        return np.array([_piece_bytes(p.type, p.piece) for p in self.proto.pieces], dtype=np.int32)

    def _cut(self, text: str) -> Iterator[str]:
        """Cut a text into pieces whose concatenated ids are the ids of the whole text.

        A merge across a cut would give a vocabulary piece that contains the two characters next to the cut. So between two
        characters that are not adjacent in any piece nothing is ever merged, and a cut does not change the ids. This holds
        for byte-pair and character models without normalization; texts for other models are not cut.
        """
        assert self._pairs is not None
        text = text.replace(huggingface.SPACE, " ")  # the model does not distinguish them
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
    def _names(self) -> re.Pattern[str] | None:
        """Where a text is cut so that it contains no name of a special piece, see :func:`huggingface.cuts_inside_names`."""
        cuts = huggingface.cuts_inside_names(self.proto)
        return None if cuts is None else re.compile(cuts)

    @cached_property
    def _pairs(self) -> frozenset[str] | None:
        """The pairs of characters that are adjacent in some piece; ``None`` if texts must not be cut."""
        if not self.is_exact or self.is_unigram:
            return None
        others = (huggingface.CONTROL, huggingface.UNKNOWN, huggingface.BYTE)
        texts = [p.piece.replace(huggingface.SPACE, " ") for p in self.proto.pieces if p.type not in others]
        return frozenset(text[at : at + 2] for text in texts for at in range(len(text) - 1))

    @cached_property
    def _words(self) -> WordCache | None:
        return None if self._pairs is None else WordCache.of(self.processor, self._pairs)

    def check(self, texts: Iterable[str]) -> None:
        """Compare ids and decoded text with those of the same model in transformers.

        The texts are ``texts``, :data:`lmcore.data.tokenizer.huggingface.TEST_TEXTS`, and texts around each of the user's
        symbols. A model that normalizes text, or a unigram model (whose ties are broken by rounding), may differ on rare
        texts; then the first of them is added to the notes.

        Raises:
            FaultError: another model differs.
            RequestError: the model has no equivalent in transformers.
        """
        everything = [*texts, *huggingface.TEST_TEXTS, *huggingface.symbol_texts(self.proto)]
        try:
            converted = huggingface.to_tokenizers(self.proto)
        except ValueError as error:
            raise RequestError(str(error)) from error
        found = huggingface.difference(self.encode, self.decode, converted, everything)
        if found and self.is_exact and not self.is_unigram:
            raise FaultError(f"the tokenizer would not be the same in transformers: {found}")
        note = f"in transformers some texts are not the same as here: {found}"
        if found and not any(one.startswith(note[:40]) for one in self.notes):
            self.notes += (note,)

    def _files_to_save(self, model_max_length: int | None) -> dict[str, bytes]:
        self.check([])
        converted = huggingface.to_tokenizers(self.proto)
        config = huggingface.tokenizer_config(
            self.special_tokens,
            model_max_length=model_max_length,
            add_prefix_space=self.proto.normalizer_spec.add_dummy_prefix,
        )
        model = self.files[MODEL_FILE]
        record = self.record | {"version": 1, "sha256": hashlib.sha256(model).hexdigest()}
        return {
            MODEL_FILE: model,
            "tokenizer.json": converted.to_str(pretty=True).encode(),
            huggingface.TOKENIZER_CONFIG: config,
            RECORD_FILE: huggingface.as_json(record),
        }


@final
class TransformersTokenizer(Tokenizer):
    """The tokenizer that transformers' ``AutoTokenizer`` opens from ``files``.

    Args:
        files: complete without the model's config.json (:func:`lmcore.data.tokenizer.huggingface.complete`).
        former_fingerprints: fingerprints that earlier versions computed for the original folder.
        opened: the tokenizer that transformers opened from them, if that was done already.

    Raises:
        RequestError: the files cannot be opened, have no end-of-text token, or lack a large part of the vocabulary.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        *,
        notes: Sequence[str] = (),
        former_fingerprints: Sequence[str] = (),
        opened: Any = None,
    ) -> None:
        self.files, self.notes = files, tuple(notes)
        self.former_fingerprints = tuple(former_fingerprints)
        self._tokenizer = huggingface.open_files(files) if opened is None else opened
        self._tokenizer.split_special_tokens = True  # in training, names of special tokens in a text are text
        self._backend = huggingface.plain_backend(self._tokenizer)
        tokens = {
            role: str(token)
            for role in _ROLES
            if (token := getattr(self._tokenizer, f"{role}_token", None)) is not None
        }
        self.vocab_size = max(len(self._tokenizer), max(self._tokenizer.get_vocab().values(), default=-1) + 1)
        huggingface.check_pieces(self._tokenizer, self.vocab_size, files)
        self._take_special_tokens(
            tokens, {role: getattr(self._tokenizer, f"{role}_token_id") for role in tokens}
        )
        self.fingerprint = huggingface.fingerprint_of(self._tokenizer, files)
        before = self.fingerprint
        if self._backend is None:  # only that of a Python tokenizer has options
            before = huggingface.fingerprint_of(self._tokenizer, files, with_options=False)
        if before != self.fingerprint:
            self.former_fingerprints = tuple(dict.fromkeys([*self.former_fingerprints, before]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_transformers, (self.files, self.notes, self.former_fingerprints)

    def check(self) -> None:
        """Check that texts of many kinds have the same ids as in transformers.

        Raises:
            RequestError: encoding fails, or the saved folder would give other ids in transformers.
        """
        texts = [*huggingface.TEST_TEXTS, *(f"a {token} b" for token in self.special_tokens.values())]
        try:
            ours = [ids.tolist() for ids in self.encode_batch(texts)]
            # Not verbose, because transformers would warn about texts longer than the context, which are cut into blocks.
            theirs = [
                self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts
            ]
        except Exception as error:  # tokenizers raises plain Exception; Python tokenizers may raise anything
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RequestError(f"this tokenizer cannot encode text: {reason[0][:300]}") from error
        for text, here, there in zip(texts, ours, theirs):
            if here != list(there):
                raise RequestError(
                    f"this tokenizer gives {here[:20]} for {text!r} by itself and {list(there)[:20]} inside "
                    f"transformers: its class does more than its tokenizer.json says, which training would not do"
                )
        eos = self.special_tokens.get("eos_token", "")
        if eos and self.eos_id in self.encode(eos):
            self.notes += (f"its model takes a literal {eos} in a text for the end-of-text token",)

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[np.ndarray]:
        if self._backend is not None:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(one.ids, dtype=np.int32) for one in encoded]
        return [
            np.array(
                self._tokenizer.encode(
                    text, add_special_tokens=False, split_special_tokens=True, verbose=False
                ),
                dtype=np.int32,
            )
            for text in texts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        plain = [int(number) for number in ids]
        return self._tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece(self, number: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(number)

    def byte_lengths(self) -> np.ndarray | None:
        return huggingface.byte_lengths(self._tokenizer, self._backend, self.vocab_size)

    def _files_to_save(self, model_max_length: int | None) -> dict[str, bytes]:
        if not model_max_length:
            return self.files
        config = huggingface.json_of(self.files, huggingface.TOKENIZER_CONFIG)
        config["model_max_length"] = model_max_length
        return {**self.files, huggingface.TOKENIZER_CONFIG: huggingface.as_json(config)}


def _open_sentencepiece(files: dict[str, bytes], notes: tuple[str, ...]) -> Tokenizer:
    return SentencePieceTokenizer(files, notes=notes)


def _open_transformers(files: dict[str, bytes], notes: tuple[str, ...], former: tuple[str, ...]) -> Tokenizer:
    return TransformersTokenizer(files, notes=notes, former_fingerprints=former)


def _piece_bytes(kind: int, piece: str) -> int:
    if kind == huggingface.BYTE:
        return 1
    if kind in (huggingface.CONTROL, huggingface.UNKNOWN):
        return 0
    return len(piece.replace(huggingface.SPACE, " ").encode())


def load_tokenizer(path: str | os.PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer from a SentencePiece ``.model`` file, a folder (of lmcore or transformers), or a Hub id.

    Args:
        path: file, folder, or ``owner/name`` on the Hub (also ``owner/name@revision``).
        revision: commit, tag or branch of a Hub id.

    Raises:
        RequestError: the path is none of these, or the tokenizer is damaged, has no end-of-text token, or needs its own
            code.
    """
    place = Path(path).expanduser()
    try:
        if place.is_file():
            return _load_model(place.read_bytes(), str(path))
        if place.is_dir():
            return _load_folder(place, str(path))
    except OSError as error:
        raise RequestError(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
    name, _, inline = str(path).partition("@")
    if str(path).endswith(".model") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise RequestError(
            f"no such tokenizer: {path} (a .model file, a folder, or a Hub id like owner/name)"
        )
    folder, commit = huggingface.download(name, revision or inline or None)
    pinned = "" if revision or inline else " (give tokenizer.revision to pin it)"
    return _load_folder(folder, f"{name} on the Hub", [f"{name}: commit {commit}{pinned}"])


def _load_folder(folder: Path, shown: str, notes: Sequence[str] = ()) -> Tokenizer:
    files = huggingface.read_files(folder)
    if RECORD_FILE in files and MODEL_FILE in files:
        record = huggingface.json_of(files, RECORD_FILE)
        if record.get("sha256") != hashlib.sha256(files[MODEL_FILE]).hexdigest():
            raise RequestError(
                f"{folder / MODEL_FILE} is not the model that {RECORD_FILE} beside it describes"
            )
        return _load_model(files[MODEL_FILE], shown, {RECORD_FILE: files[RECORD_FILE]}, notes)
    if huggingface.is_bare_model(files):
        models = [name for name in files if name.endswith(".model")]
        if len(models) != 1:
            raise RequestError(
                f"folder {shown} holds no tokenizer (no tokenizer.json and {len(models)} .model files)"
            )
        return _load_model(files[models[0]], f"{shown}/{models[0]}", notes=notes)
    if "auto_map" in huggingface.json_of(files, huggingface.TOKENIZER_CONFIG):
        notes = [*notes, "it brings code of its own (auto_map), which is not run"]
    try:
        copy, opened = huggingface.complete(files)
        former = huggingface.former_fingerprints(files)
        tokenizer = TransformersTokenizer(copy, notes=notes, former_fingerprints=former, opened=opened)
        tokenizer.check()
    except RequestError as error:
        raise RequestError(f"{shown}: {error}") from error
    return tokenizer


def _load_model(
    model: bytes, shown: str, record: Mapping[str, bytes] | None = None, notes: Sequence[str] = ()
) -> Tokenizer:
    try:
        return SentencePieceTokenizer({MODEL_FILE: model, **(record or {})}, notes=notes)
    except (ValueError, RuntimeError) as error:
        folder = (
            ""
            if shown.endswith(".model")
            else "; give a .model file, or the folder of a tokenizer of transformers"
        )
        raise RequestError(f"{shown}: {error}{folder}") from error
    except RequestError as error:
        raise RequestError(f"{shown}: {error}") from error


def check_tokenizer(fingerprint: object, tokenizer: Tokenizer, *, folder: object = "this folder") -> None:
    """Refuse a tokenizer that is not the one with which a checkpoint was trained.

    Args:
        fingerprint: the fingerprint in the checkpoint's state; ``None`` for checkpoints of version 0.1.0, which have none.
        folder: where the tokenizer was found, for the message.

    Raises:
        RequestError: the tokenizer is another one; the message gives both fingerprints.
    """
    if fingerprint is None or fingerprint in (tokenizer.fingerprint, *tokenizer.former_fingerprints):
        return
    raise RequestError(
        f"{folder} is not the tokenizer that the checkpoint was trained with (fingerprint "
        f"{tokenizer.fingerprint[:12]}, in the checkpoint {str(fingerprint)[:12]}): restore that one"
    )
