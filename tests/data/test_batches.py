"""Laws 1, 2, 3, 5: topology only slices; resumed anywhere, any number of times; every rank makes the same steps."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import IterableDataset

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.batches import Batches, EvalBatches, Readable, StepBatch, _WorkerShare, merge_cursors
from lmcore.data.block_dataset import BlockDataset
from lmcore.data.blocks import Blocks, StoreBlocks
from lmcore.data.cursor import Cursor
from lmcore.data.custom import refuse_wrong_items, wrap
from lmcore.data.order import Phase
from lmcore.errors import FaultError, RequestError
from tests.support.batches import steps_of_ranks, take
from tests.support.data import Bytes, counting_store

SIZE = 8
GLOBAL = 48


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoreBlocks:
    """2 sources of 61 and 40 blocks: an epoch of 101 blocks, which no batch divides."""
    folder = tmp_path_factory.mktemp("stores")
    stores = [
        counting_store(folder, 61 * SIZE + 5, pieces=3, name="a"),
        counting_store(folder, 40 * SIZE + 1, first=10_000, name="b"),
    ]
    return StoreBlocks(stores, block_size=SIZE, seed=11)


def beginning(dataset: Readable, **options: Any) -> Cursor:
    return Cursor(fingerprint=dataset.fingerprint, seed=11, **options)


def run(
    dataset: Any,
    cursor: Cursor,
    *,
    count: int | None = None,
    world_size: int = 1,
    micro: int = 6,
    size: int = GLOBAL,
    **options: Any,
) -> tuple[list[Tensor], list[list[StepBatch]]]:
    """The global batches (labels included) in the order of the positions, and each rank's steps."""
    ranks = steps_of_ranks(dataset, cursor, count, world_size=world_size, size=size, micro=micro, **options)
    batches = [
        torch.cat(
            [
                torch.stack([batch["input_ids"], batch["labels"]], dim=1)
                for steps in ranks
                for batch in steps[number].micro_batches
            ]
        )
        for number in range(len(ranks[0]))
    ]
    return batches, ranks


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ---- one rank ----


def test_global_batches_are_the_blocks_of_their_positions(dataset: StoreBlocks) -> None:
    batches, [steps] = run(dataset, beginning(dataset), count=3)
    for number, (batch, step) in enumerate(zip(batches, steps)):
        ids = dataset.read(np.arange(number * GLOBAL, (number + 1) * GLOBAL)).ids.astype(np.int64)
        assert torch.equal(batch, torch.from_numpy(np.stack([ids[:, :-1], ids[:, 1:]], axis=1)))
        assert step.positions == (number * GLOBAL, (number + 1) * GLOBAL - 1)
        assert step.cursor.position == (number + 1) * GLOBAL
        assert step.label_count == GLOBAL * SIZE
        assert step.epoch == (number + 1) * GLOBAL / 101
        assert step.micro_batches[0]["input_ids"].dtype == torch.int64


