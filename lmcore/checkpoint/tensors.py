"""safetensors files, written as a stream and read through a memory map; the private half of
``checkpoint.py``.

Comes in: a layout (kind, name, slot, shape, dtype) and tensors in that order. Goes out: files that the
safetensors library opens, and tensors by name. What always holds: a file is an 8-byte little-endian header
length, a JSON header and the raw bytes, nothing else; all tensors of one file have elements of one size, so
that each starts at a multiple of it; a header from disk is believed only after every number in it has been
checked against the size of the file.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from lmcore.disk import CHUNK_BYTES, Disk

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
"""safetensors name -> torch dtype; what is not here cannot be in a checkpoint."""
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES: Final = 100_000_000
"""The limit of the safetensors library."""

Layout = Sequence[tuple[str, str, str | None, Sequence[int], torch.dtype]]
"""(kind, name, slot, shape, dtype) of every tensor, in the order in which they come."""


def key_of(name: str, slot: str | None) -> str:
    """The tensor's name in a file: ``wte.weight``, or with a slot ``wte.weight/exp_avg``."""
    return f"{name}/{slot}" if slot else name


@final
@dataclass(frozen=True, kw_only=True)
class Planned:
    """Where one tensor will lie: ``start`` and ``stop`` are bytes after the header of ``file``."""

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
    """All files of a save, known before the first byte is written: entries in order, and header + data
    sizes.
    """

    entries: tuple[Planned, ...]
    headers: Mapping[str, bytes]
    data_bytes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.data_bytes.values()) + sum(map(len, self.headers.values()))


def plan(layout: Layout, *, shard_bytes: int) -> Plan:
    """Lay out the files. A file holds one kind and one element size, and about ``shard_bytes`` at most."""
    groups: dict[tuple[str, int], list[list[Any]]] = {}
    fill: dict[tuple[str, int], int] = {}
    placed: list[tuple[tuple[str, int], int, Any]] = []
    for kind, name, slot, shape, dtype in layout:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):
            raise ValueError(f"kind {kind!r} is no part of a file name")
        if dtype not in _NAMES:
            raise ValueError(f"{name}: {dtype} has no place in a safetensors file")
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
            names[where] = f"{kind}{suffix}.safetensors"

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
            "dtype": _NAMES[entry.dtype],
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
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, as the format asks
    return struct.pack("<Q", len(text)) + text


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as a flat uint8 tensor on its device; no copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@final
class HashedFile:
    """A file being written: every byte passes the hash on its way to the disk, so none is read twice."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._file = disk.create(path)
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            piece = view[start : start + CHUNK_BYTES]
            self._hash.update(piece)  # releases the interpreter, like the write: training goes on beside it
            self._disk.write(self._file, piece)
            self.size_bytes += len(piece)

    def finish(self) -> dict[str, Any]:
        """Make it durable; its entry in the manifest."""
        self._disk.fsync(self._file)
        return {"bytes": self.size_bytes, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        self._disk.close(self._file)


def in_order(
    planned: Plan, tensors: Iterator[tuple[str, str, str | None, Tensor | None]]
) -> Iterator[Tensor]:
    """The tensors alone, each compared with what was announced. ``ValueError`` for a layout that lied."""
    expected = iter(planned.entries)
    for kind, name, slot, tensor in tensors:
        entry = next(expected, None)
        if entry is None or (entry.kind, entry.key) != (kind, key_of(name, slot)):
            raise ValueError(f"{kind} {key_of(name, slot)} came where the layout has {entry and entry.key}")
        if tensor is None or tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise ValueError(f"{entry.key}: the layout says {entry.dtype} {entry.shape}, another tensor came")
        yield tensor
    if (rest := next(expected, None)) is not None:
        raise ValueError(f"{rest.key} did not come")


def write_planned(
    disk: Disk, folder: Path, plan: Plan, tensors: Iterable[Tensor]
) -> dict[str, dict[str, Any]]:
    """Write all files of a plan from tensors that come in its order; manifest entries by file name."""
    open_files: dict[str, HashedFile] = {}
    try:
        for entry, tensor in zip(plan.entries, tensors, strict=True):
            file = open_files.get(entry.file)
            if file is None:
                file = open_files[entry.file] = HashedFile(disk, folder / entry.file)
                file.write(plan.headers[entry.file])
            file.write(raw(tensor).cpu().numpy().data)
        return {name: file.finish() for name, file in open_files.items()}
    finally:
        for file in open_files.values():
            file.close()


@final
class TensorFile:
    """A safetensors file for reading. Raises ``ValueError`` for anything that is not exactly the format."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            # A private, writable map: torch wants writable memory, and nothing reaches the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(self._map) < 8:
            raise ValueError("shorter than its own header length")
        length = struct.unpack("<Q", self._map[:8])[0]
        if not 2 <= length <= min(MAX_HEADER_BYTES, len(self._map) - 8):
            raise ValueError(f"a header of {length:,} bytes in a file of {len(self._map):,}")
        self._data_start = 8 + length
        self._entries = _parse_header(self._map[8 : 8 + length], len(self._map) - self._data_start)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def get(self, key: str) -> Tensor:
        """The tensor, a view of the map: copy it before the file is closed if it is to live on."""
        dtype, shape, start, stop = self._entries[key]
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(
            self._map, dtype=dtype, count=(stop - start) // dtype.itemsize, offset=self._data_start + start
        )
        return flat.view(shape)


def _parse_header(text: bytes, data_bytes: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"header is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("header is no JSON object")
    content.pop("__metadata__", None)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
    spans: list[tuple[int, int]] = []
    for key, entry in content.items():
        dtype = DTYPES.get(str(entry.get("dtype"))) if isinstance(entry, dict) else None
        if dtype is None:
            raise ValueError(f"{key}: unknown dtype")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise ValueError(f"{key}: shape and offsets must be lists of sizes")
        start, stop = offsets
        if not (start <= stop <= data_bytes and stop - start == math.prod(shape) * dtype.itemsize):
            raise ValueError(f"{key}: bytes {start}..{stop} do not hold its shape, or lie outside the file")
        if start % dtype.itemsize:
            raise ValueError(f"{key}: not aligned")
        entries[key] = (dtype, tuple(shape), start, stop)
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("tensors overlap, or leave a hole")
        end = stop
    if end != data_bytes:
        raise ValueError(f"{data_bytes - end} bytes behind the last tensor")
    return entries


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
