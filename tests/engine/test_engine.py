"""The engine: every strategy gives the training of thirty lines of plain PyTorch, and takes over every
other's state.

The default tests hold one pairing of every mode; ``test_engine_matrix.py`` has the rest. Tolerances: fp32
losses and norms 1e-5 relative (seen: 5e-7); SGD weights 1e-5. Under Adam a parameter whose true gradient is
zero, as a key's bias is (softmax does not see a shift of all keys' scores), moves by its sign of rounding
noise: such are left to SGD. bf16: a difference of 1e-8 between two orders of summation can flip the rounding
of a weight's bf16 copy (4e-3 relative), so that the first step is held tightly and twenty steps to 2e-3.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmcore.checkpoint.pieces import Part, cut
from lmcore.config.schema import EngineConfig, TrainConfig
from lmcore.engine.gradients import WideGradients, naming_unused_parameters
from lmcore.engine.ranks import on_main
from lmcore.engine.state import TensorState, is_slot, load_scalars, refuse_other_state, scalars
from lmcore.errors import RequestError
from lmcore.saved.generate import generate
from tests.support import engine_runs
from tests.support.engine_runs import (
    SEVEN,
    Job,
    Trace,
    assert_follows,
    assert_same_bits,
    close,
    largest_difference,
)
from tests.support.fork_server import RankFailure, run_ranks


class WholeTensor:
    """A tensor in memory, read as one of a checkpoint is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self.shape = tensor, tuple(tensor.shape)

    def read(self, part: Part | None = None) -> Tensor:
        return cut(self._tensor, part)


# mode -> model and accumulation: every value of each meets every kind of strategy.
PAIRING = {
    "single": ("gpt2-tied", 3),
    "ddp2": ("llama", 1),
    "ddp3": ("gpt2-untied", 3),
    "fsdp2": ("gpt2-tied", 3),
    "zero1": ("gpt2-untied", 1),
    "zero2": ("llama-tied", 3),
    "zero3": ("gpt2-tied", 1),
}
HALF = 10


