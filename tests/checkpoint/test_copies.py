"""The copy of a checkpoint from a GPU runs beside the computation, and holds the state of its step whichever stream is slow.

Without a GPU: the queues of tests/support/streams.py.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmcore.checkpoint import writer
from lmcore.checkpoint.copies import DeviceCopies
from lmcore.checkpoint.pieces import held_whole
from lmcore.checkpoint.reader import open_checkpoint
from tests.support.checkpoints import checkpoints
from tests.support.streams import Event, OnDevice, gpu, pretend

SIDE = pytest.mark.parametrize("side_is_prompt", [False, True], ids=["copies are late", "updates are late"])


def values() -> list[Tensor]:
    """Whole, cut in columns (which is made contiguous first), and of 16 bits."""
    wide = torch.arange(24.0).view(4, 6)
    return [torch.arange(5.0), wide[:, 1:4], torch.arange(3.0).bfloat16()]


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(size, page-locked) of each buffer on the host, which are full of another number before they are copied to."""
    made: list[tuple[int, bool]] = []

    def make(size: int, pinned: bool) -> Tensor:
        made.append((size, pinned))
        return torch.full((size,), 77, dtype=torch.uint8)

    monkeypatch.setattr(writer, "_host_buffer", make)
    return made


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The thread that writes waits for its copies only once this is set."""
    may = threading.Event()
    synchronize = Event.synchronize

    def later(event: Event) -> None:
        if threading.current_thread().name == "checkpoint":
            assert may.wait(120)
        synchronize(event)

    monkeypatch.setattr(Event, "synchronize", later)
    return may


def saved_of(folder: Path, step: int, count: int = 3) -> list[Tensor]:
    with open_checkpoint(folder / f"step-{step:08d}") as checkpoint:
        return [checkpoint.read("model", str(i), "") for i in range(count)]


@SIDE
def test_checkpoint_holds_its_step_while_training_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    buffers: list[tuple[int, bool]],
    writing: threading.Event,
    side_is_prompt: bool,
) -> None:
    """Two updates are in the queue before the save, two come after it; the files are those of the first two."""
    pretend(monkeypatch, side_is_prompt=side_is_prompt)
    weights = [value.as_subclass(OnDevice) for value in values()]
    copies = DeviceCopies()
    saves = checkpoints(tmp_path, keep=3, copies=copies)
    expected = values()
    for step in (1, 2, 3):
        for weight in weights:
            weight.add_(1)
            weight.mul_(2)
        expected = [(value + 1) * 2 for value in expected]
        saves.save(
            step, tensors=[held_whole("model", str(i), None, w) for i, w in enumerate(weights)], state={}
        )
        copies.before_writing()
        for weight in weights:
            weight.sub_(50)
        writing.set()
        saves.wait(final=True)
        writing.clear()
        for found, value in zip(saved_of(tmp_path, step), expected):
            assert torch.equal(found, value)
        expected = [value - 50 for value in expected]
    # One file for each size of a number, page-locked, and kept from save to save.
    assert buffers == [(4 * (5 + 12), True), (2 * 3, True)]
    assert len(gpu.streams) == 2
    assert [stream for _, stream in gpu.recorded] == [gpu.streams[1]] * 9


def test_save_returns_before_its_copies_are_done(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    buffers: list[tuple[int, bool]],
    writing: threading.Event,
) -> None:
    """The thread that writes waits for them, and no other."""
    pretend(monkeypatch, side_is_prompt=False)
    saves = checkpoints(tmp_path, copies=DeviceCopies())
    saves.save(1, tensors=[held_whole("model", "0", None, torch.ones(4).as_subclass(OnDevice))], state={})
    assert len(gpu.streams[1].work) > 0  # the copy and its event are still in the queue
    assert not list(tmp_path.glob("step-*"))
    writing.set()
    saves.wait(final=True)
    assert torch.equal(saved_of(tmp_path, 1, 1)[0], torch.ones(4))


@SIDE
def test_copies_are_complete_when_a_save_returns_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: list[tuple[int, bool]], side_is_prompt: bool
) -> None:
    pretend(monkeypatch, side_is_prompt=side_is_prompt)
    weight = torch.ones(4).as_subclass(OnDevice)
    saves = checkpoints(tmp_path)
    saves.save(1, tensors=[held_whole("model", "0", None, weight)], state={})
    weight.add_(1)  # nobody was told
    saves.wait(final=True)
    assert torch.equal(saved_of(tmp_path, 1, 1)[0], torch.ones(4))


def test_copies_from_the_host_need_no_stream() -> None:
    target, source = torch.zeros(16, dtype=torch.uint8), torch.arange(4.0)
    copies = DeviceCopies()
    wait = copies.begin([(target, source)])
    source.zero_()
    wait()
    copies.before_writing()
    assert torch.equal(target.view(torch.float32), torch.arange(4.0))


@SIDE
@pytest.mark.parametrize("what", ["weights", "buffers", "load"])
def test_engine_orders_its_writes_after_the_copies(
    monkeypatch: pytest.MonkeyPatch, side_is_prompt: bool, what: str
) -> None:
    """Update and load wait for them; a forward may change buffers, whose copy is taken at once."""
    from lmcore.config.schema import EngineConfig, TrainConfig
    from lmcore.engine.engine import Engine
    from lmcore.engine.state import TensorState

    engine = Engine(TrainConfig(precision="fp32"), EngineConfig(), seed=1)
    module: Any = torch.nn.Module()
    module.model = torch.nn.Linear(2, 1, bias=False)
    module.model.register_buffer("seen", torch.ones(2))
    engine.prepare(
        module,
        lambda named: torch.optim.SGD([p for _, p in named], lr=1.0),
        gradient_accumulation=1,
        micro_batch_blocks=1,
    )
    pretend(monkeypatch, side_is_prompt=side_is_prompt)
    weight, buffer = torch.ones(1, 2).as_subclass(OnDevice), torch.ones(2).as_subclass(OnDevice)
    held = {"weight": weight, "seen": buffer}
    own = TensorState.held

    def on_gpu(state: TensorState, name: str, slot: str) -> Any:
        part, _, holders = own(state, name, slot)
        return part, held[name], holders

    monkeypatch.setattr(TensorState, "held", on_gpu)
    parts = engine.state_parts()
    targets = [torch.zeros(8, dtype=torch.uint8) for _ in parts]
    wait = engine.copies.begin(zip(targets, [part.tensor for part in parts]))
    if what == "buffers":
        buffer.add_(1)  # as a forward does
    elif what == "weights":
        monkeypatch.setattr(engine.optimizer, "step", lambda: weight.add_(1))
        (module.model(torch.ones(1, 2)).sum()).backward()
        engine._micro_batch = 1
        engine.update()
    else:
        monkeypatch.setattr("lmcore.engine.engine.by_name.load", lambda *_: weight.add_(1))
        engine.load_state(lambda *_: None)
    wait()
    engine.close()
    assert [target.view(torch.float32).tolist() for target in targets] == [[1.0, 1.0]] * 2


def test_memory_that_cannot_be_locked_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the CUDA runtime does: a call that fails is reported by the next launch of a kernel, once."""
    kept: list[str] = []

    def register(address: int, size: int, flags: int) -> int:
        kept.append("out of memory")
        return 2

    def launch(*shape: int, device: str) -> None:
        if kept:
            raise RuntimeError(f"CUDA error: {kept.pop()}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch, "ones", launch)
    assert len(writer._host_buffer(8, True)) == 8
    assert not kept
