"""Token files of other programs, as token stores.

The files are read in place; nothing is copied or converted. Every token that is read is checked against the
vocabulary, because it is not known which tokenizer produced it.

===========  ======================================================================================
nanoGPT      ``.bin``: uint16, nothing else (uint32 where the vocabulary is larger than 65,536)
llm.c        ``.bin`` with a header of 256 int32: magic 20240520 (uint16) or 20240801 (uint32)
Megatron     ``.bin`` beside ``.idx`` (MMIDIDX, version 1): document ends from the index
datatrove    ``.ds`` beside ``.ds.index`` (uint64 document ends); the width follows from both
OLMo, numpy  ``.npy``: plain tokens as for nanoGPT, or a one-dimensional numpy array
lmcore       the ``.bin`` files of a token store, all together
===========  ======================================================================================

If a format has no document ends, documents end at the tokenizer's end-of-document token.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence

import numpy as np

from lmcore.data.store.manifest import MANIFEST
from lmcore.data.store.samples import sample_of
from lmcore.data.store.store import Piece, TokenStore
from lmcore.data.text.sources import FOREIGN_SUFFIXES
from lmcore.errors import RequestError

_LLMC = {20240520: "<u2", 20240801: "<u4"}
_LLMC_HEADER_BYTES = 1024
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "|u1", 4: "<i4", 5: "<i8", 8: "<u2"}
_NUMPY_MAGIC = b"\x93NUMPY"


def are_tokens(paths: Sequence[str]) -> bool:
    """Whether these are files of tokens.

    Raises:
        RequestError: only some of them are.
    """
    found = [path.endswith(FOREIGN_SUFFIXES) for path in paths]
    if any(found) and not all(found):
        raise RequestError(
            f"{paths[found.index(True)]} is a file of tokens and {paths[found.index(False)]} is text: make two sources"
        )
    return any(found)


def open_files(
    name: str,
    paths: Sequence[str],
    relative_paths: Sequence[str],
    *,
    vocab_size: int,
    eos_id: int | None,
    tokenizer_fingerprints: Sequence[str] = (),
    note: Callable[[str], None] | None = None,
) -> TokenStore:
    """One store over all the files, in order.

    Args:
        vocab_size: vocabulary size of the run's tokenizer, which must be the one that produced the tokens: larger ids raise
            an error when they are read.
        eos_id: the token that ends a document, for formats without document ends.
        tokenizer_fingerprints: fingerprints of the run's tokenizer, the present one first; a store of lmcore records which
            tokenizer built it.
        note: called with one line if comparing a store of lmcore with its hashes takes long.

    Raises:
        RequestError: an unknown format, a damaged file, tokens of different widths, or another tokenizer.
    """
    if os.path.exists(os.path.join(os.path.dirname(paths[0]), MANIFEST)):
        store = TokenStore.open(os.path.dirname(paths[0]))
        made_by = store.manifest["identity"]["tokenizer"]
        if made_by not in tokenizer_fingerprints:
            this = tokenizer_fingerprints[0] if tokenizer_fingerprints else "not known"
            raise RequestError(
                f"{store.folder} was made with the tokenizer {made_by[:16]}, this one is {this[:16]}: give the "
                f"tokenizer that made it with tokenizer.path"
            )
        store.verify(vocab_size=vocab_size, note=note)
        return store
    pieces, dtypes, samples = [], {}, []
    for path, relative in zip(paths, relative_paths or paths):
        if path.endswith(".idx") and f"{path[:-4]}.bin" in paths:
            continue
        if path.endswith(".index") and path.removesuffix(".index") in paths:
            continue
        piece, dtype = _open(path, vocab_size)
        pieces.append(piece)
        dtypes[dtype] = piece.path
        samples.append([relative, *sample_of(piece.path)])
    if len(dtypes) > 1:
        raise RequestError(
            f"source {name!r} mixes tokens of different widths ({dtypes}): make a source of each"
        )
    if not sum(piece.n_tokens for piece in pieces):
        raise RequestError(f"source {name!r} holds no tokens")
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()[:32]
    return TokenStore(
        name=name,
        fingerprint=digest,
        dtype=next(iter(dtypes)),
        pieces=pieces,
        eos_id=eos_id,
        vocab_size=vocab_size,
    )


def _open(path: str, vocab_size: int) -> tuple[Piece, str]:
    """(the piece, its dtype) of one file."""
    if path.endswith((".idx", ".index")):
        path = path[:-4] + ".bin" if path.endswith(".idx") else path.removesuffix(".index")
    if not os.path.exists(path):
        raise RequestError(f"{path} is missing: an index alone holds no tokens")
    index = f"{path[:-4]}.idx"
    if path.endswith(".bin") and os.path.exists(index):
        return _megatron(path, index)
    if path.endswith(".ds"):
        return _datatrove(path)
    with open(path, "rb") as file:
        head = file.read(_LLMC_HEADER_BYTES)
    if head[:6] == _NUMPY_MAGIC:
        return _numpy(path)
    if len(head) == _LLMC_HEADER_BYTES:
        magic, _, count = np.frombuffer(head, dtype="<i4", count=3).tolist()
        if magic in _LLMC:
            held = (os.path.getsize(path) - _LLMC_HEADER_BYTES) // np.dtype(_LLMC[magic]).itemsize
            if not 0 <= count <= held:
                raise RequestError(
                    f"{path}: its header says {count} tokens, but the file holds {held}: it is damaged"
                )
            return Piece(path=path, n_tokens=count, offset_bytes=_LLMC_HEADER_BYTES), _LLMC[magic]
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    return Piece(path=path, n_tokens=_count(path, np.dtype(dtype).itemsize)), dtype


def _count(path: str, width: int) -> int:
    size = os.path.getsize(path)
    if size % width:
        raise RequestError(f"{path} has {size} bytes, which is not a whole number of {width}-byte tokens")
    return size // width


def _numpy(path: str) -> tuple[Piece, str]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError, OverflowError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RequestError(f"{path} is not a numpy array of integers ({reason[0][:200]})") from error
    if (
        not isinstance(array, np.memmap)
        or array.ndim != 1
        or array.dtype.str not in ("|u1", "<u2", "<u4", "<i4", "<i8")
    ):
        raise RequestError(
            f"{path} is an array {array.shape} of {array.dtype}: one row of integers is needed"
        )
    return Piece(path=path, n_tokens=len(array), offset_bytes=array.offset), array.dtype.str


def _datatrove(path: str) -> tuple[Piece, str]:
    index = f"{path}.index"
    if not os.path.exists(index):
        raise RequestError(f"{path} has no {index} beside it")
    n_ends = _count(index, 8)
    total = int(np.memmap(index, dtype="<u8", mode="r")[-1]) if n_ends else 0
    size = os.path.getsize(path)
    width = size // max(total, 1)
    if width not in (2, 4) or width * total != size:
        raise RequestError(
            f"{path} has {size} bytes for the {total} tokens of its index: one of them is damaged"
        )
    piece = Piece(path=path, n_tokens=total, ends=index, ends_dtype="<u8", n_ends=n_ends)
    return piece, f"<u{width}"


def _megatron(path: str, index: str) -> tuple[Piece, str]:
    head = len(_MEGATRON_MAGIC) + 8 + 1 + 8 + 8
    with open(index, "rb") as file:
        data = file.read(head)
    if len(data) < head or not data.startswith(_MEGATRON_MAGIC):
        raise RequestError(f"{index} is not a Megatron index (MMIDIDX), and so {path} cannot be read")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", data, len(_MEGATRON_MAGIC))
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise RequestError(
            f"{index}: version {version}, type {code} is not known (version 1, types 1, 4, 5, 8 are)"
        )
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    if os.path.getsize(index) < head + 12 * sequences + 8 * documents:
        raise RequestError(f"{index} is shorter than its header says: it is damaged")
    if not sequences:
        return Piece(path=path, n_tokens=0), dtype.str
    lengths = np.memmap(index, dtype="<i4", mode="r", offset=head, shape=(sequences,))
    if int(lengths.min()) < 0:
        raise RequestError(f"{index} holds a sequence of {int(lengths.min())} tokens: it is damaged")
    tokens = int(lengths.sum(dtype=np.int64))
    if os.path.getsize(path) < tokens * dtype.itemsize:
        raise RequestError(
            f"{path} has {os.path.getsize(path)} bytes for the {tokens} tokens of its index: one of them is damaged"
        )
    pointers = head + 4 * sequences
    last = int(np.memmap(index, dtype="<i8", mode="r", offset=pointers, shape=(sequences,))[-1])
    if last + int(lengths[-1]) * dtype.itemsize != tokens * dtype.itemsize:
        raise RequestError(f"{index}: its sequences do not lie one after another in {path}")
    # Otherwise a document consists of several sequences, and ends at EOS
    one_each = documents == sequences + 1
    piece = Piece(
        path=path,
        n_tokens=tokens,
        ends=index if one_each else None,
        ends_dtype="<i8",
        ends_offset_bytes=pointers,  # byte offsets at which sequences begin: there the one before ends
        ends_scale=dtype.itemsize,
        n_ends=sequences,
    )
    return piece, dtype.str
