"""Parts of tensors: any part is put together from any pieces, and what ranks write is the whole state, once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lmcore.checkpoint import pieces
from lmcore.checkpoint.pieces import Box, Held, Part, Range, cut, problem_of, to_write

SHAPES = [(), (1,), (7,), (3, 4), (4, 1, 3), (2, 3, 2, 2), (5, 0)]


def numbers(shape: Sequence[int]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(tuple(shape))


def random_part(shape: Sequence[int], draw: random.Random) -> Part:
    size = torch.Size(shape).numel()
    if draw.random() < 0.5:
        start = draw.randint(0, size)
        return Range(start, draw.randint(0, size - start))
    offsets = [draw.randint(0, n) for n in shape]
    return Box(tuple(offsets), tuple(draw.randint(0, n - o) for n, o in zip(shape, offsets)))


def cover(shape: Sequence[int], draw: random.Random) -> list[Part]:
    """Pieces that are the whole tensor once: a range cut at random, or a grid of boxes."""
    size = torch.Size(shape).numel()
    if draw.random() < 0.5 or not shape:
        cuts = sorted({0, size, *(draw.randint(0, size) for _ in range(3))})
        return [Range(a, b - a) for a, b in itertools.pairwise(cuts)] or [Range(0, 0)]
    edges = [sorted({0, n, draw.randint(0, n)}) for n in shape]
    sides = [list(itertools.pairwise(edge)) or [(0, 0)] for edge in edges]
    return [Box(tuple(a for a, _ in g), tuple(b - a for a, b in g)) for g in itertools.product(*sides)]


def test_any_part_is_put_together_from_any_pieces() -> None:
    """Against indexing of the whole tensor, which is the definition."""
    draw = random.Random(5)
    for shape in SHAPES * 60:
        tensor, want, parts = numbers(shape), random_part(shape, draw), cover(shape, draw)
        assert problem_of(parts, shape) == ""
        target = torch.full((pieces.count(want),), -1.0, dtype=torch.float64)
        copied = sum(
            pieces.copy_overlap(target, want, cut(tensor, have).reshape(-1), have, shape) for have in parts
        )
        assert copied == pieces.count(want)
        assert torch.equal(target, cut(tensor, want).reshape(-1)), (shape, want, parts)
        assert pieces.shape_of(want) == tuple(cut(tensor, want).shape)


def test_contiguous_boxes_are_ranges() -> None:
    draw = random.Random(6)
    for shape in SHAPES * 40:
        part = random_part(shape, draw)
        found, values = pieces.as_range(part, shape), cut(numbers(shape), part).reshape(-1).tolist()
        if found is not None:
            assert values == cut(numbers(shape), found).tolist()
        else:
            assert values != list(range(int(values[0]), int(values[0]) + len(values)))


def test_missing_doubled_and_overlapping_pieces_are_found() -> None:
    """Against counting how often each number is covered."""
    draw, found = random.Random(7), set()
    for shape in [s for s in SHAPES if 0 not in s] * 100:
        parts = cover(shape, draw)
        for _ in range(draw.randint(0, 2)):
            kind = draw.choice(["drop", "double", "change"])
            if kind == "drop":
                parts.pop(draw.randrange(len(parts)))
            elif kind == "double":
                parts.append(draw.choice(parts))
            else:
                parts[draw.randrange(len(parts))] = random_part(shape, draw)
            if not parts:
                break
        times = torch.zeros(shape, dtype=torch.int64)
        for part in parts:
            view = times.view(-1) if isinstance(part, Range) else times
            cut(view, part).add_(1)
        assert (problem_of(parts, shape) == "") == bool((times == 1).all()), (shape, parts)
        found.add(problem_of(parts, shape))
    assert found == {"", "pieces are missing", "pieces overlap"}


@pytest.mark.parametrize(
    "part",
    [
        Range(-1, 2),
        Range(0, -1),
        Range(11, 2),
        Range(1 << 80, 1),
        Box((0,), (3,)),
        Box((0, 0), (4, 4)),
        Box((0, -1), (3, 4)),
        Box((0, 5), (3, -1)),
        Box((0, 0), (3, 1 << 70)),
        Box((0, 0, 0), (3, 4, 1)),
    ],
)
def test_parts_beyond_the_tensor_are_found(part: Part) -> None:
    assert problem_of([part], (3, 4)) == "a piece reaches beyond the tensor"


@pytest.mark.parametrize(
    "value", [None, [], [0, 1], [0, True, 1], [0, 1.0, 1], [0, [0], 1], ["0", 0, 1], [0, [0], [None]]]
)
def test_no_piece(value: object) -> None:
    with pytest.raises(ValueError, match="no piece"):
        pieces.from_json(value)


def test_json_of_a_piece() -> None:
    for part in (Range(3, 4), Box((0, 1), (3, 2))):
        assert pieces.from_json(pieces.to_json(2, part, (3, 4))) == (2, part)
    assert pieces.to_json(0, Box((1, 0), (2, 4)), (3, 4)) == [0, 4, 8]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_what_all_hold_is_written_once_and_evenly(world_size: int) -> None:
    tensors = [
        ("model", "a", torch.arange(15.0).view(5, 3)),
        ("model", "b", torch.tensor(3.0)),
        ("model", "empty", torch.empty(0, 4)),
        ("model", "mask", torch.tensor([True, False, True])),
        ("optim", "a", torch.arange(30, dtype=torch.int16).view(3, 10).t()),  # not contiguous
    ]
    written: dict[tuple[str, str], list[tuple[Part, Tensor]]] = {}
    sizes = []
    for rank in range(world_size):
        held = [
            Held(k, n, "", tuple(t.shape), pieces.whole(t.shape), t, (rank, world_size))
            for k, n, t in tensors
        ]
        mine = to_write(held, rank=rank)
        sizes.append(sum(piece.tensor.numel() * piece.tensor.element_size() for piece in mine))
        for piece in mine:
            written.setdefault((piece.kind, piece.key), []).append((piece.part, piece.tensor))
    for kind, name, tensor in tensors:
        parts = [part for part, _ in written[kind, name]]
        assert problem_of(parts, tensor.shape) == ""
        for part, numbers_of in written[kind, name]:
            assert torch.equal(numbers_of.reshape(-1), cut(tensor, part).reshape(-1))
    assert max(sizes) - min(sizes) <= 8, "to a number of each tensor"


def test_replicas_of_shards_share_the_writing() -> None:
    """Hybrid sharding: two shards by rows, each on two ranks; a buffer on all four."""
    weight, buffer = torch.arange(20.0).view(5, 4), torch.arange(3.0)
    written: dict[str, list[Part]] = {}
    for rank in range(4):
        shard, replica = rank % 2, rank // 2
        rows = Box((3 * shard, 0), (3 - shard, 4))
        held = [
            Held("model", "w", "", (5, 4), rows, cut(weight, rows), (replica, 2)),
            Held("model", "b", "", (3,), pieces.whole((3,)), buffer, (rank, 4)),
        ]
        for piece in to_write(held, rank=rank):
            written.setdefault(piece.key, []).append(piece.part)
            assert torch.equal(
                piece.tensor.reshape(-1), cut(weight if piece.key == "w" else buffer, piece.part).reshape(-1)
            )
    assert len(written["w"]) == 4
    assert problem_of(written["w"], (5, 4)) == problem_of(written["b"], (3,)) == ""
