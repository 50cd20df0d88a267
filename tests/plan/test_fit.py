"""Micro-batch auto: it fits, the next larger one would not, and the global batch stays the same."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from lmcore.model import optim
from lmcore.model.build import build_model
from lmcore.model.module import ModelWithLoss
from lmcore.plan import plan, trace
from lmcore.plan.plan import fitting_micro_batch

SHAPE = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}
SHARE, T = 24, 64


def make(named: list) -> object:
    return optim.build_optimizer("adamw", optim.parameter_groups(named, weight_decay=0.1), lr=1e-3)


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero2"])
def test_micro_batch_is_the_largest_divisor_that_fits(strategy: str) -> None:
    module = ModelWithLoss(
        build_model(type="gpt2", config_overrides=SHAPE, vocab_size=500, block_size=T, seed=0)
    )
    world_size = 1 if strategy == "single" else 4
    setting = plan.Setting(strategy=strategy, world_size=world_size, zero_bucket=100_000)
    counted, state = plan.parameters(module), trace.optimizer_bytes(module, make)

    def total(blocks: int) -> int:
        traced = trace.trace_step(module, micro_batch_blocks=blocks, block_size=T)
        one = replace(setting, micro_batch_blocks=blocks, accumulation=SHARE // blocks)
        return plan.memory(counted, traced, one, optimizer_bytes=state).total

    fit = partial(
        fitting_micro_batch,
        module,
        setting,
        share=SHARE,
        block_size=T,
        make_optimizer=make,
    )
    for smaller, larger in ((1, 2), (4, 6), (12, 24)):
        between = (total(smaller) + total(larger)) / 2 / plan.USABLE
        assert fit(device_bytes=int(between)) == smaller
    assert fit(device_bytes=2**40) == SHARE
    assert fit(device_bytes=1) == 1, "a model that does not fit at all is reported by the plan"
