"""Runs two real steps and measures time and memory, which a plan cannot compute.

The steps are those of the run: its forward, backward, clipping and update, on this device, in its precision. The first step is
a warmup, of which only the memory is used. If a step has many micro-batches, only :data:`MICRO_BATCHES` of them are run, and
the time of the step is computed from theirs and that of the update. Nothing is written to the disk.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.context import Context
from lmcore.process import forget_peak, resident_bytes

if TYPE_CHECKING:
    from lmcore.engine.engine import Engine

STEPS = 2
MICRO_BATCHES = 4
"""Largest number of micro-batches that are run. Two would be enough to accumulate gradients; more measure better."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured.

    ``step_seconds`` is the time of a whole step on the slowest rank; ``micro_batches`` of its micro-batches were run.
    ``peak_bytes`` is the peak of tensors on a GPU; on a CPU, of resident memory above that before the model was built.
    """

    step_seconds: float
    first_seconds: float
    micro_batches: int
    peak_bytes: int


def probe(
    engine: Engine,
    make_module: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module, list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    make_batch: Callable[[nn.Module], Mapping[str, Any]],
    *,
    accumulation: int,
    micro_batch_blocks: int,
    clip_norm: float,
) -> Probe:
    """Build and wrap the model and train for two steps. Collective.

    Args:
        make_batch: returns a micro-batch of this rank for the module.
    """
    run = min(accumulation, MICRO_BATCHES)
    on_gpu = engine.device.type == "cuda"
    before = resident_bytes()
    module = make_module()
    batch = {
        name: value.to(engine.device) if isinstance(value, Tensor) else value
        for name, value in make_batch(module).items()
    }
    engine.prepare(
        module,
        lambda named: make_optimizer(module, named),
        gradient_accumulation=run,
        micro_batch_blocks=micro_batch_blocks,
        clip_norm=clip_norm,
    )
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(engine.device)
    else:
        forget_peak()
    labels = (
        engine.world_size
        * run
        * max(1, int((batch["labels"] != IGNORED_LABEL).sum()) if "labels" in batch else 1)
    )
    seconds: list[tuple[float, float]] = []
    for _ in range(STEPS):
        begin = _now(engine.device)
        for key in range(run):
            loss_sum, _ = engine.forward(batch, key)
            engine.backward(loss_sum, labels)
            del loss_sum
        between = _now(engine.device)
        engine.update()
        seconds.append((between - begin, _now(engine.device) - between))
    peak = torch.cuda.max_memory_allocated(engine.device) if on_gpu else resident_bytes(peak=True) - before
    passes, update = seconds[-1]
    return Probe(
        step_seconds=max(engine.gather_object(passes / run * accumulation + update)),
        first_seconds=sum(seconds[0]),
        micro_batches=run,
        peak_bytes=max(engine.gather_object(peak)),
    )


def text_batch(
    vocab_size: int, micro_batch_blocks: int, block_size: int, context: Context | None = None
) -> dict[str, Any]:
    """A micro-batch of random tokens: their values affect neither time nor memory."""
    context = context or Context()
    ids = np.random.default_rng(0).integers(vocab_size, size=(micro_batch_blocks, block_size + 1))
    positions = np.tile(np.arange(block_size), (micro_batch_blocks, 1))
    batch: dict[str, Any] = {"input_ids": context.cut(ids[:, :-1]), "labels": context.cut(ids[:, 1:])}
    if lengths := context.lengths(positions):
        batch |= {"position_ids": context.cut(positions), **lengths}
    return {
        name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
