"""Conversion of SentencePiece models to transformers, tokenizer folders of transformers, and downloads from the Hub.

A SentencePiece model is written as a ``tokenizer.json`` with the same ids (:func:`to_tokenizers`); transformers' own
conversion ignores the dummy prefix and the removal of spaces. Of a transformers folder, the files are kept that
reproduce what ``AutoTokenizer`` opens (:func:`complete`): whichever files its class needs, never its code.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from lmcore.disk import temporary_folder
from lmcore.errors import RequestError

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Piece types of sentencepiece_model.proto."""
UNIGRAM, _BPE, WORD, _CHAR = 1, 2, 3, 4
"""Model types of sentencepiece_model.proto."""

TEST_TEXTS = (
    "",
    " ",
    "  two  spaces ",
    "\n\n\tdef f(x):\r\n        return  x ** 2\n",
    "　全角　ＡＢＣ１２３（）、。「」！？",
    "ｶﾞｷﾞｸﾞ ﾊﾟﾋﾟﾌﾟ ｱｲｳ",
    "𠮷野家で𩸽と𠀋を食べた。髙﨑、葛󠄀城",
    "か\u3099き\u3099 e\u0301 ﬁ ① ㌔ Å",
    "👨‍👩‍👧‍👦🇯🇵👍🏽❤️",
    "<s></s><pad><unk> [SEP] <0x41>",
    "0123456789 3.14159 -1e-5 ００１",
    "\u200b\ufeff\u00a0\u2028\u0000\u001b[0m",
    "https://例え.テスト/パス?q=検索&x=1",
    "Ünïcödé straße Łódź İstanbul",
    "Съешь же ещё этих мягких булок",
    "Ξεσκεπάζω την ψυχοφθόρα",
    "שלום עולם مرحبا بالعالم ۱۲۳",
    "नमस्ते दुनिया १२३ বাংলা தமிழ்",
    "สวัสดีชาวโลก ພາສາລາວ မြန်မာ ខ្មែរ",
    "한국어 텍스트 ㄱㄴㄷ 中文简体 繁體",
    "ქართული Հայերեն አማርኛ ᏣᎳᎩ ꦗꦮ",
)
"""Texts that tokenizers often lose or treat differently, in many scripts; part of every self-test."""


# ---- a SentencePiece model as a folder of transformers ----