def job_of(mode: str, **changes: Any) -> Job:
    model, accumulation = PAIRING[mode]
    return replace(Job(mode=mode, model=model, accumulation=accumulation), **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """mode -> (trace of twenty fp32 Adam steps, folder of the checkpoint of its tenth), each run once."""
    done: dict[str, tuple[Trace, str]] = {}

    def of(mode: str) -> tuple[Trace, str]:
        if mode not in done:
            folder = str(tmp_path_factory.mktemp(mode))
            done[mode] = engine_runs.run(job_of(mode, save=folder, save_at=HALF)), folder
        return done[mode]

    return of


# ---- the same training (laws 8, 9, 11) ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", SEVEN)
def test_fp32_follows_the_plain_reference(mode: str, straight: Any) -> None:
    """Ragged labels, accumulation, clipping, two groups, a rate that changes every step."""
    ours, _ = straight(mode)
    theirs = engine_runs.reference(job_of(mode))
    assert largest_difference(ours.initial, theirs.initial) == 0  # bit for bit, from one seed
    assert_follows(ours, theirs)
    assert ours.rates == theirs.rates
    assert ours.applied == [True] * 20
    assert ours.scalars["slots"] == {"step": 20.0}


@pytest.mark.parametrize("mode", SEVEN)
def test_sgd_weights_follow_the_plain_reference(mode: str) -> None:
    """Every weight, the biases of the keys too; with the other accumulation."""
    job = job_of(mode, optimizer="sgd", model="gpt2-tied", accumulation=4 - PAIRING[mode][1])
    ours, theirs = engine_runs.run(job), engine_runs.reference(job)
    close(ours.losses, theirs.losses, 1e-5)
    assert largest_difference(ours.weights, theirs.weights) < 1e-5
    assert largest_difference(ours.slots, theirs.slots) < 1e-5


@pytest.mark.parametrize("mode", SEVEN)
def test_bf16_follows_the_reference_that_rounds_at_the_same_places(mode: str) -> None:
    job = job_of(mode, precision="bf16", accumulation=4 - PAIRING[mode][1])
    ours, theirs = engine_runs.run(job), engine_runs.reference(job)
    assert largest_difference(ours.initial, theirs.initial) == 0  # DeepSpeed alone would round them
    assert all(weight.dtype == torch.float32 for weight in ours.weights.values())
    assert abs(ours.losses[0] / theirs.losses[0] - 1) < 1e-6
    # Three ranks scale the loss by 3, which is no power of two: gradients round elsewhere.
    assert abs(ours.norms[0] / theirs.norms[0] - 1) < (1e-3 if mode == "ddp3" else 1e-5)
    close(ours.losses, theirs.losses, 2e-3)


@pytest.mark.parametrize("mode", ["fsdp2", "zero1", "zero2", "zero3"])
def test_clipping_is_done_by_the_run(mode: str) -> None:
    """DeepSpeed would take 1.0 where it is told nothing, and accelerate's own clipping does nothing there."""
    job = job_of(mode, optimizer="sgd", steps=3, clip_norm=0.1)
    ours, theirs = engine_runs.run(job), engine_runs.reference(job)
    assert min(theirs.norms) > 0.5  # it clips
    close(ours.norms, theirs.norms, 1e-5)
    assert largest_difference(ours.weights, theirs.weights) < 1e-5
    free = engine_runs.reference(replace(job, clip_norm=1.0))
    assert largest_difference(theirs.weights, free.weights) > 1e-3  # and 1.0 would show


@pytest.mark.parametrize(("mode", "accumulation"), [("single", 9), ("ddp2", 1), ("ddp3", 3)])
def test_gradients_of_bf16_weights_are_summed_in_fp32(mode: str, accumulation: int) -> None:
    """Over micro-batches and over ranks, rounded once, against a reference that does so."""
    job = Job(mode=mode, accumulation=accumulation, precision="bf16", param_dtype="bf16", steps=8)
    ours, theirs = engine_runs.run(job), engine_runs.reference(job)
    assert all(weight.dtype == torch.bfloat16 for weight in ours.weights.values())
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
    # Three ranks scale the loss by 3, which is no power of two: gradients round elsewhere.
    assert ours.norms[0] == pytest.approx(theirs.norms[0], rel=1e-3 if mode == "ddp3" else 1e-6)
    close(ours.losses, theirs.losses, 2e-3)
    # Summed in bf16 they are others.
    narrow = engine_runs.run(job, reduce_dtype="bf16", steps=1)
    assert narrow.norms[0] != pytest.approx(theirs.norms[0], rel=1e-4)


def test_bf16_weights_resume_bit_exactly_and_skip_a_step_that_is_not_finite(tmp_path: Path) -> None:
    job = Job(mode="ddp2", accumulation=3, precision="bf16", param_dtype="bf16", steps=6, poison=(1, 0))
    whole = engine_runs.run(job, save=str(tmp_path), save_at=3)
    assert whole.applied == [True, False, True, True, True, True]
    assert_same_bits(engine_runs.run(job, load=str(tmp_path), first_step=3, steps=3), whole)


@pytest.mark.parametrize("mode", [mode for mode in SEVEN if mode not in ("single", "ddp3")])
def test_dropout_is_keyed_by_the_micro_batch(mode: str) -> None:
    """Two ranks have the masks of one rank with accumulation, and layers recomputed in backward have them
    too."""
    job = Job(accumulation=2, dropout=0.3, steps=4)
    alone = engine_runs.run(job)
    together = engine_runs.run(job, mode=mode, accumulation=1, checkpointing=True)
    close(together.losses, alone.losses, 1e-5)
    close(together.norms, alone.norms, 1e-5)
    assert alone.losses != engine_runs.run(job, dropout=0.0).losses


# ---- one state for all (law 16) ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SEVEN)
def test_resume_is_bit_exact(mode: str, straight: Any) -> None:
    """Saved in the middle, continued in new processes; saving itself changed nothing (the run was saved)."""
    whole, folder = straight(mode)
    rest = engine_runs.run(job_of(mode, load=folder, first_step=HALF, steps=20 - HALF))
    assert_same_bits(rest, whole)


RING = [("single", "ddp3"), ("ddp3", "fsdp2"), ("fsdp2", "zero1"), ("zero1", "zero3"), ("zero3", "zero2")]
RING += [("zero2", "ddp2"), ("ddp2", "single")]


@pytest.mark.parametrize(("before", "after"), RING)
def test_checkpoint_opens_under_another_strategy(before: str, after: str, tmp_path: Path) -> None:
    """One ring through all seven; weights, moments and losses as if the strategy had never changed."""
    model = PAIRING[before][0]
    first = engine_runs.run(job_of(before, save=str(tmp_path), steps=4, optimizer="adamw"))
    job = job_of(after, model=model, load=str(tmp_path), first_step=4, steps=4)
    rest, theirs = engine_runs.run(job), engine_runs.reference(Job(model=model, steps=8))
    close(first.losses + rest.losses, theirs.losses, 1e-5)
    close(first.norms + rest.norms, theirs.norms, 1e-5)
    assert largest_difference(rest.slots, theirs.slots) < 1e-6
    assert rest.scalars == {"slots": {"step": 8.0}}


def take_state_of_another_model(folder: str) -> str:
    engine = engine_runs.make_engine(Job())
    engine.prepare(
        engine_runs.make_model("llama"),
        engine_runs.make_optimizer("sgd"),
        gradient_accumulation=1,
        micro_batch_blocks=1,
    )
    try:
        engine_runs.load(engine, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.close()
    return ""


def test_checkpoint_of_another_model_is_refused(straight: Any) -> None:
    _, folder = straight("single")
    assert (
        "RequestError: the checkpoint has no tensor" in run_ranks(take_state_of_another_model, 1, folder)[0]
    )


class HalfMomentum(torch.optim.Optimizer):
    """SGD whose momentum is kept in bf16, elementwise."""

    elementwise = True

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                held = state.setdefault("momentum", torch.zeros_like(p, dtype=torch.bfloat16))
                held.mul_(0.9).add_(p.grad.to(torch.bfloat16))
                p.sub_(held.to(p.dtype), alpha=float(group["lr"]))


def state_of_two_byte_tensors(mode: str) -> dict[str, Any]:
    """bf16 moments, and a frozen weight that ZeRO-3 keeps in bf16: gathered, and loaded again."""
    engine = engine_runs.make_engine(Job(mode=mode, precision="bf16"))
    module = engine_runs.make_model("gpt2-tied", weights=engine.needs_weights)
    module.model.transformer.wpe.weight.requires_grad_(False)
    engine.prepare(
        module,
        lambda named: HalfMomentum([{"params": [p for _, p in named if p.requires_grad]}]),
        gradient_accumulation=1,
        micro_batch_blocks=9,
        clip_norm=1.0,
    )
    batch = {k: v[9 * engine.rank : 9 * engine.rank + 9] for k, v in engine_runs.batch_of(0).items()}
    engine.set_learning_rate(0.1)
    loss_sum, _ = engine.forward(batch, 0)
    engine.backward(loss_sum, 100)
    engine.update()
    first = {(kind, name, slot): tensor for kind, name, slot, tensor in engine.state()}
    kept = engine.broadcast_object(first)
    engine.load_state(lambda kind, name, slot: WholeTensor(kept[kind, name, slot]))
    again = {(kind, name, slot): tensor for kind, name, slot, tensor in engine.state()}
    engine.close()
    return {"first": first, "again": again}


@pytest.mark.parametrize("mode", ["zero1", "zero3"])
def test_zero_checkpoint_holds_bf16_moments_and_frozen_bf16_weights(mode: str) -> None:
    main = run_ranks(state_of_two_byte_tensors, 2, mode)[0]
    first, again = main["first"], main["again"]
    moments = {key: t for key, t in first.items() if key[2] == "momentum"}
    assert moments
    assert {t.dtype for t in moments.values()} == {torch.bfloat16}
    assert max(float(t.float().abs().max()) for t in moments.values()) > 0
    assert all(torch.equal(first[key], again[key]) for key in first)
    frozen = engine_runs.make_model("gpt2-tied").model.transformer.wpe.weight.detach()
    stored = first["model", "transformer.wpe.weight", ""]
    torch.testing.assert_close(stored.float(), frozen.to(torch.bfloat16).float(), rtol=0, atol=0)


# ---- the finite gate (law 12) ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SEVEN)
def test_nan_loss_step_is_not_applied(mode: str) -> None:
    """NaN in one micro-batch of one rank: no rank takes the step, the next ones go on as if it had not
    been."""
    job = job_of(mode, steps=4, poison=(1, 0), model="gpt2-tied")
    ours, theirs = engine_runs.run(job), engine_runs.reference(job)
    assert ours.applied == [True, False, True, True]
    assert not torch.isfinite(torch.tensor(ours.norms[1]))
    close(ours.losses[:1] + ours.losses[2:], theirs.losses[:1] + theirs.losses[2:], 1e-5)
    assert largest_difference(ours.slots, theirs.slots) < 1e-6
    assert ours.scalars["slots"] == {"step": 3.0}


# ---- the whole model, and talking between ranks ------------------------------------------------------------


class Letters:
    """A tokenizer of 67 letters from '0' on; the last one ends a document."""

    vocab_size = engine_runs.VOCAB
    eos_id = engine_runs.VOCAB - 1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("0") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("0") + i) for i in ids)


