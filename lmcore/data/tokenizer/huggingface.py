"""Tokenizers of transformers: a folder's files or the Hub -> the tokenizer, unchanged.

Comes in: files, or a Hub id. Goes out: what ``AutoTokenizer`` makes of them. What always holds: no code of a
stranger is run; nothing is downloaded that was not asked for by name.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lmcore.errors import RequestError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
)


def open_transformers(files: dict[str, bytes]) -> Any:
    import transformers  # 1 s, and only where a transformers tokenizer is used

    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RequestError(f"transformers cannot open this tokenizer: {reason}") from error


def as_plain_text(tokenizer: Any) -> Any:
    """A copy of the fast backend that takes a special token in a text for text; ``None`` for a slow
    tokenizer."""
    from tokenizers import Tokenizer as Fast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = Fast.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def without_length(name: str, data: bytes) -> bytes:
    """The length limit does not change any id: it must not change the fingerprint."""
    if name != "tokenizer_config.json":
        return data
    fields = json.loads(data)
    fields.pop("model_max_length", None)
    fields.pop("tokenizer_class", None)
    return json.dumps(fields, sort_keys=True).encode()


def byte_level_lengths(tokenizer: Any, fast: Any, vocab_size: int) -> np.ndarray | None:
    """Byte-level tokenizers (GPT-2 and its kin) write each byte as one character."""
    if fast is None:
        return None
    description = json.loads(fast.to_str())
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


def from_hub(name: str, revision: str | None) -> tuple[dict[str, bytes], str]:
    """The files of a tokenizer on the Hub, and the commit that ``revision`` stands for (also in their cache)."""
    import huggingface_hub  # only where the Hub is asked

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[*TOKENIZER_FILES, "config.json"]
        )
    except (
        Exception
    ) as error:  # the client raises its own, requests', httpx' and OS errors, which differ by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(f"no tokenizer {name!r} here, and none from the Hub: {reason}") from error
    files = {
        n: Path(folder, n).read_bytes()
        for n in (*TOKENIZER_FILES, "config.json")
        if Path(folder, n).is_file()
    }
    if not files.keys() - {"config.json"}:
        raise RequestError(f"{name} on the Hub has no tokenizer files")
    return files, Path(folder).name