@given(
    world_size=st.sampled_from([1, 2, 3, 4]),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 500),
    length=st.integers(1, 120),
    skips=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 30)), max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_any_topology_start_end_and_skips(
    dataset: StoreBlocks,
    world_size: int,
    micro: int,
    accumulation: int,
    start: int,
    length: int,
    skips: list[tuple[int, int]],
) -> None:
    cursor = beginning(dataset, position=start).with_skips([(a, a + n) for a, n in skips])
    wanted = [p for p in range(start, start + length) if not any(a <= p < a + n for a, n in skips)]
    size = world_size * micro * accumulation
    if start == 0 and not wanted:
        with pytest.raises(RequestError, match="skip all"):
            run(dataset, cursor, micro=micro, size=size, end_position=length)
        return
    batches, ranks = run(
        dataset, cursor, world_size=world_size, micro=micro, size=size, end_position=start + length
    )
    together = torch.cat(batches) if batches else torch.zeros(0, 2, SIZE, dtype=torch.int64)
    real = together[:, 1, 0] != IGNORED_LABEL
    expected = torch.from_numpy(dataset.read(np.array(wanted, dtype=np.int64)).ids.astype(np.int64))
    assert torch.equal(together[real][:, 0], expected[:, :-1])
    assert torch.equal(together[real][:, 1], expected[:, 1:])
    assert len(batches) == -(-len(wanted) // size)
    for number, step in enumerate(ranks[0]):
        assert step.label_count == int((batches[number][:, 1] != IGNORED_LABEL).sum())


# ---- resume ----


def test_prefetched_steps_are_not_in_the_cursor(dataset: StoreBlocks) -> None:
    iterator = iter(
        Batches(dataset, cursor=beginning(dataset), global_batch_blocks=6, micro_batch_blocks=6, prefetch=8)
    )
    for number in range(3):
        step = next(iterator)
        time.sleep(0.05)  # the thread is far ahead by now
        assert step.cursor.position == 6 * (number + 1)
    iterator.close()


@pytest.mark.parametrize("micro", [1, 2])
def test_ignored_labels_do_not_overwrite_inputs(tmp_path: Path, micro: int) -> None:
    """Also in a micro-batch of one block, whose inputs and labels lie in one run of memory."""
    store = counting_store(tmp_path, 21)  # 2 blocks of 8 and a tail of 4 labels
    dataset = StoreBlocks([store], block_size=SIZE, seed=11, pad_id=7)
    size = {"global_batch_blocks": 4, "micro_batch_blocks": micro}
    steps = take(Batches(dataset, cursor=beginning(dataset), end_position=2, **size))
    evaluated = list(EvalBatches(dataset, micro_batch_blocks=micro))
    inputs = torch.cat([batch["input_ids"] for step in steps for batch in step.micro_batches])
    assert sorted(inputs.tolist()) == sorted([[*range(8)], [*range(8, 16)], [7] * 8, [7] * 8])
    tail = torch.cat([batch["input_ids"] for batch in evaluated])[2]
    assert tail.tolist() == [16, 17, 18, 19, 20, 7, 7, 7]
    everything = [batch for step in steps for batch in step.micro_batches] + evaluated
    for batch in everything:
        assert all(tensor.is_contiguous() for tensor in batch.values())
        assert batch["input_ids"].min() >= 0
        pointers = {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
        assert len(pointers) == len(batch)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_every_label_once_per_epoch_with_padded_last_step(dataset: StoreBlocks, epochs: int) -> None:
    batches = Batches(
        dataset,
        cursor=beginning(dataset),
        global_batch_blocks=48,
        micro_batch_blocks=6,
        end_position=epochs * 101,
    )
    steps = take(batches)
    assert len(steps) == -(-epochs * 101 // 48)
    assert sum(step.n_blocks for step in steps) == epochs * 101
    labels = torch.cat([batch["labels"].ravel() for step in steps for batch in step.micro_batches])
    counts = torch.bincount(labels[labels != IGNORED_LABEL])
    once = [*range(1, 61 * SIZE + 1), *range(10_001, 10_000 + 40 * SIZE + 1)]
    assert counts[once].tolist() == [epochs] * len(once)
    assert int(counts.sum()) == epochs * len(once) == sum(step.label_count or 0 for step in steps)
    assert steps[-1].epoch == epochs


def test_longer_duration_after_padded_step_misses_no_block(dataset: StoreBlocks) -> None:
    """The last step of the first epoch was padded: the cursor stands at the end of the epoch, not of the step."""
    _, [steps] = run(dataset, beginning(dataset), end_position=101)
    assert steps[-1].cursor.position == 101
    batches, _ = run(dataset, steps[-1].cursor, end_position=202)
    found = torch.cat(batches)[:, 0]
    found = found[:101]
    assert torch.equal(
        found, torch.from_numpy(dataset.read(np.arange(101, 202)).ids[:, :-1].astype(np.int64))
    )


def test_skipped_positions_are_never_trained_on(dataset: StoreBlocks) -> None:
    skipped = beginning(dataset).with_skips([(10, 20), (95, 105)])
    found, [steps] = run(dataset, skipped, end_position=202)
    rest = [p for p in range(202) if not 10 <= p < 20 and not 95 <= p < 105]
    want = dataset.read(np.array(rest)).ids[:, :-1].astype(np.int64)
    assert torch.equal(torch.cat(found)[: len(rest), 0], torch.from_numpy(want))
    resumed, _ = run(dataset, steps[0].cursor, end_position=202)
    assert same(resumed, found[1:])


def test_changed_mixture_holds_from_the_cursor_on(tmp_path: Path) -> None:
    stores = [counting_store(tmp_path, 900, first=10_000 * i, name=f"s{i}") for i in range(2)]
    phases = (Phase(weights=(3, 1)),)
    dataset = StoreBlocks(stores, block_size=SIZE, seed=11, phases=phases)
    before, [steps] = run(dataset, beginning(dataset, phases=phases), count=4)
    changed = steps[1].cursor.with_weights([1, 3])
    after, [later] = run(dataset, changed, count=40)
    assert not same(after[:2], before[2:])
    share = torch.cat(after)[:1024, 0, 0].ge(10_000).double().mean()
    assert float(share) == 0.75
    resumed, _ = run(dataset, Cursor.from_json(later[5].cursor.to_json()), count=4, world_size=2)
    assert same(resumed, after[6:10])


def test_indivisible_global_batch_raises(dataset: StoreBlocks) -> None:
    with pytest.raises(RequestError, match=r"48 .* 2 processes x .* 5 = 10"):
        run(dataset, beginning(dataset), world_size=2, micro=5)


# ---- threads, processes, signals ----


@final
class Breaks:
    """A store that is damaged from position 20 on."""

    def __init__(self, dataset: StoreBlocks) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def resumed(self, cursor: Cursor) -> Breaks:
        return self

    def read(self, positions: np.ndarray) -> Any:
        if positions.max(initial=-1) >= 20:
            raise FaultError("damaged")
        return self._dataset.read(positions)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "batches"]


def left_behind() -> list[str]:
    """Processes of ours that do not end; on a busy machine the end of one that was told to takes its time."""
    children = multiprocessing.active_children()
    for child in children:
        child.join(120)
    return [child.name for child in children if child.is_alive()]


@pytest.mark.parametrize("workers", [0, 1])
def test_prefetch_error_is_raised_at_its_step(dataset: StoreBlocks, workers: int) -> None:
    batches = Batches(
        Breaks(dataset),
        cursor=beginning(dataset),
        global_batch_blocks=6,
        micro_batch_blocks=6,
        prefetch=8,
        workers=workers,
    )
    iterator = iter(batches)
    for _ in range(3):
        next(iterator)
    with pytest.raises(FaultError, match=r"^damaged$"):
        next(iterator)
    assert not threads()
    assert not left_behind()


def test_closed_loader_leaves_no_thread_or_worker(dataset: StoreBlocks) -> None:
    for workers in (0, 2):
        take(
            Batches(
                dataset,
                cursor=beginning(dataset),
                global_batch_blocks=6,
                micro_batch_blocks=6,
                workers=workers,
            ),
            2,
        )
        assert not threads()
        assert not left_behind()


def test_workers_ignore_signals_until_their_loader_is_closed(dataset: StoreBlocks) -> None:
    """Slurm and a terminal send them to all processes: the trainer must still be able to read and save."""
    expected, _ = run(dataset, beginning(dataset), count=12, size=6)
    iterator = iter(
        Batches(dataset, cursor=beginning(dataset), global_batch_blocks=6, micro_batch_blocks=6, workers=2)
    )
    found = [next(iterator)]
    for _ in range(300):  # some arrive while the handler of the one before is running
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGTERM)
            os.kill(child.pid, signal.SIGINT)
    time.sleep(0.1)
    found += [next(iterator) for _ in range(11)]
    assert all(
        torch.equal(step.micro_batches[0]["labels"], batch[:, 1]) for step, batch in zip(found, expected)
    )
    iterator.close()
    assert not left_behind()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_get_nothing_of_the_device(
    dataset: StoreBlocks, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Spawned workers get what they read pickled, which a CUDA stream and a function of a function cannot be."""
    batches = Batches(
        dataset,
        cursor=beginning(dataset),
        global_batch_blocks=6,
        micro_batch_blocks=6,
        workers=1,
        collate=lambda items: {},
    )
    batches._to_device._stream = threading.Lock()  # a stand-in: it refuses to be pickled
    share = _WorkerShare(batches)
    if method == "spawn":
        share = pickle.loads(pickle.dumps(share))
    monkeypatch.setattr("lmcore.data.batches.get_worker_info", lambda: SimpleNamespace(id=0))
    read = next(iter(share))
    assert isinstance(read, Blocks)
    [step] = take(Batches(dataset, cursor=beginning(dataset), global_batch_blocks=6, micro_batch_blocks=6), 1)
    assert read.ids[:, :-1].tolist() == step.micro_batches[0]["input_ids"].tolist()


CRASH = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from lmcore.data.batches import Batches
from lmcore.data.blocks import Blocks, StoreBlocks
from lmcore.data.cursor import Cursor
from tests.support.data import counting_store

dataset = StoreBlocks([counting_store(Path({folder!r}), 5000)], block_size=8)
cursor = Cursor(fingerprint=dataset.fingerprint, seed=0)
for step in Batches(dataset, cursor=cursor, global_batch_blocks=8, micro_batch_blocks=8, workers=2):
    if step.positions[0] > 20:
        raise KeyError("a bug in the loop")
"""


def test_crash_of_the_loop_does_not_hang_on_loader_workers(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", CRASH.format(root=root, folder=str(tmp_path))],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert "a bug in the loop" in done.stderr.splitlines()[-1]


# ---- evaluation ----


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 5, 7])
def test_evaluation_scores_every_label_once(dataset: StoreBlocks, world_size: int, micro: int) -> None:
    ranks = [
        list(EvalBatches(dataset, micro_batch_blocks=micro, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {batch["labels"].shape for batches in ranks for batch in batches} == {(micro, SIZE)}
    labels = torch.cat([batch["labels"].ravel() for batches in ranks for batch in batches])
    found = sorted(labels[labels != IGNORED_LABEL].tolist())
    assert found == [*range(1, 61 * SIZE + 5), *range(10_001, 10_001 + 40 * SIZE)]


def test_limited_evaluation_takes_the_same_blocks_on_any_topology(dataset: StoreBlocks) -> None:
    seen = []
    for world_size, micro in ((1, 4), (3, 2), (4, 1)):
        rows = [
            row
            for rank in range(world_size)
            for batch in EvalBatches(
                dataset, micro_batch_blocks=micro, rank=rank, world_size=world_size, limit=20
            )
            for row in batch["labels"][:, 0].tolist()
            if row != IGNORED_LABEL
        ]
        seen.append(sorted(rows))
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0])) == 20
    assert seen[0] != sorted(seen[0])[:20] or max(seen[0]) > 300  # spread, not the first 20


def test_validation_set_smaller_than_a_block(tmp_path: Path) -> None:
    dataset = StoreBlocks([counting_store(tmp_path, 5)], block_size=64, tails=True)
    [batch] = list(EvalBatches(dataset, micro_batch_blocks=2))
    assert batch["labels"][0].tolist() == [1, 2, 3, 4] + [IGNORED_LABEL] * 60
    assert set(batch["labels"][1].tolist()) == {IGNORED_LABEL}


# ---- the user's own data ----


@final
class Items:
    """Map-style: item i is x = [i], y = labels."""

    def __init__(self, n: int, labels: str) -> None:
        self.n, self.labels = n, labels

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.n:
            raise IndexError(index)
        byte = torch.tensor(index, dtype=torch.uint8)
        labels = {"int": index, "float": float(index), "byte": byte, "none": None}[self.labels]
        item = {"x": torch.tensor([index, index + 1]), "labels": labels}
        return item if labels is not None else {"x": item["x"]}


@final
class Rows(IterableDataset):
    def __init__(self, n: int) -> None:
        self.n, self.epochs = n, []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.n):
            yield {"x": torch.tensor([index]), "labels": index}


