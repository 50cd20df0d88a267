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
from lmcore.data.stream import StreamDataset
from lmcore.data.text import documents
from tests.support.batches import Row, run_ranks
from tests.support.data import Tagged, counting_store, tagged_text

SIZE = 16  # blocks of a global batch
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