def continued(engine: Any, model: nn.Module, forward: Callable[..., Any], temperature: float) -> list[str]:
    """Longer than the context of 16 tokens, so that the window moves twice; as ``Evaluator.samples`` calls it."""

    def agreed(choice: Callable[[], int]) -> int:
        return int(on_main(engine, choice)) if engine is not None and engine.sharded else choice()

    return generate(model, Letters(), ["", "ABC"], 30, temperature=temperature, forward=forward, agree=agreed)


def sample_and_talk(mode: str) -> dict[str, Any]:
    """Two steps; then the model for sampling, its logits, and one step more; and every way to talk."""
    engine = engine_runs.make_engine(Job(mode=mode))
    model = engine_runs.make_model("gpt2-tied")
    # A frozen parameter and a persistent buffer: both belong to a checkpoint.
    model.model.transformer.wpe.weight.requires_grad_(False)
    model.model.register_buffer("note", torch.arange(3.0))
    micro = 6 // engine.world_size
    engine.prepare(
        model,
        engine_runs.make_optimizer("adamw"),
        gradient_accumulation=1,
        micro_batch_blocks=micro,
        clip_norm=1.0,
    )
    state: dict[str, Tensor] = {}
    logits, texts = None, None
    for step in range(3):
        batch = {
            k: v[engine.rank * micro : (engine.rank + 1) * micro]
            for k, v in engine_runs.batch_of(step).items()
        }
        engine.set_learning_rate(1e-2)
        loss_sum, _ = engine.forward(batch, step)
        engine.backward(loss_sum, 40)
        engine.update()
        if step == 1:
            state = {name: t for kind, name, _, t in engine.state() if kind == "model" and t is not None}
            with engine.sampling() as sampling:
                assert (sampling is None) == (not engine.is_main and not engine.sharded)
                if sampling is not None:
                    assert not sampling.model.training
                    logits = sampling.forward(input_ids=engine_runs.batch_of(9)["input_ids"]).logits
                    texts = [continued(engine, *sampling, temperature) for temperature in (0, 1.0)]
            with engine.evaluation(), torch.no_grad():
                held_out, _ = engine.forward(batch)
            assert model.training
    flags = engine.agree(1 << engine.rank | 1 << 40)
    ranks = engine.gather_object(engine.rank)
    word = engine.broadcast_object("from 0" if engine.is_main else "wrong")
    total = engine.sum_over_ranks(torch.tensor([1.0, engine.rank]))
    engine.barrier("here")
    answer = {
        "state": state,
        "logits": logits,
        "texts": texts,
        "held_out": float(held_out),
        "final": float(loss_sum),
    }
    answer |= {
        "flags": flags,
        "ranks": ranks,
        "word": word,
        "total": total.tolist(),
        "rows": engine.describe(),
    }
    engine.close()
    return answer