def parse_model(model: bytes) -> Any:
    """The protocol buffer of a SentencePiece model. Raises ``ValueError`` if ``model`` is not one."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import time
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        raise ValueError(f"not a SentencePiece model: {error}") from None
    if not proto.pieces:
        raise ValueError("not a SentencePiece model: it has no pieces")
    return proto


def is_exact(proto: Any) -> bool:
    """Whether ``decode(encode(text)) == text`` for every text without a literal ``▁``, which decodes to a space."""
    normalizer = proto.normalizer_spec
    return bool(
        not normalizer.precompiled_charsmap
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and proto.trainer_spec.byte_fallback
        and not proto.trainer_spec.treat_whitespace_as_suffix
        and any(piece.piece == SPACE and piece.type == NORMAL for piece in proto.pieces)
    )


SCORE_STEPS = 64
"""Scores of the unigram models that lmcore trains are multiples of 1 / 64, which SentencePiece and transformers add exactly
(:mod:`lmcore.data.tokenizer.training`)."""
_INSIDE_NAMES = r"(?<=<)(?=(?:s|/s|unk|pad|0x[0-9A-F]{2})>)"


def cuts_inside_names(proto: Any) -> str | None:
    """For a unigram model that lmcore has trained: a regular expression of the places where a text is cut before it is
    encoded; ``None`` for other models.

    A literal ``</s>`` in a text is text. SentencePiece treats it so, but a unigram model in transformers matches the names
    of special pieces and bytes like any other piece. Cutting such a name in two prevents the match. Both libraries get
    the same cuts, so that the ids are the same.
    """
    if proto.trainer_spec.model_type != UNIGRAM or not is_exact(proto):
        return None
    if any((piece.score * SCORE_STEPS) % 1 for piece in proto.pieces if piece.type == NORMAL):
        return None
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    return None if any(re.search(_INSIDE_NAMES, symbol) for symbol in symbols) else _INSIDE_NAMES


def to_tokenizers(proto: Any) -> Tokenizer:
    """The same tokenizer in the ``tokenizers`` library. Raises ``ValueError`` for word models."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    # User-defined symbols are matched in text with their spaces, as they were given.
    pieces = [
        piece.piece.replace(SPACE, " ") if piece.type == USER_DEFINED else piece.piece
        for piece in proto.pieces
    ]
    if trainer.model_type == UNIGRAM:
        scored = [(name, piece.score) for name, piece in zip(pieces, proto.pieces)]
        model: Any = Unigram(scored, trainer.unk_id, trainer.byte_fallback)
    elif trainer.model_type in (_BPE, _CHAR):
        merges = _merges(proto) if trainer.model_type == _BPE else []
        model = BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise ValueError("SentencePiece word models have no equivalent in transformers")
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if (cuts := cuts_inside_names(proto)) is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cuts), behavior="isolated")
    back: list[Any] = [decoders.Replace(SPACE, " ")]
    if trainer.byte_fallback:
        back.append(decoders.ByteFallback())
    back.append(decoders.Fuse())
    if normalizer.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    # SentencePiece searches for user-defined symbols in the normalized text, where "▁" and a space are the same. If
    # normalization does more than that, it would change the symbols themselves.
    normalized = is_exact(proto)
    for name, piece in zip(pieces, proto.pieces):
        if piece.type in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True)])
        elif piece.type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(name, normalized=normalized, special=False)])
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to merge two pieces into a third, best score first, which is the order of SentencePiece's BPE."""
    usable = {p.piece: p.score for p in proto.pieces if p.type == NORMAL}
    found = []
    for piece, score in usable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                found.append((-score, cut, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def symbol_texts(proto: Any) -> list[str]:
    """Texts around each user-defined symbol: alone, in a word, between spaces, doubled, before the next one, truncated."""
    symbols = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type == USER_DEFINED]
    texts = []
    for symbol, following in zip(symbols, [*symbols[1:], *symbols[:1]]):
        texts += [symbol, f"a{symbol}b", f" {symbol} ", symbol * 2, symbol + following, f"日{symbol[:-1]}本"]
    return texts


def difference(
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    converted: Tokenizer,
    texts: Iterable[str],
) -> str | None:
    """A description of the first text for which a SentencePiece model and its conversion give different ids or decoded text;
    ``None`` if there is none."""
    converted.encode_special_tokens = True  # a literal "<s>" in a text is text, as in SentencePiece
    for text in texts:
        ids = encode(text)
        other = converted.encode(text, add_special_tokens=False).ids
        if ids != other:
            return f"{text[:200]!r} has the ids {ids[:40]} in SentencePiece and {other[:40]} in transformers"
        decoded, back = decode(ids), converted.decode(ids, skip_special_tokens=False)
        if decoded != back:
            return f"{text[:200]!r} decodes to {decoded[:200]!r} in SentencePiece and {back[:200]!r} in transformers"
    return None


def tokenizer_config(
    special_tokens: dict[str, str], *, model_max_length: int | None, add_prefix_space: bool
) -> bytes:
    """``tokenizer_config.json`` for a converted SentencePiece model.

    ``PreTrainedTokenizerFast`` is the only class that both transformers 4 and 5 load unchanged. With
    ``split_special_tokens`` a literal ``<s>`` in a text stays text. llama.cpp's converter reads ``add_prefix_space``.
    """
    fields: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "add_prefix_space": add_prefix_space,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        # transformers' own value for "unlimited"
        "model_max_length": model_max_length or int(1e30),
    }
    return as_json(fields)


