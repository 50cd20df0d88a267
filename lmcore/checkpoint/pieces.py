"""Parts of tensors: which part a rank holds, writes or wants, and how parts are cut and joined.

A part of a tensor is a :class:`Box` (an offset and a length in each dimension) or a :class:`Range` (of the flattened tensor,
in row-major order). FSDP2's rows and ZeRO's fragments are contiguous in the flattened tensor, so each is a range; a part that
is not contiguous (a shard of columns) can only be a box. Nothing here touches the disk.

Example::

    part = Range(start=4, length=4)                       # the second row of a tensor (3, 4)
    cut(torch.arange(12.0).view(3, 4), part)             # tensor([4., 5., 6., 7.])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lmcore.checkpoint.tensors import key_of

MOST_BOXES = 4096
"""The most boxes that one tensor may consist of if a part of it is not contiguous, because they are compared pairwise."""
Shape = tuple[int, ...]


class Box(NamedTuple):
    """``lengths[d]`` elements starting at ``offsets[d]``, in every dimension d."""

    offsets: Shape
    lengths: Shape


class Range(NamedTuple):
    """``length`` elements of the flattened tensor, starting at ``start``."""

    start: int
    length: int


Part = Box | Range


class Held(NamedTuple):
    """What a rank holds of one tensor of the state.

    ``kind`` is ``model``, ``optim`` or ``ema``; ``shape`` is the shape of the whole tensor; ``tensor`` holds the elements of
    ``part``, on any device, in any shape. ``holders`` is (i, n): this rank is number i of the n ranks that hold the same
    elements and share the work of writing them.
    """

    kind: str
    name: str
    slot: str
    shape: Shape
    part: Part
    tensor: Tensor
    holders: tuple[int, int] = (0, 1)


class Piece(NamedTuple):
    """What a rank writes of one tensor."""

    kind: str
    key: str
    shape: Shape
    part: Part
    tensor: Tensor


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def held_whole(
    kind: str, name: str, slot: str | None, tensor: Tensor, holders: tuple[int, int] = (0, 1)
) -> Held:
    """A tensor that this rank holds whole."""
    return Held(kind, name, slot or "", tuple(tensor.shape), whole(tensor.shape), tensor, holders)


def count(part: Part) -> int:
    """The number of elements of a part."""
    return part.length if isinstance(part, Range) else math.prod(part.lengths)


def as_range(part: Part, shape: Sequence[int]) -> Range | None:
    """The part as a range of the flattened tensor, or ``None`` for a box that is not contiguous in it."""
    if isinstance(part, Range):
        return part
    if 0 in part.lengths:
        return Range(0, 0)
    start, size, seen_cut = 0, 1, False
    for offset, length, whole_length in reversed(list(zip(part.offsets, part.lengths, shape, strict=True))):
        if seen_cut and length != 1:  # several rows, each of which is cut
            return None
        seen_cut = seen_cut or length != whole_length
        start += offset * size
        size *= whole_length
    return Range(start, math.prod(part.lengths))


def boxes(part: Part, shape: Sequence[int]) -> list[tuple[Box, int]]:
    """The part as boxes, each with the index of its first element in the part's own row-major data.

    In two dimensions a range is at most three boxes: the rest of a row, whole rows, the beginning of a row. Every further
    dimension adds at most two.
    """
    if isinstance(part, Box):
        return [(part, 0)] if count(part) else []
    found: list[tuple[Box, int]] = []
    start, left, place = part.start, part.length, 0
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    while left > 0:
        # The largest box that starts here: whole slices along the outermost dimension of which one starts here and fits.
        at = next(
            (d for d in range(len(shape)) if start % strides[d] == 0 and left >= strides[d]), len(shape)
        )
        if at == len(shape):  # a tensor without dimensions
            return [(Box((), ()), 0)]
        index = start // strides[at] % shape[at]
        length = min(left // strides[at], shape[at] - index)
        offsets = [start // strides[d] % shape[d] for d in range(at)] + [index] + [0] * (len(shape) - at - 1)
        lengths = [1] * at + [length, *shape[at + 1 :]]
        found.append((Box(tuple(offsets), tuple(lengths)), place))
        start, left, place = (
            start + length * strides[at],
            left - length * strides[at],
            place + length * strides[at],
        )
    return found


def copy_overlap(target: Tensor, want: Part, source: Tensor, have: Part, shape: Sequence[int]) -> int:
    """Copy the overlap of two parts of a tensor of ``shape``. Returns the number of copied elements.

    Args:
        target: the elements of ``want``, flat (count,).
        source: the elements of ``have``, flat (count,).
    """
    wanted, got = as_range(want, shape), as_range(have, shape)
    if wanted is not None and got is not None:
        start = max(wanted.start, got.start)
        size = min(wanted.start + wanted.length, got.start + got.length) - start
        if size <= 0:
            return 0
        target.narrow(0, start - wanted.start, size).copy_(source.narrow(0, start - got.start, size))
        return size
    copied = 0
    for to, to_place in boxes(want, shape):
        for of, of_place in boxes(have, shape):
            low = [max(a, b) for a, b in zip(to.offsets, of.offsets)]
            high = [min(a + m, b + n) for a, m, b, n in zip(to.offsets, to.lengths, of.offsets, of.lengths)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            views = []
            for data, box, place in ((target, to, to_place), (source, of, of_place)):
                index = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, box.offsets))
                views.append(data.narrow(0, place, count(box)).view(box.lengths)[index])
            views[0].copy_(views[1])
            copied += views[1].numel()
    return copied


def cut(tensor: Tensor, part: Part | None = None) -> Tensor:
    """A part of a whole tensor, with shape (length,) for a range or ``lengths`` for a box; all of it without ``part``."""
    if part is None:
        return tensor
    if isinstance(part, Range):
        return tensor.reshape(-1).narrow(0, part.start, part.length)
    return tensor[tuple(slice(o, o + n) for o, n in zip(part.offsets, part.lengths))]


def shape_of(part: Part) -> Shape:
    """The shape of a part as :func:`cut` returns it."""
    return (part.length,) if isinstance(part, Range) else part.lengths


def inside(part: Part, shape: Sequence[int]) -> bool:
    """Whether a part lies within a tensor of this shape."""
    if isinstance(part, Range):
        return part.start >= 0 and part.length >= 0 and part.start + part.length <= math.prod(shape)
    return len(part.offsets) == len(part.lengths) == len(shape) and all(
        offset >= 0 and length >= 0 and offset + length <= size
        for offset, length, size in zip(part.offsets, part.lengths, shape)
    )


def problem_of(parts: Sequence[Part], shape: Sequence[int]) -> str:
    """Why these parts do not cover the whole tensor exactly once; empty if they do."""
    if not all(inside(part, shape) for part in parts):
        return "a piece reaches beyond the tensor"
    size, ranges = math.prod(shape), [as_range(part, shape) for part in parts]
    if sum(map(count, parts)) < size:
        return "pieces are missing"
    flat = sorted(r for r in ranges if r is not None)
    if len(flat) == len(parts):
        end = 0
        for start, number in flat:
            if start != end:
                return "pieces overlap" if start < end else "pieces are missing"
            end += number
        return "" if end == size else "pieces overlap"
    every = [box for part in parts for box, _ in boxes(part, shape)]
    if len(every) > MOST_BOXES:
        return f"more than {MOST_BOXES:,} pieces"
    low = np.array([box.offsets for box in every], dtype=np.int64)
    high = low + np.array([box.lengths for box in every], dtype=np.int64)
    for i in range(len(every)):  # one row of pairs at a time, which bounds the memory
        meet = np.all((low[i + 1 :] < high[i]) & (low[i] < high[i + 1 :]), axis=1)
        if meet.any():
            return "pieces overlap"
    return "" if sum(map(count, parts)) == size else "pieces overlap"


def to_write(held: Iterable[Held], *, rank: int) -> list[Piece]:
    """What this rank writes of what it holds, so that every element is written exactly once.

    The tensors that the same n ranks hold are concatenated in order and split evenly: holder i writes the bytes from i/n to
    (i + 1)/n, rounded to whole elements. Rank 0 writes tensors without elements.
    """
    held = list(held)
    totals: dict[tuple[int, int], int] = {}
    for item in held:
        totals[item.holders] = totals.get(item.holders, 0) + item.tensor.numel() * item.tensor.element_size()
    ends = dict.fromkeys(totals, 0)
    found = []
    for item in held:
        key, size, width = key_of(item.name, item.slot), item.tensor.numel(), item.tensor.element_size()
        if size == 0:
            if rank == 0 and 0 in item.shape:
                found.append(Piece(item.kind, key, item.shape, whole(item.shape), item.tensor))
            continue
        (number, of), begin = item.holders, ends[item.holders]
        ends[item.holders] = begin + size * width
        total = totals[item.holders]
        # If the boundary at byte edge * total / of lies inside an element, the next writer starts at the element after it.
        first, stop = (
            min(max(-((begin * of - edge * total) // (of * width)), 0), size) for edge in (number, number + 1)
        )
        if first == stop:
            continue
        part, tensor = item.part, item.tensor
        if stop - first < size:
            flat = as_range(part, item.shape)
            if flat is None:  # not contiguous, so not split: the holder of its first byte writes all of it
                if first > 0:
                    continue
            else:
                part, tensor = Range(flat.start + first, stop - first), tensor.reshape(-1)[first:stop]
        found.append(Piece(item.kind, key, item.shape, part, tensor))
    return found


def to_json(file: int, part: Part, shape: Sequence[int]) -> list[Any]:
    """``[file, start, length]``, or ``[file, offsets, lengths]`` for a box that is not contiguous."""
    flat = as_range(part, shape)
    if flat is not None:
        return [file, *flat]
    assert isinstance(part, Box)  # as_range never returns None for a range
    return [file, list(part.offsets), list(part.lengths)]


def from_json(value: Any) -> tuple[int, Part]:
    """The inverse of :func:`to_json`. Raises ``ValueError`` for anything else."""
    if isinstance(value, list) and len(value) == 3:
        file, a, b = value
        if type(file) is type(a) is type(b) is int:
            return file, Range(a, b)
        lists = isinstance(a, list) and isinstance(b, list)
        if type(file) is int and lists and all(type(number) is int for number in (*a, *b)):
            return file, Box(tuple(a), tuple(b))
    raise ValueError("no piece of a tensor")
