"""The tokens of one source as one long array, which may consist of pieces in several files.

The pieces are memory-mapped, not loaded; a read may cross them; memory does not grow with the number of tokens or blocks.

Example::

    store = TokenStore.open("token_stores/wiki-1f0c...")
    store.read(0, 1025)                       # (1025,) uint16 or uint32
    store.document_ends(0, 1025)              # ends e with 0 < e <= 1025; the next document begins at e
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from lmcore.data.store import verification
from lmcore.data.store.manifest import MANIFEST, read_manifest
from lmcore.errors import FaultError, RequestError

__all__ = ["MANIFEST", "Piece", "TokenStore"]

_OPEN_FILES = 4096  # the kernel allows 65,530 mappings for each process


@final
@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive whole documents in one file: ``n_tokens`` of the store's dtype from byte ``offset_bytes`` on.

    ``ends`` is the file with the document ends, ascending, counted from the start of the piece in units of ``1 /
    ends_scale`` tokens (``ends_dtype``, ``n_ends`` of them from byte ``ends_offset_bytes`` on); the last
    end may be missing. Without it the ends are found by the end-of-document token.
    """

    path: str
    n_tokens: int
    offset_bytes: int = 0
    ends: str | None = None
    ends_dtype: str = "<u4"
    ends_offset_bytes: int = 0
    ends_scale: int = 1
    n_ends: int = 0