def as_a_plain_model(state: dict[str, Tensor]) -> nn.Module:
    model = engine_runs.make_model("gpt2-tied").model
    missing = model.load_state_dict({k: v for k, v in state.items() if k != "note"}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # tied
    return model.eval()


@pytest.mark.parametrize("mode", ["single", "ddp2", "fsdp2", "zero2", "zero3"])
def test_sampling_equals_the_whole_model(mode: str) -> None:
    """The same logits and texts as of one process that loads the gathered state; on every rank where it is sharded."""
    strategy, world_size = engine_runs.MODES[mode]
    answers = run_ranks(sample_and_talk, world_size, mode, launched=strategy != "single")
    main = answers[0]
    with torch.no_grad():
        logits = as_a_plain_model(main["state"])(input_ids=engine_runs.batch_of(9)["input_ids"]).logits
    whole = as_a_plain_model(main["state"])
    whole.real_vocab_size = engine_runs.VOCAB
    texts = [continued(None, whole, whole, temperature) for temperature in (0, 1.0)]
    assert len({text for pair in texts for text in pair}) > 2
    for answer in answers if strategy in ("fsdp2", "zero3") else [main]:
        torch.testing.assert_close(answer["logits"], logits, rtol=1e-6, atol=1e-6)
        assert answer["texts"] == texts
    torch.testing.assert_close(main["state"]["note"], torch.arange(3.0))
    frozen = engine_runs.make_model("gpt2-tied").model.transformer.wpe.weight
    torch.testing.assert_close(main["state"]["transformer.wpe.weight"], frozen.detach(), rtol=0, atol=0)
    for answer in answers:
        assert answer["flags"] == (1 << world_size) - 1 | 1 << 40
        assert answer["ranks"] == list(range(world_size))
        assert answer["word"] == "from 0"
        assert answer["total"] == [world_size, sum(range(world_size))]
        assert ("strategy", strategy) in answer["rows"]


def sample_with_unequal_logits() -> dict[str, Any]:
    """Rank 1 computes other logits, as another device would by its last bits; here by much more."""
    engine = engine_runs.make_engine(Job(mode="fsdp2"))
    module: Any = engine_runs.make_model("gpt2-untied", weights=engine.needs_weights)
    layers = module.model.transformer.h
    engine.prepare(module, engine_runs.make_optimizer("adamw"), gradient_accumulation=1, micro_batch_blocks=1)
    shapes = set()
    layers[1].register_forward_hook(
        lambda *_: shapes.add(
            (type(layers[0].mlp.c_fc.weight).__name__, type(layers[1].ln_1.weight).__name__)
        )
    )

    def noisy(**inputs: Any) -> Any:
        outputs = sampling.forward(**inputs)
        outputs.logits += engine.rank * torch.randn(outputs.logits.shape, generator=noise)
        return outputs

    noise = torch.Generator().manual_seed(0)
    with engine.sampling() as sampling:
        texts = continued(engine, sampling.model, noisy, 1.0)
    kinds = {type(parameter).__name__ for parameter in module.parameters()}
    engine.close()
    return {"texts": texts, "shapes": shapes, "kinds": kinds}


def test_sampling_ranks_take_the_tokens_of_rank_0() -> None:
    """They stop together whatever they compute; and no rank ever has two layers whole."""
    first, second = run_ranks(sample_with_unequal_logits, 2)
    assert first["texts"] == second["texts"]
    assert first["texts"] != ["", ""]
    for answer in (first, second):
        assert {layer for layer, _ in answer["shapes"]} == {"DTensor"}
        assert answer["kinds"] == {"DTensor"}


def stay_away(done: str) -> str:
    import time
    from datetime import timedelta

    from lmcore.engine.engine import Engine
    from lmcore.engine.ranks import Ranks

    engine = Engine(TrainConfig(precision="fp32"), EngineConfig(timeout_seconds=200))
    engine.barrier()  # both are here: the short timeout is not for starting up
    ranks = Ranks(timedelta(seconds=8))
    if engine.rank == 1:
        while not Path(done).exists():
            time.sleep(0.05)
        return ""
    try:
        ranks.agree(1)
    except RuntimeError as error:
        return str(error)
    finally:
        Path(done).touch()
    return "no error"


@pytest.mark.slow
def test_stuck_rank_is_named(tmp_path: Path) -> None:
    """Rank 1 does not come: rank 0 says so after the timeout, instead of hanging or only dying."""
    assert "dead or stuck" in (message := run_ranks(stay_away, 2, str(tmp_path / "done"))[0])
    assert "1" in message.split("dead or stuck")[1]


# ---- what cannot be right is refused -----------------------------------------------------------------------


def build_engine(settings: dict[str, Any]) -> str:
    from lmcore.engine.engine import Engine

    try:
        options = EngineConfig(deepspeed=settings.pop("deepspeed", None))
        Engine(TrainConfig(**settings), options).close()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "built"


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        (
            {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"},
            {},
            "started one process although several were asked for.*cpu_2.yaml",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP version 1 .* accelerate_configs/fsdp2.yaml"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            {},
            r"fsdp2 was asked for but accelerate built .* on a CPU use DDP or ZeRO",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "dropout masks .* --train.activation_checkpointing",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"},
            {},
            "DeepSpeed is silently dropped",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "dynamo_backend 'INDUCTOR'.*--train.compile"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "fp32"}, "mixed_precision 'bf16' .* 'fp32'"),
        ({}, {"precision": "fp16"}, "fp16 needs a GPU .* silently train in fp32"),
        ({}, {"precision": "int4"}, "unknown train.precision 'int4'; choose from auto, fp32, bf16, fp16"),
        ({}, {"precision": "fp8"}, "fp8 is not supported.* --train.precision bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "fp8 is not supported"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "2"}, {}, "PARALLELISM_CONFIG_SP_SIZE=2.* not supported"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "TP_SIZE=2.* --train.tensor_parallel 2"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, {}, "CP_SIZE=2.* --train.context_parallel 2"),
        ({}, {"deepspeed": "no/such.json"}, "no/such.json: No such file"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"param_dtype": "bf16"}, "param_dtype bf16 has no meaning"),
        ({}, {"param_dtype": "bf16", "precision": "fp32"}, "is for train.precision bf16, not for fp32: give"),
    ],
)
def test_silent_misconfigurations_are_refused_with_the_remedy(
    env: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    [answer] = run_ranks(build_engine, 1, settings, env=env)
    assert answer.startswith("RequestError: ")
    assert re.search(message, answer), answer


def prepare_with_mistake(kind: str) -> str:
    content: dict[str, Any] = {
        "accumulation": {"gradient_accumulation_steps": 4},
        "clipping": {"gradient_clipping": 0.5},
        "micro-batch": {"train_micro_batch_size_per_gpu": 3},
        "batch": {"train_batch_size": 99},
        "precision": {"bf16": {"enabled": True}},
        "reduction": {"communication_data_type": "bf16"},
        "optimizer": {"optimizer": {"type": "Adam"}},
    }.get(kind, {})
    if kind == "launcher":
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"
    if kind == "compiler":
        content = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
        os.environ["PATH"] = ""
    try:
        engine = engine_runs.make_engine(
            Job(mode="zero2" if kind == "compiler" else "zero1", deepspeed=content)
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        engine.prepare(
            engine_runs.make_model("gpt2-tied"),
            engine_runs.make_optimizer("muon" if kind == "muon" else "adamw"),
            gradient_accumulation=2,
            micro_batch_blocks=5,
            clip_norm=1.0,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        engine.close()
    return "prepared"


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("accumulation", "4", "2"),
        ("clipping", "0.5", "1.0"),
        ("micro-batch", "3", "5"),
        ("batch", "99", "10"),
        ("muon", "MuonWithAdamW", "use adamw"),
        ("precision", "bf16.enabled True", "False"),
        ("reduction", "'bf16'", "'fp32'"),
        ("optimizer", "section 'optimizer'", "optim.name"),
        ("launcher", "gradient_accumulation_steps 4", "give 2"),
        ("compiler", "g++ and ninja", "zero_force_ds_cpu_optimizer"),
    ],
)
def test_contradicting_deepspeed_value_is_refused_with_both_values(kind: str, theirs: str, ours: str) -> None:
    [answer] = run_ranks(prepare_with_mistake, 1, kind, launched=True)
    assert answer.startswith("RequestError: ")
    assert theirs in answer
    assert ours in answer


def test_deepspeed_files_agree_with_their_names() -> None:
    """Each says its stage, leaves to the run what is the run's, and has no optimizer and no scheduler."""
    from lmcore.engine import zero

    for path in sorted(Path("ds_configs").glob("*.json")):
        content = zero.read({}, str(path))
        assert f"zero{content['zero_optimization']['stage']}" == path.stem.removesuffix("_offload")
        assert zero.offloads(content) == path.stem.endswith("_offload")
        config = zero.base_config(content, precision="bf16", reduce_dtype="fp32")
        zero.batch_config(config, micro_batch_blocks=4, accumulation=2, world_size=8, clip_norm=0.0)
        assert config["train_batch_size"] == 64
        assert config["gradient_clipping"] == 0.0  # a missing one would be 1.0
        assert "auto" not in str(config)


def test_deepspeed_files_of_the_package_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcore.engine import zero

    monkeypatch.chdir(tmp_path)
    name = "ds_configs/zero3.json"
    launched = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": name}
    assert zero.read(launched, None) == zero.read(launched, name) == zero.read({}, name)
    assert zero.read({}, name)["zero_optimization"]["stage"] == 3
    with pytest.raises(RequestError, match="No such file"):
        zero.read({}, "other/zero3.json")
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / name).write_text('{"zero_optimization": {"stage": 1}}')  # the user's own goes first
    assert zero.read(launched, None)["zero_optimization"]["stage"] == 1