def as_json(fields: Any) -> bytes:
    return (json.dumps(fields, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()


# ---- folders of transformers ----

MODEL_CONFIG = "config.json"
"""The model's config: it may determine the class of a tokenizer, but is never part of a tokenizer."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "spm_char.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "normalizer.json",
    "tekken.json",
    "tiktoken.model",
    "prophetnet.tokenizer",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
)
"""File names of transformers' tokenizer classes; a folder may need others, which :func:`complete` finds."""
_TEMPLATES = "additional_chat_templates"
_HUB_PATTERNS = (
    *TOKENIZER_FILES,
    MODEL_CONFIG,
    "*.model",
    "*.spm",
    "*.jinja",
    "*.tiktoken",
    f"{_TEMPLATES}/*.jinja",
)
_NEVER = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".npy",
    ".py", ".pyc", ".so", ".md", ".png", ".jpg", ".pdf", ".html", ".log", ".jsonl", ".yaml", ".tmp", ".lock",
)  # fmt: skip
"""Endings of files that are never part of a tokenizer: weights, code, documents."""
_LARGEST_FILE_BYTES = 2**28
_OTHER_VOCABULARIES = re.compile(r"tokenizer(\..*)?\.json|tekken\.json|\.model|\.tiktoken")
"""Vocabulary files that transformers looks for in addition to those that a class names."""


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that could be part of a tokenizer, by its path inside the folder."""
    found = {}
    for path in sorted([*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*.jinja")]):
        name = path.relative_to(folder).as_posix()
        ours = name.startswith(".") or path.suffix in _NEVER or name.endswith(".index.json")
        if not ours and path.is_file() and path.stat().st_size <= _LARGEST_FILE_BYTES:
            found[name] = path.read_bytes()
    return found


def is_bare_model(files: dict[str, bytes]) -> bool:
    """Whether a folder has no file, except perhaps SentencePiece models, that tells transformers how to read it."""
    others = [name for name in files if name in TOKENIZER_FILES and not name.endswith(".model")]
    return not others and "model_type" not in json_of(files, MODEL_CONFIG)


def json_of(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is no such file. Raises ``RequestError`` if it is damaged."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the tokenizer's {name} is not JSON ({error or 'too deep'})") from None
    if not isinstance(value, dict):
        raise RequestError(f"the tokenizer's {name} must be a JSON object, not {type(value).__name__}")
    return value


def complete(files: dict[str, bytes]) -> tuple[dict[str, bytes], Any]:
    """The files that give the same tokenizer as ``files`` in transformers, but without the model's config.json; and the
    tokenizer that transformers opens from them.

    Raises:
        RequestError: transformers cannot open them, or opens another tokenizer from the copy.
    """
    whole = open_files(files)
    wanted = fingerprint_of(whole, files)
    config = json_of(files, TOKENIZER_CONFIG)
    kind = type(whole).__name__
    if "chat_template" not in config and not any(name.endswith(".jinja") for name in files):
        # Training treats a literal "</s>" in a text as text, and so does transformers with this option. With a chat
        # template the special tokens in its output must be recognized.
        config.setdefault("split_special_tokens", True)
    named = _named_files(whole)
    needed = named - {TOKENIZER_CONFIG}
    if needed and not any(name in needed or _OTHER_VOCABULARIES.search(name) for name in files):
        # transformers would silently open an empty vocabulary.
        raise RequestError(
            f"a {kind} needs a vocabulary, and there is none of {', '.join(sorted(needed | {'tokenizer.json'}))}"
        )
    expected = [name for name in files if name in TOKENIZER_FILES or name in named or name.endswith(".jinja")]
    everything = [name for name in files if name != MODEL_CONFIG]
    for names in (expected, everything):
        for class_name in (config.get("tokenizer_class"), kind):
            if class_name in (None, "TokenizersBackend"):
                class_name = "PreTrainedTokenizerFast" if kind == "TokenizersBackend" else kind
            copy = {name: files[name] for name in names}
            copy[TOKENIZER_CONFIG] = as_json({**config, "tokenizer_class": class_name})
            try:
                opened = open_files(copy)
                if fingerprint_of(opened, copy) == wanted:
                    return copy, opened
            except RequestError:
                continue
    raise RequestError(
        f"the tokenizer ({kind}) needs more than the files in its folder ({', '.join(sorted(files))}): "
        f"save it with tokenizer.save_pretrained() of transformers and give that folder"
    )


def _named_files(tokenizer: Any) -> set[str]:
    """The files that the class of a tokenizer reads."""
    kinds = type(tokenizer).__mro__
    return {name for kind in kinds for name in getattr(kind, "vocab_files_names", {}).values()}


def open_files(files: dict[str, bytes]) -> Any:
    """The tokenizer that transformers' ``AutoTokenizer`` opens from ``files``; code in them is never run.

    Raises:
        RequestError: it cannot be opened; the message gives the reason in one line.
    """
    import transformers  # 1 s, and only where a transformers tokenizer is used

    json_of(files, TOKENIZER_CONFIG)
    if MODEL_CONFIG in files:
        # The sizes of the model do not matter here, and transformers might refuse them.
        config = json_of(files, MODEL_CONFIG)
        named = {key: config[key] for key in ("model_type", "model_name", "tokenizer_class") if key in config}
        files = {**files, MODEL_CONFIG: as_json(named)}
    with temporary_folder("lmcore-tokenizer-") as folder:
        for name, data in files.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # tokenizers raises Exception, and PanicException for some damage
            lines = str(error).replace(f"{folder}/", "").replace(folder, "the folder").strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            raise RequestError(f"transformers cannot open this tokenizer: {reason[:300]}") from error


def check_pieces(tokenizer: Any, vocab_size: int, files: dict[str, bytes]) -> None:
    """Refuse a tokenizer that transformers opened without the vocabulary in its folder.

    Raises:
        RequestError: a SentencePiece model in the folder has many more pieces.
    """
    for name, data in files.items():
        if name.endswith((".model", ".spm")):
            try:
                pieces = len(parse_model(data).pieces)
            except ValueError:
                continue  # a tiktoken file, or one for another program
            if vocab_size < 0.9 * pieces:
                raise RequestError(
                    f"transformers opens this folder as {type(tokenizer).__name__} with {vocab_size} pieces, but "
                    f"{name} has {pieces}: this class does not read that file; give {name} itself as tokenizer.path, "
                    f"or a folder with a tokenizer.json"
                )


def plain_backend(tokenizer: Any) -> Tokenizer | None:
    """A copy of the Rust backend that treats special tokens in a text as text; ``None`` for a Python tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def fingerprint_of(tokenizer: Any, files: dict[str, bytes], *, with_options: bool = True) -> str:
    """SHA-256 over what determines the ids of a transformers tokenizer, and nothing else: not the model's
    config.json, lengths, templates, or the formatting of its files.

    Args:
        with_options: false for the fingerprint of earlier versions, without the options of Python tokenizers.
    """
    roles = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    backend = plain_backend(tokenizer)
    if backend is not None:
        description = json.loads(backend.to_str())
        for name in ("version", "truncation", "padding", "post_processor"):
            description.pop(name, None)
        parts: Any = _without_defaults(description)
    else:
        names = _named_files(tokenizer) - {TOKENIZER_CONFIG, "tokenizer.json"}
        parts = {
            "class": type(tokenizer).__name__,
            "files": {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if n in names},
            "added": {str(i): str(t) for i, t in sorted(tokenizer.added_tokens_decoder.items())},
            "size": len(tokenizer),
        }
        if with_options and (options := _options(tokenizer)):
            parts["options"] = options
    return hashlib.sha256(json.dumps(["ids", roles, parts], sort_keys=True).encode()).hexdigest()


def _options(tokenizer: Any) -> dict[str, str]:
    """The options of a Python tokenizer that are not the default of its class (such as ``do_lower_case``).

    Its vocabulary files do not contain them, whereas a Rust tokenizer contains its whole description."""
    parameters = inspect.signature(type(tokenizer).__init__).parameters.values()
    return {
        one.name: repr(given)
        for one in parameters
        if one.default is not one.empty
        and not one.name.endswith(("_file", "_token", "_tokens", "max_length"))
        and (given := tokenizer.init_kwargs.get(one.name, one.default)) != one.default
    }


def _without_defaults(value: Any) -> Any:
    """Leave out fields that are null, false or empty: other versions of the library write more or fewer of them."""
    # No call for a number or a text: a vocabulary of 128,000 pieces with its merges has half a million.
    if isinstance(value, dict):
        kept = {
            k: _without_defaults(one) if isinstance(one, dict | list) else one for k, one in value.items()
        }
        return {key: one for key, one in kept.items() if one is not None and one is not False and one != ""}
    if isinstance(value, list):
        return [_without_defaults(one) if isinstance(one, dict | list) else one for one in value]
    return value


_FORMER_FILES = (
    *TOKENIZER_FILES[:5],
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
)


def former_fingerprints(files: dict[str, bytes]) -> tuple[str, ...]:
    """The fingerprints that version 0.1.0 computed for these files, with and without the model's config.json.

    Token stores and checkpoints of that version contain them."""
    found = []
    for names in ((*_FORMER_FILES, MODEL_CONFIG), _FORMER_FILES):
        for ignored in (("model_max_length", "tokenizer_class"), ("split_special_tokens",)):
            digest = hashlib.sha256(b"transformers")
            for name in sorted(set(names) & files.keys()):
                data = files[name]
                if name == TOKENIZER_CONFIG:
                    fields = json_of(files, name)
                    for key in ("model_max_length", "tokenizer_class", *ignored):
                        fields.pop(key, None)
                    data = json.dumps(fields, sort_keys=True).encode()
                digest.update(f"\0{name}\0{len(data)}\0".encode() + data)
            found.append(digest.hexdigest())
    return tuple(dict.fromkeys(found))


def byte_lengths(tokenizer: Any, backend: Tokenizer | None, vocab_size: int) -> np.ndarray | None:
    """(V,) int32: the number of UTF-8 bytes of each id of a byte-level tokenizer (GPT-2 and similar ones), which represents
    each byte by one character; ``None`` for any other tokenizer."""
    if backend is None:
        return None
    description = json.loads(backend.to_str())
    if description.get("normalizer") or '"ByteLevel"' not in json.dumps(description.get("decoder")):
        return None
    if '"add_prefix_space": true' in json.dumps(description.get("pre_tokenizer")):
        return None
    lengths = np.zeros(vocab_size, dtype=np.int32)
    added = {token["id"]: token for token in description["added_tokens"]}
    for piece, number in tokenizer.get_vocab().items():
        token = added.get(number)
        lengths[number] = len(piece) if token is None else 0 if token["special"] else len(piece.encode())
    return lengths


def download(name: str, revision: str | None) -> tuple[Path, str]:
    """Download a tokenizer from the Hub. Returns its folder in the cache, and the commit that ``revision`` resolves to.

    Raises:
        RequestError: it does not exist, or the Hub cannot be reached.
    """
    import huggingface_hub  # imported only if the Hub is used

    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_HUB_PATTERNS))
        )
    except Exception as error:  # by version its own, requests', httpx' or OS errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(f"no tokenizer {name!r} here, and none from the Hub: {reason}") from error
    return folder, folder.name


def stale_files(folder: Path, kept: Sequence[str]) -> Iterator[Path]:
    """Files of another tokenizer in ``folder``, which transformers would mix with the files ``kept``."""
    for path in folder.iterdir() if folder.is_dir() else ():
        is_one = path.name in TOKENIZER_FILES or path.suffix in (".model", ".spm", ".tiktoken")
        if is_one and path.name not in kept and not path.is_dir():
            yield path
