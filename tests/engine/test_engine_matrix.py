"""The whole matrices of the engine: every mode with every accumulation, precision and model; every pair of
strategies.

Slow: ``make test-all``. The default tests hold one pairing of each (``test_engine.py``, whose words and
tolerances hold here).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import engine_runs
from tests.support.engine_runs import SEVEN, Job, assert_follows, assert_same_bits, close, largest_difference

pytestmark = pytest.mark.slow

MODELS = ("gpt2-tied", "gpt2-untied", "llama", "llama-tied")
OTHER_SIZES = ("fsdp2x3", "zero1x3", "zero2x3", "zero3x3")


@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("fp32", 3), ("bf16", 3)])
@pytest.mark.parametrize("mode", [*SEVEN, *OTHER_SIZES])
def test_every_shuffle_mode_follows_the_reference(mode: str, precision: str, accumulation: int) -> None:
    """The models rotate, so that every one meets every strategy."""
    place = [*SEVEN, *OTHER_SIZES].index(mode) + accumulation + (precision == "bf16")
    job = Job(mode=mode, model=MODELS[place % 4], precision=precision, accumulation=accumulation)
    ours, theirs = engine_runs.run(job), engine_runs.reference(job)
    assert largest_difference(ours.initial, theirs.initial) == 0
    if precision == "fp32":
        assert_follows(ours, theirs)
    else:
        close(ours.losses, theirs.losses, 2e-3)
        assert abs(ours.losses[0] / theirs.losses[0] - 1) < 1e-6


@pytest.mark.parametrize("mode", SEVEN)
@pytest.mark.parametrize("model", MODELS)
def test_sgd_under_every_model_family(mode: str, model: str) -> None:
    job = Job(mode=mode, model=model, optimizer="sgd", accumulation=3)
    ours, theirs = engine_runs.run(job), engine_runs.reference(job)
    close(ours.losses, theirs.losses, 1e-5)
    assert largest_difference(ours.weights, theirs.weights) < 1e-5


@pytest.mark.parametrize(
    ("before", "precision"), [*((mode, "fp32") for mode in SEVEN), ("single", "bf16"), ("zero3", "bf16")]
)
def test_resume_between_every_pair_of_strategies(before: str, precision: str, tmp_path: Path) -> None:
    """Saved under one, continued under each of the seven. Under the same one: bit for bit.

    What is saved is fp32 in either precision: bf16 only from the plainest and to the most cut up.
    """
    job = Job(mode=before, precision=precision, model="gpt2-tied", accumulation=1)
    whole = engine_runs.run(job, steps=8, save=str(tmp_path), save_at=4)
    for after in SEVEN:
        rest = engine_runs.run(job, mode=after, load=str(tmp_path), first_step=4, steps=4)
        if after == before:
            assert_same_bits(rest, whole)
        tolerance = 1e-5 if precision == "fp32" else 2e-3
        close(rest.losses, whole.losses[4:], tolerance)
        assert largest_difference(rest.slots, whole.slots) < (1e-6 if precision == "fp32" else 2e-3)
        assert rest.scalars == whole.scalars


@pytest.mark.parametrize("mode", OTHER_SIZES)
def test_resume_with_three_ranks_is_bit_exact(mode: str, tmp_path: Path) -> None:
    job = Job(mode=mode, accumulation=3)
    whole = engine_runs.run(job, steps=8, save=str(tmp_path), save_at=4)
    assert_same_bits(engine_runs.run(job, steps=4, first_step=4, load=str(tmp_path)), whole)
    alone = engine_runs.run(job, mode="single", accumulation=1, steps=4, first_step=4, load=str(tmp_path))
    close(alone.losses, whole.losses[4:], 1e-5)  # and another world size


STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("strategy", "size"),
    [
        *((strategy, size) for strategy in ("ddp", "fsdp2", "zero3") for size in (4, 8)),
        ("zero2", 4),
        *(pytest.param(*rest, marks=pytest.mark.long) for rest in (("zero1", 4), ("zero1", 8), ("zero2", 8))),
    ],
)
def test_resume_of_four_and_eight_ranks(strategy: str, size: int, tmp_path: Path) -> None:
    """Bit for bit on as many; the same training in one process, and in the other number under the next strategy."""
    job = Job(mode=f"{strategy}x{size}", blocks=24)
    whole = engine_runs.run(job, steps=6, save=str(tmp_path), save_at=3)
    assert_same_bits(engine_runs.run(job, load=str(tmp_path), first_step=3, steps=3), whole)
    following = STRATEGIES[(STRATEGIES.index(strategy) + 1) % len(STRATEGIES)]
    for mode in ("single", f"{following}x{12 - size}"):
        rest = engine_runs.run(job, mode=mode, load=str(tmp_path), first_step=3, steps=3)
        close(rest.losses, whole.losses[3:], 1e-5)
        assert largest_difference(rest.slots, whole.slots) < 1e-6
        assert rest.scalars == whole.scalars


@pytest.mark.parametrize("mode", SEVEN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_across_a_resume(mode: str, checkpointing: bool, tmp_path: Path) -> None:
    accumulation = 6 if mode == "single" else 2 if mode == "ddp3" else 3
    job = Job(mode=mode, dropout=0.2, accumulation=accumulation, checkpointing=checkpointing)
    whole = engine_runs.run(job, steps=6, save=str(tmp_path), save_at=3)
    assert_same_bits(engine_runs.run(job, steps=3, first_step=3, load=str(tmp_path)), whole)
    # The same micro-batches of three blocks
    alone = engine_runs.run(Job(dropout=0.2, accumulation=6, steps=6))
    close(whole.losses, alone.losses, 1e-5)


@pytest.mark.parametrize("mode", ["single", "ddp2", "fsdp2", "zero1", "zero2", "zero3"])
def test_compiled_layers(mode: str) -> None:
    """Regional compilation with recomputation, under every strategy."""
    job = Job(mode=mode, model="llama", steps=4)
    ours = engine_runs.run(job, compile=True, checkpointing=True)
    close(ours.losses, engine_runs.reference(job).losses, 1e-5)


@pytest.mark.parametrize("mode", SEVEN)
def test_nan_loss_step_is_not_applied_in_bf16(mode: str) -> None:
    job = Job(mode=mode, precision="bf16", accumulation=3, steps=4, poison=(1, 1))
    ours, theirs = engine_runs.run(job), engine_runs.reference(job)
    assert ours.applied == [True, False, True, True]
    close(ours.losses[:1] + ours.losses[2:], theirs.losses[:1] + theirs.losses[2:], 2e-3)
    assert ours.scalars["slots"] == {"step": 3.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hybrid_sharding(precision: str, tmp_path: Path) -> None:
    """HSDP, two shards twice; and from there to one process."""
    job = Job(mode="hsdp", blocks=24, accumulation=3, precision=precision, steps=8)
    whole = engine_runs.run(job, save=str(tmp_path), save_at=4)
    close(whole.losses, engine_runs.reference(job).losses, 1e-5 if precision == "fp32" else 2e-3)
    assert_same_bits(engine_runs.run(job, load=str(tmp_path), first_step=4, steps=4), whole)
    rest = engine_runs.run(job, mode="single", load=str(tmp_path), first_step=4, steps=4)
    close(rest.losses, whole.losses[4:], 1e-5 if precision == "fp32" else 2e-3)


OFFLOAD = {"device": "cpu"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_with_the_torch_optimizer(stage: int, precision: str, tmp_path: Path) -> None:
    """Nothing is compiled; the same numbers, the same checkpoint."""
    section: dict[str, Any] = {"stage": stage, "offload_optimizer": OFFLOAD}
    if stage == 3:
        section["offload_param"] = OFFLOAD
    content = {"zero_optimization": section, "zero_force_ds_cpu_optimizer": False}
    job = Job(mode=f"zero{stage}", deepspeed=content, precision=precision, steps=8)
    whole = engine_runs.run(job, save=str(tmp_path), save_at=4)
    close(whole.losses, engine_runs.reference(job).losses, 1e-5 if precision == "fp32" else 2e-3)
    assert_same_bits(engine_runs.run(job, load=str(tmp_path), first_step=4, steps=4), whole)


@pytest.mark.parametrize("mode", SEVEN)
def test_learning_rate_by_kind(mode: str, tmp_path: Path) -> None:
    """Four rates in one optimizer, under every strategy and across a resume."""
    job = Job(mode=mode, model="gpt2-untied", optimizer="adamw by kind", steps=8)
    whole = engine_runs.run(job, save=str(tmp_path), save_at=4)
    close(whole.losses, engine_runs.reference(job).losses, 1e-5)
    assert_same_bits(engine_runs.run(job, load=str(tmp_path), first_step=4, steps=4), whole)


@pytest.mark.parametrize("mode", ["single", "ddp2", "fsdp2"])
def test_muon(mode: str, tmp_path: Path) -> None:
    """Its bf16 iteration amplifies rounding (seen: 1e-4 in the norm), so that only the losses are held."""
    job = Job(mode=mode, optimizer="muon", steps=8)
    whole = engine_runs.run(job, save=str(tmp_path), save_at=4)
    close(whole.losses, engine_runs.reference(job).losses, 1e-3)
    assert_same_bits(engine_runs.run(job, load=str(tmp_path), first_step=4, steps=4), whole)


def test_resume_under_another_topology_at_every_step(tmp_path: Path) -> None:
    """One training, another strategy at each of fourteen steps, twice around."""
    losses: list[float] = []
    for step, mode in enumerate([*SEVEN, *SEVEN]):
        folder = tmp_path / f"{step}"
        folder.mkdir()
        load = str(tmp_path / f"{step - 1}") if step else ""
        losses += engine_runs.run(
            Job(mode=mode, steps=1, first_step=step, load=load, save=str(folder))
        ).losses
    close(losses, engine_runs.reference(Job(steps=14)).losses, 1e-5)


def test_weights_have_no_padding_left() -> None:
    """Three ranks and odd sizes: the padding of shards never reaches a checkpoint."""
    for mode in OTHER_SIZES:
        trace = engine_runs.run(Job(mode=mode, steps=1))
        shapes = {
            name: tuple(p.shape) for name, p in engine_runs.make_model("gpt2-tied").model.named_parameters()
        }
        assert {name: tuple(t.shape) for name, t in trace.weights.items()} == shapes
        assert all(torch.isfinite(t).all() for t in trace.slots.values())