def update_too_early() -> None:
    engine = engine_runs.make_engine(Job())
    engine.prepare(
        engine_runs.make_model("gpt2-tied"),
        engine_runs.make_optimizer("sgd"),
        gradient_accumulation=2,
        micro_batch_blocks=9,
    )
    loss_sum, count = engine.forward({k: v[:9] for k, v in engine_runs.batch_of(0).items()}, 0)
    engine.backward(loss_sum, count)
    engine.update()


def test_update_before_all_micro_batches_raises() -> None:
    with pytest.raises(RankFailure, match="update after 1 of 2 micro-batches"):
        run_ranks(update_too_early, 1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_parameter_whose_first_gradient_comes_after_the_checkpoint(name: str) -> None:
    """Its step count begins then, in the run that was resumed as in the one that was not."""

    def trained(steps: int, stored: Any = None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        net = nn.ModuleDict({"early": nn.Linear(3, 1), "late": nn.Linear(3, 1)})
        net.register_buffer("note", torch.ones(1))
        named = dict(net.named_parameters())
        kind: Any = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
        optimizer = kind(net.parameters(), lr=1e-2, **({} if name == "adamw" else {"momentum": 0.9}))
        state = TensorState(named, dict(net.named_buffers()), optimizer)
        first = 0
        if stored is not None:
            state.prime()
            weights, slots, numbers = stored
            net.load_state_dict(weights)
            for (key, slot), value in slots.items():
                optimizer.state[named[key]][slot].copy_(value)
            load_scalars(state, None, optimizer, numbers)
            first = 2
        for step in range(first, steps):
            x = torch.ones(2, 3) * (step + 1)
            loss = net["early"](x).sum() + (net["late"](x).sum() if step >= 2 else 0.0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        slots = {
            (key, slot): value.clone()
            for key, parameter in named.items()
            for slot, value in optimizer.state.get(parameter, {}).items()
            if is_slot(value)
        }
        kept = {key: value.clone() for key, value in net.state_dict().items()}
        return net, (kept, slots, json.loads(json.dumps(scalars(state, None, optimizer))))

    whole, _ = trained(4)
    _, stored = trained(2)
    rest, _ = trained(4, stored)
    for key, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[key], value), key


def sgd_engine(net: nn.Module, **arguments: Any) -> Any:
    engine = engine_runs.make_engine(Job())
    engine.prepare(
        net,
        lambda named: torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9, fused=True, **arguments),
        gradient_accumulation=1,
        micro_batch_blocks=1,
    )
    return engine


class TwoLayers(nn.Module):
    """The sum of one layer's outputs, and, where ``both``, of another's; ``model`` is itself, as the engine has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"early": nn.Linear(64, 64), "late": nn.Linear(64, 64)})

    def forward(self, x: Tensor, both: bool, scale: float) -> tuple[Tensor, Tensor]:
        total = self.model["early"](x).sum() + (self.model["late"](x).sum() if both else 0.0)
        return total * scale, torch.tensor(1)


def sgd_steps(steps: list[tuple[bool, float]], dampening: float, rewind: bool = False) -> list[Tensor]:
    """The weights after steps with fused SGD: (whether both layers take part, what the loss is multiplied by).

    With ``rewind`` the state after the first step is loaded after it.
    """
    empty_like = torch.empty_like
    torch.empty_like = lambda *a, **k: empty_like(*a, **k).fill_(torch.nan)  # memory as it may be found
    try:
        net = TwoLayers()
        engine = sgd_engine(net, dampening=dampening)
        for step, (both, scale) in enumerate(steps):
            loss_sum, _ = engine.forward({"x": torch.ones(1, 64), "both": both, "scale": scale})
            engine.backward(loss_sum, 1)
            engine.update()
            if rewind and step == 0:
                state = {(kind, name, slot): tensor for kind, name, slot, tensor in engine.state()}
                stored = {key: WholeTensor(tensor) for key, tensor in state.items() if tensor is not None}
                engine.load_state(lambda *key, stored=stored: stored.get(key))
        return [parameter.detach().clone() for parameter in net.parameters()]
    finally:
        torch.empty_like = empty_like
        engine.close()


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgd_whose_first_update_is_skipped_begins_with_the_second(dampening: float) -> None:
    """torch's fused kernel leaves the momenta of such a step as the memory was."""
    skipped = run_ranks(sgd_steps, 1, [(True, math.nan), (True, 1.0), (True, 1.0)], dampening)[0]
    plain = run_ranks(sgd_steps, 1, [(True, 1.0), (True, 1.0)], dampening)[0]
    assert all(torch.equal(one, other) for one, other in zip(skipped, plain, strict=True))


@pytest.mark.parametrize(("dampening", "second"), [(0.0, 0.19), (0.5, 0.14)])
@pytest.mark.parametrize("rewind", [False, True])
def test_sgd_takes_a_parameter_whose_first_gradient_comes_later(
    rewind: bool, dampening: float, second: float
) -> None:
    early, _, late, _ = run_ranks(sgd_steps, 1, [(False, 1.0), (True, 1.0)], dampening, rewind)[0]
    begun = TwoLayers().model
    assert torch.allclose(begun["late"].weight - late, torch.tensor(0.1))
    assert torch.allclose(begun["early"].weight - early, torch.tensor(0.1 + second))


def scaled_steps(optimizer: str) -> dict[str, Any]:
    """Steps with the gradients scaled as in fp16, resumed in another engine and gone back to in the same one."""

    def begun() -> Any:
        engine = engine_runs.make_engine(Job())
        engine.prepare(
            TwoLayers(),
            lambda named: engine_runs.make_optimizer(optimizer)(named),
            gradient_accumulation=1,
            micro_batch_blocks=1,
            clip_norm=1.0,
        )
        engine._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=2)
        return engine

    def steps(engine: Any, first: int, last: int) -> list[tuple[float, float, bool]]:
        seen = []
        for step in range(first, last):
            engine.set_learning_rate(0.01)
            # With the scale close to fp32's largest number, 2**128: it is halved, and doubled after two updates.
            inputs = {"x": torch.ones(1, 64) * (step + 1), "both": True, "scale": 2.0**24}
            loss_sum, _ = engine.forward(inputs)
            engine.backward(loss_sum, 1)
            norm, applied = engine.update()
            seen.append((engine._scaler.get_scale(), float(norm), bool(applied)))
        return seen

    def stored(engine: Any) -> tuple[Any, Any]:
        tensors = {(kind, name, slot): tensor for kind, name, slot, tensor in engine.state()}
        return tensors, json.loads(json.dumps(engine.optimizer_scalars()))

    def resume(engine: Any, tensors: Any, scalars: Any) -> None:
        engine.load_state(
            lambda *key: (
                WholeTensor(tensors[key]) if key in tensors else None
            )  # no moments before the first update
        )
        engine.load_optimizer_scalars(scalars)

    found: dict[str, Any] = {}
    whole = begun()
    found["before"] = steps(whole, 0, 7)
    kept = stored(whole)
    found["whole"] = steps(whole, 7, 16)
    found["end"] = stored(whole)
    resume(whole, *kept)
    found["rewound"], found["end rewound"] = steps(whole, 7, 16), stored(whole)
    whole.close()
    other = begun()
    resume(other, *kept)
    found["resumed"], found["end resumed"] = steps(other, 7, 16), stored(other)
    other.close()
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradient_scale_of_fp16_goes_on_after_a_resume_and_a_rewind(optimizer: str) -> None:
    [found] = run_ranks(scaled_steps, 1, optimizer)
    applied = [good for _, _, good in found["before"] + found["whole"]]
    assert set(applied) == {True, False}, (
        "the scale overflows at first, and is halved until updates are applied"
    )
    assert len({scale for scale, _, _ in found["whole"]}) > 1  # it moves after the checkpoint
    for way in ("rewound", "resumed"):
        assert str(found[way]) == str(found["whole"])  # NaN equals itself here
        (tensors, scalars), (as_told, numbers) = found[f"end {way}"], found["end"]
        assert scalars == numbers
        assert tensors.keys() == as_told.keys()
        assert all(torch.equal(tensors[key], value) for key, value in as_told.items())