def own(
    dataset: Any, cursor: Cursor, *, world_size: int = 1, count: int | None = None, **options: Any
) -> list[list[int]]:
    """The labels of each global batch."""
    ranks = [
        take(
            Batches(
                dataset,
                cursor=cursor,
                global_batch_blocks=6,
                micro_batch_blocks=1,
                rank=rank,
                world_size=world_size,
                **options,
            ),
            count,
        )
        for rank in range(world_size)
    ]
    return [
        [int(label) for steps in ranks for batch in steps[n].micro_batches for label in batch["labels"]]
        for n in range(len(ranks[0]))
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_map_style_dataset_is_shuffled_and_resumes(workers: int) -> None:
    dataset = wrap(Items(20, "int"), seed=11)
    start = beginning(dataset)
    expected = own(dataset, start, end_position=40)
    flat = [label for batch in expected for label in batch]
    assert sorted(flat[:20]) == list(range(20))
    assert sorted(flat[20:40]) == list(range(20))
    assert flat[40:] == [IGNORED_LABEL] * 2
    assert flat[:20] != flat[20:40]
    assert own(dataset, start, world_size=3, workers=workers, end_position=40) == expected
    assert (
        own(dataset, replace(start, position=12), world_size=2, workers=workers, end_position=40)
        == expected[2:]
    )
    step = take(Batches(dataset, cursor=start, global_batch_blocks=6, micro_batch_blocks=3), 1)[0]
    assert step.label_count is None
    assert step.micro_batches[0]["x"].shape == (3, 2)


@pytest.mark.parametrize("labels", ["float", "byte"])
def test_labels_that_cannot_be_ignored_continue_into_the_next_epoch(labels: str) -> None:
    """-100 of 8 bits without a sign would be the label 156."""
    dataset = wrap(Items(20, labels), seed=11)
    found = own(dataset, beginning(dataset), end_position=20)
    assert [len(batch) for batch in found] == [6] * 4
    assert sorted(label for batch in found for label in batch)[0] == 0
    flat = [label for batch in found for label in batch]
    assert sorted(flat[:20]) == list(range(20))
    for world_size in (1, 2, 3):
        ranks = [
            list(EvalBatches(dataset, micro_batch_blocks=4, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        assert sorted(float(y) for batches in ranks for b in batches for y in b["labels"]) == list(range(20))
    with pytest.raises(RequestError, match=r"20 items .* 21 processes"):
        EvalBatches(dataset, micro_batch_blocks=4, world_size=21)


def test_iterable_dataset_is_sharded_by_position() -> None:
    rows = Rows(10)
    dataset = wrap(rows, seed=11)
    start = beginning(dataset)
    expected = [[(6 * n + i) % 10 for i in range(6)] for n in range(5)]
    assert own(dataset, start, count=5) == expected
    assert rows.epochs == sorted(rows.epochs)
    assert own(dataset, start, world_size=3, count=5) == expected
    assert own(dataset, replace(start, position=12), world_size=2, count=3, workers=1) == expected[2:]
    with pytest.raises(RequestError, match=r"data\.workers 2"):
        own(dataset, start, count=1, workers=2)
    step = take(Batches(dataset, cursor=start, global_batch_blocks=12, micro_batch_blocks=3), 2)[-1]
    assert step.epoch == 2
    for world_size in (1, 3):
        labels = [
            int(y)
            for rank in range(world_size)
            for batch in EvalBatches(dataset, micro_batch_blocks=4, rank=rank, world_size=world_size)
            for y in batch["labels"]
        ]
        assert sorted(y for y in labels if y >= 0) == list(range(10))


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_of_iterable_data_are_counted_in_any_process(workers: int) -> None:
    """Passes over 6 items in steps of 3; an epoch is over with its last item. After a resume as before."""
    dataset = wrap(Rows(6), seed=11)
    start = beginning(dataset)
    sizes = {"global_batch_blocks": 3, "micro_batch_blocks": 3, "workers": workers}
    steps = take(Batches(dataset, cursor=start, **sizes), 5)
    assert [step.epoch for step in steps] == [0, 1, 1, 2, 2]
    again = take(Batches(dataset, cursor=steps[2].cursor, **sizes), 2)
    assert [step.epoch for step in again] == [2, 2]


def test_block_dataset_as_custom_dataset_is_not_sharded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares its blocks out by rank itself when it stands alone, but not here."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    plain = BlockDataset.from_texts(Bytes(), ["abcdefghij" * 5], 4)
    dataset = wrap(plain, seed=1)
    first = take(Batches(dataset, cursor=beginning(dataset), global_batch_blocks=4, micro_batch_blocks=2), 1)[
        0
    ]
    assert bytes(first.micro_batches[0]["input_ids"].ravel().tolist()) == b"abcdefgh"


def test_invalid_custom_dataset_raises() -> None:
    for bad, words in ((5, "int"), (Items(0, "int"), "empty")):
        with pytest.raises(RequestError, match=words):
            wrap(bad, seed=1)
    with pytest.raises(RequestError, match="yields nothing"):
        own(wrap(Rows(0), seed=1), Cursor(fingerprint="", seed=1), count=1)
    tuples = wrap([(1, 2), (3, 4)], seed=1)
    with pytest.raises(RequestError, match="must be a dict"):
        own(tuples, Cursor(fingerprint="", seed=1), count=1)
    with pytest.raises(RequestError, match=r"must have labels, .* its keys are x, lables"):
        own(wrap([{"x": 1, "lables": 2}] * 2, seed=1), Cursor(fingerprint="", seed=1), count=1)
    with pytest.raises(RequestError, match=r"must be a dict, .* not tuple: return"):
        refuse_wrong_items(tuples)
    with pytest.raises(RequestError, match=r"must have labels, .* its keys are x, lables"):
        refuse_wrong_items(wrap([{"x": 1, "lables": 2}], seed=1))
    refuse_wrong_items(wrap([{"x": 1, "labels": 2}], seed=1))
    collated = Batches(
        tuples,
        cursor=Cursor(fingerprint="", seed=1),
        global_batch_blocks=2,
        micro_batch_blocks=2,
        collate=lambda items: {"x": torch.tensor([x for x, _ in items]), "labels": torch.zeros(len(items))},
    )
    assert sorted(take(collated, 1)[0].micro_batches[0]["x"].tolist()) == [1, 3]


def test_store_cursors_of_all_ranks_merge(dataset: StoreBlocks) -> None:
    _, ranks = run(dataset, beginning(dataset), count=2, world_size=2)
    assert merge_cursors([steps[1].cursor for steps in ranks]) == ranks[0][1].cursor


RESIDENT = """
import sys
from pathlib import Path
import numpy as np, torch
from lmcore.data.batches import Batches
from lmcore.data.blocks import Blocks, StoreBlocks
from lmcore.data.cursor import Cursor
from lmcore.data.store.store import Piece, TokenStore

def resident():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

def added(path, n_tokens, steps):
    with open(path, "wb") as file:
        file.truncate(2 * n_tokens)  # a hole: it takes no room and reads as zeros
    store = TokenStore(name="x", fingerprint="0" * 16, dtype="<u2", pieces=[Piece(path=path, n_tokens=n_tokens)])
    before = resident()
    data = StoreBlocks([store], block_size=2048, seed=1)
    batches = iter(Batches(data, cursor=Cursor(fingerprint="", seed=1), global_batch_blocks=16, micro_batch_blocks=16))
    for _ in range(steps):
        next(batches)
    return resident() - before

added(sys.argv[1], 5 * 10**6, 3)  # what torch and numpy need once
print(added(sys.argv[1], 5 * 10**6, 100), added(sys.argv[1], 5 * 10**9, 100))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel tells no anonymous memory")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Under 50 MiB beside the page cache, for a store of 10 MB as for one of 10 GB."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path / "sparse.bin")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    small, large = map(float, done.stdout.split())
    assert max(small, large) < 50
    assert abs(large - small) < 10
