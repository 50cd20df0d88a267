"""What the tests of the engine run in each rank, and the plain reference that they are held to.

The reference is one process of torch without accelerate: the whole global batch at once, the mean over its
tokens. A *mode* is (strategy, world size): one of ``MODES``.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

MODES = {
    "single": ("single", 1),
    "ddp2": ("ddp", 2),
    "ddp3": ("ddp", 3),
    "fsdp2": ("fsdp2", 2),
    "zero1": ("zero1", 2),
    "zero2": ("zero2", 2),
    "zero3": ("zero3", 2),
    # Other world sizes, for the slow tests.
    "fsdp2x3": ("fsdp2", 3),
    "zero1x3": ("zero1", 3),
    "zero2x3": ("zero2", 3),
    "zero3x3": ("zero3", 3),
    "zero3x1": ("zero3", 1),
    "hsdp": ("fsdp2", 4),  # two shards, twice
    **{
        f"{name}x{size}": (name, size)
        for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
        for size in (4, 8)
    },
}
SEVEN = ("single", "ddp2", "ddp3", "fsdp2", "zero1", "zero2", "zero3")
BLOCKS = 18  # of the global batch: divided by 1, 2, 3 ranks and 1, 3 micro-batches
BLOCK_SIZE = 10
VOCAB = 67


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training. ``folder``: where to save at the end (with ``save``) or load from at the start (with
    ``load``)."""

    mode: str = "single"
    model: str = "gpt2-tied"
    accumulation: int = 1
    blocks: int = BLOCKS
    precision: str = "fp32"
    param_dtype: str = "fp32"
    residual_dtype: str = "auto"
    reduce_dtype: str = "fp32"
    optimizer: str = "adamw"
    steps: int = 20
    first_step: int = 0
    clip_norm: float = 1.0
    dropout: float = 0.0
    checkpointing: bool = False
    compile: bool = False
    context_parallel: int = 1
    tensor_parallel: int = 1
    save: str = ""
    save_at: int = -1  # the step before which it saves; -1: at the end
    load: str = ""
    poison: tuple[int, int] | None = None  # (step, micro-batch): NaN there, on the last rank
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What rank 0 saw."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    rates: list[float]
    initial: dict[str, Tensor]
    weights: dict[str, Tensor]
    slots: dict[tuple[str, str], Tensor]
    scalars: dict[str, Any]


