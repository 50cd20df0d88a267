"""A SentencePiece model -> the files that ``transformers.AutoTokenizer`` (version 4 and 5) opens with the
same ids.

Comes in: the bytes of a ``.model``. Goes out: ``tokenizer.json`` and ``tokenizer_config.json``. What always
holds: the folder is built from the model's own normalizer settings (transformers' own conversion ignores the
dummy prefix and the removal of spaces), and :func:`difference` proves it on text before anyone uses it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Piece types of sentencepiece_model.proto."""
UNIGRAM, _BPE, _CHAR = 1, 2, 4
"""Model types of sentencepiece_model.proto."""

HARD_TEXTS = (
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
)
"""What tokenizers usually lose or treat differently: the self-test always contains it."""


def parse(model: bytes) -> Any:
    """The protocol buffer of a model; raises ValueError if it is none."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import time
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        raise ValueError(f"not a SentencePiece model: {error}") from None
    if not proto.pieces:
        raise ValueError("not a SentencePiece model: it has no pieces")
    return proto


def is_exact(proto: Any) -> bool:
    """Does ``decode(encode(text)) == text`` hold for any text (but for a literal ``▁``, which decodes to a
    space)?"""
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


def convert(proto: Any) -> Tokenizer:
    """The same tokenizer in the ``tokenizers`` library. Raises ValueError for word models."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [piece.piece for piece in proto.pieces]
    if trainer.model_type == UNIGRAM:
        model: Any = Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces], trainer.unk_id, trainer.byte_fallback
        )
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
    back: list[Any] = [decoders.Replace(SPACE, " ")]
    if trainer.byte_fallback:
        back.append(decoders.ByteFallback())
    back.append(decoders.Fuse())
    if normalizer.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    for piece in proto.pieces:
        if piece.type in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, best score first: what SentencePiece's BPE does by
    score."""
    usable = {p.piece: p.score for p in proto.pieces if p.type == NORMAL}
    found = []
    for piece, score in usable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                found.append((-score, cut, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def difference(
    native: sentencepiece.SentencePieceProcessor, wrapped: Tokenizer, texts: Iterable[str]
) -> str | None:
    """The first text on which the two disagree in ids or in decoded text, described; ``None`` if there is
    none."""
    wrapped.encode_special_tokens = True  # like the native one, a literal "<s>" in a text is text
    for text in texts:
        ids = native.encode(text)
        other = wrapped.encode(text, add_special_tokens=False).ids
        if ids != other:
            return f"{text[:200]!r} is {ids[:40]} natively and {other[:40]} in transformers"
        decoded, back = native.decode(ids), wrapped.decode(ids, skip_special_tokens=False)
        if decoded != back:
            return f"{text[:200]!r} comes back as {decoded[:200]!r} and, in transformers, {back[:200]!r}"
    return None


def config(special_tokens: dict[str, str], *, model_max_length: int | None, add_prefix_space: bool) -> str:
    """``tokenizer_config.json``.

    ``PreTrainedTokenizerFast`` is the one class that both major versions load unchanged;
    ``split_special_tokens`` keeps a literal ``<s>`` in a text what it is; ``add_prefix_space`` is read by
    llama.cpp's converter.
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
        # transformers' own word for "not limited"
        "model_max_length": model_max_length or int(1e30),
    }
    return json.dumps(fields, ensure_ascii=False, indent=2) + "\n"
