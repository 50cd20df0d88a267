"""Laws 1, 3 and 5 for every kind of data: ranks, workers and micro-batches only slice the positions, and a resume from
any step continues with exactly the next blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lmcore.data.blocks import StoreBlocks
from lmcore.data.cursor import Cursor
from lmcore.data.custom import wrap
from lmcore.data.order import Phase
from lmcore.data.steps import Point, plan_steps
from lmcore.data.stream import StreamDataset
from lmcore.data.text import documents
from lmcore.errors import RequestError
from tests.support.batches import Row, run_ranks
from tests.support.data import Tagged, counting_store, tagged_text

SIZE = 16  # blocks of a global batch
GROWING = plan_steps([Point(0, 8), Point(20, 16), Point(4, 32, in_steps=True), Point(6, 8, in_steps=True)])
STEPS = 10


@dataclass
class Kind:
    """A dataset, made anew as another process would; and how a run over it ends."""

    open: Callable[[], Any]
    options: dict[str, Any]
    max_workers: int = 5

    def run(
        self, cursor: Cursor | None = None, **more: Any
    ) -> tuple[list[list[Row]], list[Cursor], list[Any]]:
        dataset = self.open()
        start = cursor or self.beginning(dataset)
        return run_ranks(dataset, start, **{"size": SIZE, **self.options, **more})

    def beginning(self, dataset: Any) -> Cursor:
        if isinstance(dataset, StreamDataset):
            return dataset.new_cursor()
        phases = dataset.order.phases if isinstance(dataset, StoreBlocks) else (Phase(),)
        return Cursor(fingerprint=dataset.fingerprint, seed=11, phases=phases)


@pytest.fixture(scope="module", params=["store", "mixture", "stream", "stream mixture", "custom"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    """A store and a custom dataset of 71 blocks, which no global batch divides, twice: the last step is padded."""
    folder = tmp_path_factory.mktemp("data")
    end = {"end_position": 2 * 71}
    if request.param in ("store", "mixture"):
        stores = [
            counting_store(folder, 41 * 8 + 5, pieces=3, name="a", documents=13),
            counting_store(folder, 30 * 8 + 1, first=10_000, name="b", documents=13),
        ]
        phases = (Phase(weights=(3, 1)), Phase(position=50, weights=(1, 2)))
        options: dict[str, Any] = {"phases": phases} if request.param == "mixture" else {}
        return Kind(lambda: StoreBlocks(stores, block_size=8, seed=11, document_mask=True, **options), end)
    if request.param == "custom":
        items = [{"x": torch.tensor([number, number + 1]), "labels": number} for number in range(71)]
        return Kind(lambda: wrap(items, seed=11), end)
    folders = [tagged_text(folder / "a", files=3), tagged_text(folder / "b", first=5000, files=2)]
    mixture = request.param == "stream mixture"
    sources = documents.resolve_sources(
        [{"path": str(one), "unit": "line"} for one in (folders if mixture else folders[:1])]
    )
    weights = {"phases": (Phase(weights=(3, 1)),)} if mixture else {}
    return Kind(
        lambda: StreamDataset(
            sources, Tagged(), block_size=16, lanes=8, seed=5, window_blocks=32, document_mask=True, **weights
        ),
        {"count": STEPS},
    )


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (1, 4), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_do_not_change_the_global_batches(
    kind: Kind, world_size: int, micro: int
) -> None:
    expected, cursors, [alone] = kind.run(micro=micro)
    found, theirs, ranks = kind.run(world_size=world_size, micro=micro)
    assert found == expected
    assert theirs == cursors
    keys = [sorted(key for steps in ranks for key in steps[n].keys) for n in range(len(alone))]
    if world_size == 1:
        assert keys == [step.keys for step in alone]
    flat = [key for step in keys for key in step]
    assert len(set(flat)) == len(flat)  # no two micro-batches share the seed of their dropout


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 2), (1, 5)])
def test_workers_do_not_change_the_global_batches(kind: Kind, world_size: int, workers: int) -> None:
    expected, cursors, _ = kind.run()
    found, theirs, _ = kind.run(world_size=world_size, workers=workers)
    assert found == expected
    assert theirs == cursors


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_every_topology_gives_the_same_global_batches(kind: Kind, world_size: int, workers: int) -> None:
    expected, cursors, _ = kind.run()
    for micro in (1, 2):
        found, theirs, _ = kind.run(world_size=world_size, workers=workers, micro=micro)
        assert found == expected
        assert theirs == cursors
    count = {"count": STEPS - 5} if "count" in kind.options else {}
    middle, _, _ = kind.run(cursors[4], world_size=world_size, workers=workers, **count)
    assert middle == expected[5:]


def test_resume_from_every_step_and_again(kind: Kind) -> None:
    """Three times in a row, on other numbers of ranks, saved right after the resume before."""
    expected, cursors, _ = kind.run()
    for first in range(len(expected) - 1):
        cursor = Cursor.from_json(json.loads(json.dumps(cursors[first].to_json())))
        assert cursor == cursors[first]
        world_size = 2 ** (first % 4)
        for done in range(first + 1, min(first + 4, len(expected))):
            left = {"count": len(expected) - done} if "count" in kind.options else {}
            found, after, _ = kind.run(cursor, world_size=world_size, micro=2, **left)
            assert found == expected[done:]
            assert after == cursors[done:]
            cursor, world_size = after[0], 1


@pytest.mark.parametrize("workers", [1, 2])
def test_resume_with_another_number_of_workers(kind: Kind, workers: int) -> None:
    expected, _, _ = kind.run()
    _, cursors, _ = kind.run(count=3, workers=workers)
    left = {"count": len(expected) - 3} if "count" in kind.options else {}
    found, _, _ = kind.run(cursors[2], workers=3 - workers, **left)
    assert found == expected[3:]


def test_global_batch_that_changes_reads_the_same_blocks_in_the_same_order(kind: Kind) -> None:
    """8, 8, 8, 16, 32, 32 and then 8 blocks a step: together they are what steps of 8 blocks read."""
    constant, _, _ = kind.run(size=8, **({"count": 19} if "count" in kind.options else {}))
    grown, cursors, _ = kind.run(size=GROWING)
    count = len([row for step in grown for row in step])
    assert [row for step in grown for row in step] == [row for step in constant for row in step][:count]
    ends = [GROWING.blocks_before(step + 1) for step in range(len(cursors))]
    last = kind.options.get("end_position", ends[-1])
    assert [cursor.position for cursor in cursors] == [min(end, last) for end in ends]
    if "count" not in kind.options:
        assert count == sum(map(len, constant))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 3), (4, 8), (8, 1)])
def test_ranks_and_micro_batches_do_not_change_batches_that_grow(
    kind: Kind, world_size: int, micro: int
) -> None:
    expected, cursors, _ = kind.run(size=GROWING)
    found, theirs, ranks = kind.run(size=GROWING, world_size=world_size, micro=micro)
    assert found == expected
    assert theirs == cursors
    for step, batch in enumerate(ranks[0]):  # the largest divisor of the share up to the micro-batch
        share = GROWING.batch_of(step) // world_size
        largest = max(one for one in range(1, micro + 1) if share % one == 0)
        assert len(batch.micro_batches) == share // largest


def test_resume_before_at_and_after_every_change_of_the_batch(kind: Kind) -> None:
    expected, cursors, _ = kind.run(size=GROWING)
    for done in range(1, len(expected)):
        cursor = Cursor.from_json(json.loads(json.dumps(cursors[done - 1].to_json())))
        left = {"count": len(expected) - done} if "count" in kind.options else {}
        world_size = 2 ** (done % 4)
        found, after, _ = kind.run(cursor, size=GROWING, step=done, world_size=world_size, micro=2, **left)
        assert found == expected[done:]
        assert after == cursors[done:]


def test_growing_batch_that_the_ranks_do_not_divide_raises(kind: Kind) -> None:
    plan = plan_steps([Point(0, 8), Point(2, 12, in_steps=True)])
    with pytest.raises(RequestError, match=r"multiple of the 8 processes \(got 12\)"):
        kind.run(size=plan, world_size=8)