class Growing(torch.optim.SGD):
    """SGD whose rate grows by what it counts for its group, as the step size of Prodigy does."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group["seen"], group["share"] = 0, 1.0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["seen"] += 1
            group["share"] *= 1.5
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"] * group["share"] * group["seen"])
                self.state[parameter]["last"] = parameter.grad.clone()


def test_numbers_that_an_optimizer_keeps_for_a_group_are_resumed() -> None:
    def begun() -> tuple[nn.Module, Growing, TensorState]:
        torch.manual_seed(0)
        net = nn.Linear(3, 1)
        optimizer = Growing([{"params": [net.weight]}, {"params": [net.bias]}], lr=1e-2)
        return net, optimizer, TensorState(dict(net.named_parameters()), {}, optimizer)

    def train(net: nn.Module, optimizer: Growing, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            net(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()

    whole, optimizer, state = begun()
    train(whole, optimizer, 2)
    optimizer.param_groups[1]["share"] = 7.0  # each group has its own
    numbers = json.loads(json.dumps(scalars(state, None, optimizer)))
    kept = {name: value.clone() for name, value in whole.state_dict().items()}
    train(whole, optimizer, 2)
    rest, again, state = begun()
    state.prime()
    assert again.param_groups[0]["seen"] == 0
    rest.load_state_dict(kept)
    load_scalars(state, None, again, numbers)
    train(rest, again, 2)
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name


def sums_of_a_branch() -> tuple[int, list[float]]:
    """Only rank 1 computes with the second number."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    both = [nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2)]
    sums = WideGradients(both, [])
    (both[0] * 2 + (both[1] * 4 if rank else 0)).sum().backward()
    gradients = sums.reduced()
    sums.give_to_parameters(nn.utils.get_total_norm(gradients), 0.0)
    torch.distributed.destroy_process_group()
    return len(gradients), [-1.0 if p.grad is None else float(p.grad) for p in both]