def make_model(name: str, dropout: float = 0.0, weights: bool = True) -> nn.Module:
    """A tiny model with its loss, the same weights in every process, or none; odd sizes, which no world size
    divides."""
    from lmcore.model.build import build_model
    from lmcore.model.module import ModelWithLoss

    common = {"block_size": BLOCK_SIZE, "vocab_size": VOCAB, "special_ids": {}, "seed": 3}
    common |= {"weights": weights}
    if name.startswith("gpt2"):
        fields: dict[str, Any] = {"n_layer": 2, "n_embd": 15, "n_head": 3, "n_positions": 16}
        fields |= {f"{part}_pdrop": dropout for part in ("embd", "resid", "attn")}
        fields["tie_word_embeddings"] = name == "gpt2-tied"
        model = build_model(type="gpt2", config_overrides=fields, **common)
    else:
        fields = {
            "num_hidden_layers": 2,
            "hidden_size": 18,
            "intermediate_size": 35,
            "num_attention_heads": 3,
        }
        fields |= {"num_key_value_heads": 1, "max_position_embeddings": 16}
        if name == "llama-even":  # which two ranks can share
            fields |= {
                "hidden_size": 16,
                "intermediate_size": 36,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        fields["tie_word_embeddings"] = name == "llama-tied"
        model = build_model(type="llama", config_overrides=fields, **common)
    return ModelWithLoss(model)


def batch_of(step: int, blocks: int = BLOCKS) -> dict[str, Tensor]:
    """The global batch of a step (blocks, BLOCK_SIZE); labels are ragged: every block has its own number."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCAB, (blocks, BLOCK_SIZE + 1), generator=generator)
    labels = ids[:, 1:].clone()
    keep = torch.randint(0, BLOCK_SIZE + 1, (blocks,), generator=generator)
    keep[5] = 0  # a whole block of padding
    labels[torch.arange(BLOCK_SIZE)[None] >= keep[:, None]] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def rate(step: int) -> float:
    """The learning rate, a pure function of the step."""
    return 1e-2 * (step + 1) / 5 if step < 5 else 1e-2 * (1 - step / 40)


def make_optimizer(name: str) -> Any:
    """Groups with decay and without, as in real runs; ``adamw by kind``: with a rate of its own for each kind."""
    multipliers = {"matrices": 1.0, "embedding": 3.0, "head": 0.3, "vectors": 2.0}

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        from lmcore.model import optim

        kind = multipliers if name.endswith(" by kind") else None
        groups = optim.parameter_groups(named, weight_decay=0.1, lr_multipliers=kind)
        return optim.build_optimizer(name.removesuffix(" by kind"), groups, lr=0.5, momentum=0.9)

    return make


def reference(job: Job) -> Trace:
    """Plain PyTorch, one process, no accelerate.

    fp32: the whole batch at once. bf16 rounds, so that the reference must round at the same places: it takes
    the same slices of the batch, and computes by autocast as DDP does, or in a bf16 copy of fp32 weights as
    FSDP2 and ZeRO do; bf16 parameters (``param_dtype``) have their gradients summed in fp32, and rounded once.
    """
    strategy, world_size = MODES[job.mode]
    module = make_model(job.model)
    named = [(n.removeprefix("model."), p) for n, p in module.named_parameters()]
    initial = {n: p.detach().clone() for n, p in named}
    optimizer = make_optimizer(job.optimizer)(named)
    in_bf16 = job.precision == "bf16"
    with_copy = in_bf16 and strategy not in ("single", "ddp")
    with_sums = job.param_dtype == "bf16"
    worker = copy.deepcopy(module) if with_copy else module
    for p in worker.parameters():
        p.data = p.data.to(torch.bfloat16 if with_copy or with_sums else torch.float32)
    slices = world_size * job.accumulation if in_bf16 else 1
    losses, norms, rates = [], [], []
    for step in range(job.first_step, job.first_step + job.steps):
        batch, total = batch_of(step, job.blocks), 0.0
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in module.parameters()]
        count = (batch["labels"] != -100).sum()
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["lr_multiplier"]
        rates.append(rate(step))
        for part in range(slices):
            rows = slice(part * job.blocks // slices, (part + 1) * job.blocks // slices)
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16 and not with_copy):
                loss_sum, _ = worker(**{k: v[rows] for k, v in batch.items()})
            (loss_sum / count).backward()
            total += float(loss_sum.detach())
            if with_copy:
                for mine, theirs in zip(module.parameters(), worker.parameters()):
                    mine.grad = theirs.grad.float() + (0 if mine.grad is None else mine.grad)
                    theirs.grad = None
            elif with_sums:
                for mine, gradients in zip(module.parameters(), sums):
                    gradients += mine.grad
                    mine.grad = None
        if with_sums:
            norm = torch.stack([gradients.norm() for gradients in sums]).norm()
            for mine, gradients in zip(module.parameters(), sums):
                mine.grad = (gradients * min(1.0, job.clip_norm / float(norm))).to(torch.bfloat16)
        else:
            norm = nn.utils.clip_grad_norm_(module.parameters(), job.clip_norm or torch.inf)
        if job.poison is None or job.poison[0] != step:
            optimizer.step()
        optimizer.zero_grad()
        if with_copy:
            for mine, theirs in zip(module.parameters(), worker.parameters()):
                theirs.data.copy_(mine.detach())
        losses.append(total / int(count))
        norms.append(float(norm))
    weights = {n: p.detach().clone() for n, p in named}
    slots = {
        (n, slot): v
        for n, p in named
        for slot, v in optimizer.state[p].items()
        if torch.is_tensor(v) and v.ndim
    }
    return Trace(
        losses=losses, norms=norms, applied=[True] * job.steps, rates=rates, initial=initial, weights=weights,
        slots=slots, scalars={},
    )  # fmt: skip


def pretend_gpus() -> None:
    """Let accelerate shard with FSDP2 on a CPU: it refuses to, so it is told that the CPU is an XPU.

    For tests only. This uses private state of accelerate 1.15; nothing in lmcore does.
    """
    from accelerate import DistributedType, PartialState

    PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def make_engine(job: Job) -> Any:
    """The engine of a mode, as the launcher would have it."""
    from lmcore.config.schema import EngineConfig, TrainConfig
    from lmcore.engine.engine import Engine

    strategy, _ = MODES[job.mode]
    deepspeed = None
    if strategy == "fsdp2":
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        if job.mode == "hsdp":
            os.environ.update(
                ACCELERATE_USE_PARALLELISM_CONFIG="true",
                PARALLELISM_CONFIG_DP_REPLICATE_SIZE="2",
                PARALLELISM_CONFIG_DP_SHARD_SIZE="2",
            )
        pretend_gpus()
    elif strategy.startswith("zero"):
        content = {"zero_optimization": {"stage": int(strategy[-1])}, **job.deepspeed}
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(content, file)
        deepspeed = file.name
    precision: Any = job.precision
    param_dtype: Any = job.param_dtype
    reduce_dtype: Any = job.reduce_dtype
    residual_dtype: Any = job.residual_dtype
    engine = Engine(
        TrainConfig(
            precision=precision,
            param_dtype=param_dtype,
            residual_dtype=residual_dtype,
            compile=job.compile,
            activation_checkpointing=job.checkpointing,
            context_parallel=job.context_parallel,
            tensor_parallel=job.tensor_parallel,
        ),
        EngineConfig(reduce_dtype=reduce_dtype, deepspeed=deepspeed, timeout_seconds=200),
        seed=11,
    )
    if deepspeed:
        os.unlink(deepspeed)
    assert engine.strategy == strategy
    return engine


def train(job: Job) -> Trace | None:
    """One training in this rank. The result is rank 0's."""
    engine = make_engine(job)
    module = make_model(job.model, job.dropout, engine.needs_weights)
    micro = job.blocks // engine.world_size // job.accumulation
    engine.prepare(
        module,
        make_optimizer(job.optimizer),
        gradient_accumulation=job.accumulation,
        micro_batch_blocks=micro,
        clip_norm=job.clip_norm,
    )
    initial = {name: tensor.clone() for _, name, _, tensor in engine.state() if tensor is not None}
    if job.load:
        load(engine, job.load)
    losses, norms, applied, rates = [], [], [], []
    for step in range(job.first_step, job.first_step + job.steps):
        if job.save and job.save_at == step:
            save(engine, job.save)
        batch = batch_of(step, job.blocks)
        count = int((batch["labels"] != -100).sum())
        engine.set_learning_rate(rate(step))
        total = torch.zeros((), dtype=torch.float64)
        for index in range(job.accumulation):
            # Contiguous slices of the global batch: micro-batch after micro-batch, rank after rank within it.
            number = index * engine.world_size + engine.rank
            part = {k: v[number * micro : (number + 1) * micro] for k, v in batch.items()}
            key = step * job.blocks // micro + number
            loss_sum, _ = engine.forward(part, key)
            last_rank = engine.rank == engine.world_size - 1
            if job.poison == (step, index) and last_rank:
                loss_sum = loss_sum * torch.nan
            engine.backward(loss_sum, count)
            total += loss_sum.detach().double()
        rates.append(engine.optimizer.param_groups[0]["lr"])
        norm, good = engine.update()
        losses.append(float(engine.sum_over_ranks(total)) / count)
        norms.append(float(norm))
        applied.append(bool(good))
    if job.save and job.save_at < 0:
        save(engine, job.save)
    layout = engine.state_layout()
    state = {(kind, name, slot): tensor for kind, name, slot, tensor in engine.state()}
    assert list(state) == [(e.kind, e.name, e.slot) for e in layout]
    if engine.is_main:
        assert [(tuple(t.shape), t.dtype) for t in state.values()] == [(e.shape, e.dtype) for e in layout]
    scalars = engine.optimizer_scalars()
    trace = Trace(
        losses=losses, norms=norms, applied=applied, rates=rates, initial=initial,
        weights={name: t for (kind, name, _), t in state.items() if kind == "model"},
        slots={(name, slot): t for (kind, name, slot), t in state.items() if kind == "optim"},
        scalars=scalars,
    )  # fmt: skip
    main = engine.is_main
    engine.close()
    return trace if main else None


def save(engine: Any, folder: str) -> None:
    """A checkpoint, written by all ranks, and nothing else in it but the optimizer's numbers."""
    from lmcore.checkpoint.writer import Checkpoints
    from lmcore.config.schema import CheckpointConfig

    saves = Checkpoints(CheckpointConfig(), folder, ranks=engine, note=lambda text: None)
    saves.save(1, tensors=engine.state_parts(), state={"scalars": engine.optimizer_scalars()})
    saves.wait(final=True)


def load(engine: Any, folder: str) -> None:
    """Every rank reads its own parts, after all have verified the files together."""
    from lmcore.checkpoint.reader import find, open_checkpoint
    from lmcore.engine.ranks import hashing_together

    path = hashing_together(engine, lambda hashes: find(folder, hashes=hashes).path)
    with open_checkpoint(path, verify_bytes=False) as checkpoint:
        engine.load_state(checkpoint.stored)
        engine.load_optimizer_scalars(checkpoint.state["scalars"])


def run(job: Job, **changes: Any) -> Trace:
    """Train in the mode's ranks, in forked processes."""
    from tests.support.fork_server import run_ranks

    job = replace(job, **changes)
    strategy, world_size = MODES[job.mode]
    return run_ranks(train, world_size, job, timeout=240, launched=strategy != "single")[0]


def close(ours: list[float], theirs: list[float], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=0)


def largest_difference(ours: dict[Any, Tensor], theirs: dict[Any, Tensor], skip: str = "none") -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs if skip not in str(key))


def assert_follows(ours: Trace, theirs: Trace) -> None:
    """fp32: the losses, the norms, Adam's moments and the weights, key biases apart."""
    close(ours.losses, theirs.losses, 1e-5)
    close(ours.norms, theirs.norms, 1e-5)
    assert largest_difference(ours.weights, theirs.weights, skip="attn.c_attn.bias") < 1e-5
    assert largest_difference(ours.slots, theirs.slots) < 1e-6


def assert_same_bits(ours: Trace, theirs: Trace) -> None:
    assert ours.losses == theirs.losses[-len(ours.losses) :]
    assert ours.norms == theirs.norms[-len(ours.norms) :]
    for mine, other in ((ours.weights, theirs.weights), (ours.slots, theirs.slots)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert ours.scalars == theirs.scalars
