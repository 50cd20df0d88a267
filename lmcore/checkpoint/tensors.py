"""Tensors as safetensors files: written as a stream, read through the library's memory map.

:func:`plan` lays out all files of a writer before the first byte is written. A file holds tensors of one kind
(``model``, ``optim``, ``ema``) and one element size, so that each tensor starts at a multiple of its element size.
:func:`write_planned` then writes the tensors one at a time in that order and hashes every byte as it writes it; the
safetensors library would need all tensors of a file at once. :class:`TensorFile` reads a file.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmcore.disk import CHUNK_BYTES, Disk
from lmcore.humanize import message_of

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors name -> torch dtype; a checkpoint has no other dtypes."""
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

Layout = Sequence[tuple[str, str, str | None, Sequence[int], torch.dtype]]
"""(kind, name, slot, shape, dtype) of every tensor, in the order in which they are written."""


def key_of(name: str, slot: str | None) -> str:
    """The name of a tensor in a file: ``wte.weight``, or with a slot ``wte.weight/exp_avg``."""
    return f"{name}/{slot}" if slot else name


@final
@dataclass(frozen=True, kw_only=True)
class Planned:
    """Where one tensor will be written: ``start`` and ``stop`` are byte offsets after the header of ``file``."""

    kind: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    stop: int


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """All files of a save: the entries in the order in which they are written, and header and data size of each file."""

    entries: tuple[Planned, ...]
    headers: Mapping[str, bytes]
    data_bytes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.data_bytes.values()) + sum(map(len, self.headers.values()))


def plan(layout: Layout, *, shard_bytes: int, writer: int | None = None) -> Plan:
    """Lay out the files of a save, or those of one of its writers.

    Args:
        layout: all tensors (or the parts of this writer), in the order in which they will be written.
        shard_bytes: a file that would grow beyond this is split.
        writer: the rank, if several ranks write; it becomes part of the file names.

    Raises:
        ValueError: two tensors of the same name, a dtype that safetensors does not have, or a kind that cannot be
            part of a file name.
    """
    groups: dict[tuple[str, int], list[list[Any]]] = {}
    fill: dict[tuple[str, int], int] = {}
    placed: list[tuple[tuple[str, int], int, Any]] = []
    for kind, name, slot, shape, dtype in layout:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):
            raise ValueError(f"kind {kind!r} cannot be part of a file name")
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: {dtype} cannot be stored in a safetensors file")
        group = (kind, dtype.itemsize)
        size = math.prod(shape) * dtype.itemsize
        shards = groups.setdefault(group, [[]])
        if shards[-1] and fill.get(group, 0) + size > shard_bytes:
            shards.append([])
            fill[group] = 0
        start = fill.get(group, 0)
        fill[group] = start + size
        item = (kind, key_of(name, slot), tuple(shape), dtype, start, start + size)
        shards[-1].append(item)
        placed.append((group, len(shards) - 1, item))

    names: dict[tuple[tuple[str, int], int], str] = {}
    for kind in {group[0] for group in groups}:
        of_kind = [(group, i) for group in groups if group[0] == kind for i in range(len(groups[group]))]
        for number, where in enumerate(of_kind, 1):
            suffix = "" if len(of_kind) == 1 else f"-{number:05d}-of-{len(of_kind):05d}"
            label = "" if writer is None else f"-r{writer:05d}"
            names[where] = f"{kind}{label}{suffix}.safetensors"

    entries = [
        Planned(kind=k, key=key, shape=shape, dtype=dtype, file=names[group, shard], start=start, stop=stop)
        for group, shard, (k, key, shape, dtype, start, stop) in placed
    ]
    if len({(e.kind, e.key) for e in entries}) != len(entries):
        raise ValueError("two tensors of one name in the layout of a checkpoint")
    headers: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    for entry in entries:
        headers.setdefault(entry.file, {"__metadata__": {"format": "pt"}})[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
        sizes[entry.file] = entry.stop
    return Plan(
        entries=tuple(entries),
        headers={file: _header(content) for file, content in headers.items()},
        data_bytes=sizes,
    )


def _header(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format requires that the data starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as a flat uint8 tensor (bytes,) on its device; no copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


SEGMENT_BYTES: Final = 32 << 20
"""While a file is being written, the kernel is told to start writing back each time this many bytes have accumulated."""


@final
class HashedFile:
    """A file being written and hashed at the same time."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._file = disk.create(path)
        self._hash = hashlib.sha256()
        self._begun = 0
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            piece = view[start : start + CHUNK_BYTES]
            self._hash.update(piece)  # like the write, this releases the GIL, so that training continues
            self._disk.write(self._file, piece)
            self.size_bytes += len(piece)
            # So that the disk writes while the next bytes are hashed.
            if self.size_bytes - self._begun >= SEGMENT_BYTES:
                self._disk.start_writing(self._file, self._begun, self.size_bytes - self._begun)
                self._begun = self.size_bytes

    def finish(self) -> dict[str, Any]:
        """Make the file durable and return its entry in the manifest."""
        self._disk.fsync(self._file)
        return {"bytes": self.size_bytes, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        self._disk.close(self._file)


def write_planned(
    disk: Disk,
    folder: Path,
    plan: Plan,
    tensors: Iterable[Tensor],
    *,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Write all files of a plan.

    Args:
        tensors: in the order of ``plan.entries``.
        progress: called after each tensor.

    Returns:
        Entries of the manifest (``bytes``, ``sha256``) by file name.
    """
    open_files: dict[str, HashedFile] = {}
    try:
        for entry, tensor in zip(plan.entries, tensors, strict=True):
            file = open_files.get(entry.file)
            if file is None:
                file = open_files[entry.file] = HashedFile(disk, folder / entry.file)
                file.write(plan.headers[entry.file])
            file.write(raw(tensor).cpu().numpy().data)
            progress()
        return {name: file.finish() for name, file in open_files.items()}
    finally:
        for file in open_files.values():
            file.close()


@final
class TensorFile:
    """A safetensors file for reading, through a private memory map. It does not check the file's hash.

    Raises:
        ValueError: the file is not a safetensors file, or has a tensor of an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, framework="pt")
            self._found = {name: self._checked(name) for name in self._file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(message_of(error) or type(error).__name__) from None

    def _checked(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        part = self._file.get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise ValueError(f"{name}: unknown dtype {part.get_dtype()}")
        return tuple(part.get_shape()), DTYPES[part.get_dtype()]

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._found)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._found[key][0]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor, without reading it."""
        return self._found[key][1]

    def get(self, key: str) -> Tensor:
        """A tensor as a view of the memory map: copy it if it must outlive the file."""
        return self._file.get_tensor(key)
