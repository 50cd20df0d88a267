"""What the tests of the plan run in each rank: a training whose tensor memory is counted by torch's profiler."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.support.engine_runs import pretend_gpus


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training; ``fields`` are the model's config fields."""

    strategy: str = "single"
    world_size: int = 1
    type: str = "gpt2"
    fields: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 1_000
    block_size: int = 64
    micro_batch_blocks: int = 2
    accumulation: int = 1
    precision: str = "fp32"
    param_dtype: str = "fp32"
    checkpointing: bool = False
    chunk: int | None = None
    optimizer: str = "adamw"
    zero: dict[str, Any] = field(default_factory=dict)
    steps: int = 4


def make_module(case: Case) -> nn.Module:
    from lmcore.model.build import build_model
    from lmcore.model.module import ModelWithLoss

    model = build_model(
        type=case.type,
        config_overrides=case.fields,
        vocab_size=case.vocab_size,
        block_size=case.block_size,
        seed=0,
    )
    return ModelWithLoss(model, chunk="auto" if case.chunk is None else case.chunk)


def make_engine(case: Case) -> Any:
    from lmcore.config.schema import EngineConfig, TrainConfig
    from lmcore.engine.engine import Engine

    deepspeed = None
    if case.strategy == "fsdp2":
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        pretend_gpus()
    elif case.strategy.startswith("zero"):
        section = {"stage": int(case.strategy[-1]), **case.zero}
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump({"zero_optimization": section}, file)
        deepspeed = file.name
    precision: Any = case.precision
    param_dtype: Any = case.param_dtype
    return Engine(
        TrainConfig(
            precision=precision, param_dtype=param_dtype, activation_checkpointing=case.checkpointing
        ),
        EngineConfig(deepspeed=deepspeed, timeout_seconds=200),
    )


def prepare(engine: Any, case: Case) -> None:
    from lmcore.model import optim

    def make_optimizer(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = optim.parameter_groups(named, weight_decay=0.1)
        return optim.build_optimizer(case.optimizer, groups, lr=1e-3)

    engine.prepare(
        make_module(case),
        make_optimizer,
        gradient_accumulation=case.accumulation,
        micro_batch_blocks=case.micro_batch_blocks,
        clip_norm=1.0,
    )


def run_step(engine: Any, case: Case) -> None:
    shape = (case.micro_batch_blocks, case.block_size)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.ones(shape, dtype=torch.int64),
    }
    for part in range(case.accumulation):
        loss_sum, _ = engine.forward(batch, part)
        engine.backward(loss_sum, shape[0] * shape[1] * case.accumulation * case.world_size)
        del loss_sum
    engine.update()


def measured_resident_bytes(case: Case) -> int:
    """The most memory in RAM of rank 0 during steps, above what the process held before its model."""
    from lmcore.process import forget_peak, resident_bytes

    engine = make_engine(case)
    before = resident_bytes()
    prepare(engine, case)
    gc.collect()
    assert forget_peak()
    for _ in range(2):
        run_step(engine, case)
    peak = resident_bytes(peak=True) - before
    engine.close()
    return peak


def measured_peak_bytes(case: Case) -> int:
    """The most tensor memory that rank 0 holds at once in a step, everything included."""
    from torch.profiler import ProfilerActivity, profile, record_function

    engine = make_engine(case)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepare(engine, case)
        for step in range(case.steps):
            gc.collect()  # what lives on in cycles is luck, and the run collects before its loop
            with record_function(f"step {step}"):
                run_step(engine, case)
    engine.close()
    events = profiler.profiler.kineto_results.events()
    begins = sorted(e.start_ns() for e in events if e.name().startswith("step "))
    peaks = dict.fromkeys(begins, 0)
    now = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        step_begin = max((begin for begin in begins if begin <= event.start_ns()), default=None)
        if step_begin is not None:
            peaks[step_begin] = max(peaks[step_begin], now)
    # gloo's threads hold the buffers of a finished collective until their next one: the least of the steps after the
    # first, which makes the optimizer's state, is what the strategy itself needs.
    return min(peaks[begin] for begin in begins[1:])


def measure(case: Case, how: Callable[[Case], int] = measured_peak_bytes) -> int:
    """What is measured in forked ranks, of the first one."""
    from tests.support.fork_server import run_ranks

    return run_ranks(how, case.world_size, case, timeout=240, launched=case.strategy != "single")[0]