@final
class TokenStore:
    """The N tokens of one source, in order, each document followed by its end-of-document token if it has one.

    :func:`lmcore.data.store.build.build_store` builds or opens a store, :meth:`open` opens a finished one.

    Args:
        name: name of the source, as it appears in the metrics.
        fingerprint: hex digits that change whenever any token may have changed.
        dtype: ``uint16`` or ``uint32`` (token files of other programs may have others).
        pieces: in order.
        n_documents, n_bytes: number of documents and of their UTF-8 bytes; ``None`` if another program's format does not
            say.
        bad_records: number of records that were skipped when the store was built.
        eos_id: the token that ends a document in pieces without document ends.
        vocab_size: if given, every token that is read is checked; for files of other programs.
        folder: folder of the manifest, if there is one.

    Raises:
        RequestError: a file is missing or too short.
    """

    def __init__(
        self,
        *,
        name: str,
        fingerprint: str,
        dtype: str,
        pieces: list[Piece],
        n_documents: int | None = None,
        n_bytes: int | None = None,
        bad_records: int = 0,
        eos_id: int | None = None,
        vocab_size: int | None = None,
        folder: Path | None = None,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.dtype = np.dtype(dtype)
        self.n_documents = n_documents
        self.n_bytes = n_bytes
        self.bad_records = bad_records
        self.folder = folder
        self.manifest = manifest or {}
        self._eos_id = eos_id
        self._vocab_size = vocab_size
        self._pieces = [piece for piece in pieces if piece.n_tokens]
        self._starts = np.cumsum([0] + [piece.n_tokens for piece in self._pieces])
        self.n_tokens = int(self._starts[-1])
        self._arrays: OrderedDict[int, np.ndarray] = OrderedDict()  # piece: its tokens; ~piece: its ends
        self._alarm: Path | None = None  # appears if the comparison in the background finds damage
        again = f"remove {folder}, and it is built again" if folder else "get the file again"
        for piece in self._pieces:
            size = Path(piece.path).stat().st_size if Path(piece.path).exists() else -1
            if size < piece.offset_bytes + piece.n_tokens * self.dtype.itemsize:
                raise RequestError(
                    f"{piece.path} {'is missing' if size < 0 else f'has only {size} bytes'}, but "
                    f"{piece.n_tokens} tokens are expected: {again}"
                )

    @staticmethod
    def open(folder: str | Path) -> TokenStore:
        """Open the finished store in ``folder``, without comparing its tokens with their hashes (see :meth:`verify`).

        Raises:
            RequestError: the store does not exist, is unfinished, damaged or of another version, or a file is missing.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        pieces = [
            Piece(
                path=str(folder / f"{part['file']}.bin"),
                n_tokens=part["tokens"],
                ends=str(folder / f"{part['file']}.ends"),
                ends_dtype=part["ends_dtype"],
                n_ends=part["documents"],
            )
            for part in manifest["parts"]
        ]
        return TokenStore(
            name=manifest["name"],
            fingerprint=manifest["fingerprint"],
            dtype=manifest["dtype"],
            pieces=pieces,
            n_documents=manifest["documents"],
            n_bytes=manifest["bytes"],
            bad_records=manifest["bad"],
            folder=folder,
            manifest=manifest,
        )

    def __len__(self) -> int:
        return self.n_tokens

    def n_blocks(self, block_size: int) -> int:
        """The number of blocks of ``block_size`` inputs and as many next-token labels; the rest is the tail."""
        return max(self.n_tokens - 1, 0) // block_size

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) tokens from ``start`` on, as a copy.

        Raises:
            IndexError: the range is outside of the store.
        """
        out = np.empty((1, count), dtype=self.dtype)
        self.gather(np.array([start]), out)
        return out[0]

    def gather(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill row i of ``out`` (B, count) with the tokens from ``starts[i]`` on; ``starts`` is (B,)."""
        count = out.shape[1]
        if self._alarm is not None and self._alarm.exists():
            raise FaultError(self._alarm.read_text())
        if starts.size and (starts.min() < 0 or int(starts.max()) + count > self.n_tokens):
            raise IndexError(
                f"tokens [{starts.min()}, {starts.max() + count}) of {self.n_tokens} in {self.name}"
            )
        pieces = np.searchsorted(self._starts, starts, side="right") - 1
        offsets = starts - self._starts[pieces]
        for row, (piece, offset) in enumerate(zip(pieces.tolist(), offsets.tolist())):
            tokens = self._tokens(piece)
            if offset + count <= len(tokens):
                out[row] = tokens[offset : offset + count]
                continue
            filled = 0
            while filled < count:
                run = self._tokens(piece)[offset : offset + count - filled]
                out[row, filled : filled + len(run)] = run
                filled, piece, offset = filled + len(run), piece + 1, 0
        limit = self._vocab_size
        if limit is not None and out.size and (int(out.max()) >= limit or int(out.min()) < 0):
            row, column = (index[0] for index in np.nonzero((out < 0) | (out >= limit)))
            raise FaultError(
                f"token {out[row, column]} in {self.name}, between tokens {starts[row]} and {starts[row] + count}, "
                f"but the tokenizer has the ids 0 to {limit - 1}: these files were made with another tokenizer"
            )

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """(E,) int64: the ends e of documents with ``start < e <= stop``, ascending; e is exclusive."""
        found = []
        piece = int(np.searchsorted(self._starts, start, side="right")) - 1
        # An end on the boundary of two pieces belongs to the first of them.
        piece = max(piece - (start == self._starts[piece]), 0)
        while piece < len(self._pieces) and self._starts[piece] < stop:
            first = int(self._starts[piece])
            here = self._pieces[piece]
            if here.ends is not None:
                ends = self._arrays.get(~piece)
                if ends is None:
                    ends = self._map(~piece, here.ends, here.ends_dtype, here.ends_offset_bytes, here.n_ends)
                low, high = np.searchsorted(
                    ends, here.ends_scale * np.array([start - first, stop - first]).clip(0), side="right"
                )
                found.append(ends[low:high].astype(np.int64) // here.ends_scale + first)
            elif self._eos_id is not None:
                low, high = max(start - first, 0), min(stop - first, here.n_tokens)
                found.append(
                    np.flatnonzero(self._tokens(piece)[low:high] == self._eos_id) + (first + low + 1)
                )
            found.append(np.array([first + here.n_tokens]))
            piece += 1
        ends = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
        return ends[(ends > start) & (ends <= stop)]

    def verify(self, *, vocab_size: int | None = None, note: Callable[[str], None] | None = None) -> None:
        """Compare every file with its hash in the manifest, unless this machine has done so since the file last changed
        (:mod:`lmcore.data.store.verification`).

        Args:
            vocab_size: every id must be below this; ``None``: not checked.
            note: called with one line if the comparison takes long.

        Raises:
            FaultError: a file differs from what was built, or holds ids beyond the vocabulary.
        """
        if self.folder is not None:
            parts = self.manifest.get("parts", [])
            self._alarm = verification.verify(
                self.folder, parts, self.dtype.str, vocab_size=vocab_size, note=note
            )

    def _tokens(self, piece: int) -> np.ndarray:
        array = self._arrays.get(piece)
        if array is None:
            here = self._pieces[piece]
            array = self._map(piece, here.path, self.dtype.str, here.offset_bytes, here.n_tokens)
        return array

    def _map(self, key: int, path: str, dtype: str, offset: int, count: int) -> np.ndarray:
        if count == 0:
            return np.zeros(0, dtype=dtype)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Not np.memmap, whose slices cost several times as much as those of a plain array.
        array = self._arrays[key] = np.frombuffer(mapped, dtype=dtype, count=count, offset=offset)
        if len(self._arrays) > _OPEN_FILES:
            self._arrays.popitem(last=False)
        return array

    def __getstate__(self) -> dict[str, Any]:
        # Memory mappings cannot be pickled; the other process opens its own.
        return {**self.__dict__, "_arrays": OrderedDict()}