def test_gradient_that_one_rank_alone_has_reaches_all() -> None:
    assert run_ranks(sums_of_a_branch, 2) == [(2, [2.0, 2.0])] * 2


def step_with_a_spare_layer() -> str:
    engine = engine_runs.make_engine(Job(mode="ddp2"))
    module = engine_runs.make_model("gpt2-tied")
    module.model.transformer.h[1].spare = nn.Linear(2, 2)
    engine.prepare(
        module,
        engine_runs.make_optimizer("sgd"),
        gradient_accumulation=1,
        micro_batch_blocks=6,
        clip_norm=1.0,
    )
    batch = {k: v[6 * engine.rank : 6 * engine.rank + 6] for k, v in engine_runs.batch_of(0).items()}
    before = [p.detach().clone() for p in module.parameters()]
    try:
        loss_sum, _ = engine.forward(batch, 0)
        engine.backward(loss_sum, 40)
        engine.update()
    except Exception as error:
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
        return f"{type(error).__name__}: {error}"
    finally:
        engine.close()
    return "trained"


@pytest.mark.parametrize(
    "world_size", [2, 3]
)  # with three, DDP's buckets are settled by a backward before the first
def test_parameter_without_a_gradient_is_named_under_ddp(world_size: int) -> None:
    for answer in run_ranks(step_with_a_spare_layer, world_size):
        assert answer.startswith("RequestError: DDP needs a gradient")
        assert "transformer.h.1.spare.weight, transformer.h.1.spare.bias." in answer
        assert "--optim.freeze transformer.h.1.spare.weight" in answer


def test_complaint_of_ddp_names_the_parameter() -> None:
    said = "Expected to have finished reduction in the prior iteration. Parameter indices which did not receive grad for rank 0: 1\n"
    with (
        pytest.raises(RequestError, match=r"took no part in the loss of one: bias\."),
        naming_unused_parameters(nn.Linear(2, 2)),
    ):
        raise RuntimeError(said)


def numbers_of_groups_under_zero(stage: int) -> list[tuple[int, float]]:
    engine = engine_runs.make_engine(Job(mode=f"zero{stage}"))

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        vectors = [p for _, p in named if p.ndim < 2]
        optimizer = HalfMomentum([{"params": [p for _, p in named if p.ndim > 1]}, {"params": vectors}])
        for group in optimizer.param_groups:
            group["seen"], group["share"] = 0, torch.tensor(1.0)
        return optimizer

    module = engine_runs.make_model("gpt2-tied", weights=engine.needs_weights)
    engine.prepare(module, make, gradient_accumulation=1, micro_batch_blocks=9)
    groups = engine.optimizer.optimizer.param_groups
    groups[0]["seen"] = 5  # as the optimizer itself would
    groups[1]["seen"] = 7
    groups[1]["share"].fill_(2.5)
    stored = json.loads(json.dumps(engine.optimizer_scalars()))
    for group in groups:
        group["seen"] = 0
        group["share"].fill_(1.0)
    engine.load_optimizer_scalars(stored)
    answer = [(group["seen"], float(group["share"])) for group in groups]
    engine.close()
    return answer


@pytest.mark.parametrize("stage", [1, 2])
def test_numbers_that_an_optimizer_keeps_for_a_group_are_resumed_under_zero(stage: int) -> None:
    assert run_ranks(numbers_of_groups_under_zero, 2, stage) == [[(5, 1.0), (7, 2.5)]] * 2


def test_optimizer_state_that_no_checkpoint_would_hold_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"step": 3, "mean": torch.ones(2), "names": ["a"], "nothing": None}
    refuse_other_state(optimizer)
    optimizer.state[parameter]["factors"] = [torch.ones(2)]
    with pytest.raises(RequestError, match="SGD keeps 'factors', a list, in the state of a parameter"):
        refuse_other_state(optimizer)
    optimizer.state[parameter]["factors"] = {"left": {"right": torch.ones(2)}}
    with pytest.raises(RequestError, match="'factors', a dict"):
        refuse_other_state(optimizer)
    optimizer.state.clear()
    optimizer.param_groups[0]["mean"] = torch.ones(2)
    with pytest.raises(RequestError, match="keeps 'mean', a Tensor, in a group"):
        refuse_other_state(optimizer)
    optimizer.state["count"] = 3
    with pytest.raises(RequestError, match="keeps 'count' in its state for no parameter"):
        refuse_other_state(optimizer)


def test_parameter_that_is_trained_after_a_resume_begins_its_own_step_count() -> None:
    def begun(*, frozen: bool) -> tuple[nn.Module, Any, TensorState]:
        net = nn.Linear(3, 1)
        net.bias.requires_grad_(not frozen)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
        return net, optimizer, TensorState(dict(net.named_parameters()), {}, optimizer)

    net, optimizer, state = begun(frozen=True)
    for _ in range(3):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    numbers = json.loads(json.dumps(scalars(state, None, optimizer)))
    net, optimizer, state = begun(frozen=False)
    state.prime()
    load_scalars(state, None, optimizer, numbers)
    assert (float(optimizer.state[net.weight]["step"]), float(optimizer.state[net.bias]["step"])) == (3, 0)
