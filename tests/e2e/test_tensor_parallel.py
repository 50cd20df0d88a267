"""Tensor parallelism: whole runs whose layers are shared by 2 processes equal one process, alone, under DDP and under FSDP2, and
resume from and into each of them."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcore.errors import EXIT_REQUEST
from tests.support.fork_server import run_ranks
from tests.support.whole_runs import (
    STEPS,
    assert_same_state,
    losses,
    request,
    train_in_rank,
    train_under,
    weights,
    write_texts,
)

CLOSE = 2e-6
"""Relative, over 20 steps in fp32: sums over inputs are cut into two parts, each rounded at 6e-8."""
BLOCKS = "{hidden_size: 32, intermediate_size: 40, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
FAMILIES = {
    "llama": BLOCKS + "max_position_embeddings: 64, tie_word_embeddings: false}",
    "llama, 4 heads of keys": BLOCKS.replace("value_heads: 2", "value_heads: 4")
    + "max_position_embeddings: 64}",
    # Drops attention weights, of which each rank has other heads, and parts of the residual stream, which all have.
    "starcoder2": BLOCKS
    + "max_position_embeddings: 64, attention_dropout: 0.1, residual_dropout: 0.1, embedding_dropout: 0.1}",
    # Norms of each head, whose gradients are sums over the ranks; a tied head; biases that are cut.
    "qwen3": BLOCKS
    + "head_dim: 8, attention_bias: true, max_position_embeddings: 64, tie_word_embeddings: true}",
}
# name: (strategy, processes, tensor parallel, family, options)
RUNS: dict[str, tuple[str, int, int, str, dict[str, Any]]] = {
    "tp2": ("ddp", 2, 2, "llama", {}),
    "tp2, heads": ("ddp", 2, 2, "qwen3", {}),
    "tp2 x ddp2": ("ddp", 4, 2, "qwen3", {}),
    "tp2 x fsdp2": ("fsdp2", 4, 2, "llama", {}),
    "tp2 x fsdp2, heads": ("fsdp2", 4, 2, "qwen3", {}),
    "tp2, fsdp2": ("fsdp2", 2, 2, "llama", {}),
    "tp2 x ddp3": ("ddp", 6, 2, "llama", {"train__micro_batch_blocks": 2}),
    "tp4, fsdp2": ("fsdp2", 4, 4, "llama, 4 heads of keys", {}),
    "tp2 x fsdp2, recomputed": ("fsdp2", 4, 2, "llama", {"train__activation_checkpointing": "true"}),
    "tp2, compiled": ("ddp", 2, 2, "qwen3", {"train__compile": "true"}),
    "tp2 x fsdp2, compiled, recomputed": (
        "fsdp2",
        4,
        2,
        "llama",
        {"train__compile": "true", "train__activation_checkpointing": "true"},
    ),
}


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """A compiler takes most of a minute; the graphs are counted in tests/engine/test_compiled_graphs.py."""
    return [pytest.mark.slow, *([pytest.mark.long] if "compiled" in name else [])]


FAST = ("tp2", "tp2 x ddp2", "tp2 x fsdp2, heads")


def run(
    text: Path,
    folder: Path,
    strategy: str = "single",
    processes: int = 1,
    tensor_parallel: int = 1,
    family: str = "llama",
    **options: Any,
) -> Path:
    """A run of :data:`STEPS` steps with documents kept apart, accumulation and clipping."""
    # 12 blocks a step; clipped at 0.5, below the norms of most steps.
    common = {
        "data__document_mask": "true",
        "train__tensor_parallel": tensor_parallel,
        "train__micro_batch_blocks": 3,
        "optim__clip_norm": 0.5,
        "checkpoint__keep": 10,
        **options,
    }
    argv = with_family(request(text, folder, **common), family)
    codes = run_ranks(train_under, processes, argv, strategy, timeout=240, launched=strategy != "single")
    assert codes == [0] * processes
    return folder


def with_family(argv: list[str], family: str) -> list[str]:
    """The same request of another model than the small GPT-2."""
    kept = [i for i in range(0, len(argv), 2) if not argv[i].startswith("--model.")]
    of_family = ["--model.type", family.split(",")[0], "--model.config", FAMILIES[family]]
    return [part for i in kept for part in argv[i : i + 2]] + of_family


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("tensor"), train=300, held=30)


@pytest.fixture(scope="module")
def alone(text: Path) -> dict[str, Path]:
    """One process, by family, of those that drop nothing."""
    families = [family for family in FAMILIES if family != "starcoder2"]
    return {family: run(text, text / f"alone-{family}", family=family) for family in families}


def records(folder: Path, kind: str, name: str) -> list[float]:
    from lmcore.report.metrics import read_metrics

    return [record[name] for record in read_metrics(folder / "metrics.jsonl", kind=kind)]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=marks_of(name)) for name in RUNS]
)
def test_shared_layers_train_as_one_process(
    text: Path, tmp_path: Path, alone: dict[str, Path], name: str
) -> None:
    strategy, processes, tensor_parallel, family, options = RUNS[name]
    made = run(text, tmp_path / "run", strategy, processes, tensor_parallel, family, **options)
    assert len(losses(made)) == STEPS
    assert losses(made) == pytest.approx(losses(alone[family]), rel=CLOSE)
    norms = records(made, "train", "grad_norm")
    assert norms == pytest.approx(records(alone[family], "train", "grad_norm"), rel=1e-5)
    assert max(norms) > 0.5  # some were clipped
    assert records(made, "train", "tokens") == records(alone[family], "train", "tokens")
    assert len(records(made, "eval", "loss")) == 2
    assert records(made, "eval", "loss") == pytest.approx(records(alone[family], "eval", "loss"), rel=CLOSE)
    found, expected = weights(made), weights(alone[family])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if "exp_avg" in key:  # Adam makes full steps of the noise in gradients whose true value is zero
            torch.testing.assert_close(found[key].float(), value.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("fsdp2", 4)])
def test_shared_layers_in_bf16(text: Path, tmp_path: Path, strategy: str, processes: int) -> None:
    """A sum over inputs is rounded to bf16 (4e-3) in each of its two parts; the losses are means over 192 tokens."""
    narrow = {"train__precision": "bf16"}
    whole = run(text, tmp_path / "alone", family="qwen3", **narrow)
    made = run(text, tmp_path / "run", strategy, processes, 2, "qwen3", **narrow)
    assert losses(made) == pytest.approx(losses(whole), rel=2e-3)
    assert records(made, "train", "grad_norm") == pytest.approx(
        records(whole, "train", "grad_norm"), rel=2e-2
    )
    assert losses(made) != losses(run(text, tmp_path / "wide", family="qwen3"))  # bf16 it was


@pytest.mark.parametrize(
    "legs",
    [
        [("ddp", 2, 2), ("fsdp2", 2, 1)],
        pytest.param(
            [("ddp", 2, 2), ("single", 1, 1), ("fsdp2", 4, 2)], marks=[pytest.mark.slow, pytest.mark.long]
        ),
        pytest.param(
            [("single", 1, 1), ("ddp", 4, 2), ("fsdp2", 2, 1), ("ddp", 2, 2)], marks=pytest.mark.slow
        ),
        pytest.param([("fsdp2", 4, 2), ("ddp", 2, 1), ("fsdp2", 2, 2)], marks=pytest.mark.slow),
    ],
)
def test_resume_moves_between_tensor_sizes_and_strategies(
    text: Path, tmp_path: Path, alone: dict[str, Path], legs: list[tuple[str, int, int]]
) -> None:
    """Each leg stops at its checkpoint after 5 more steps, and the next goes on from there."""
    folder = tmp_path / "run"
    for number, (strategy, processes, tensor_parallel) in enumerate(legs):
        run(text, folder, strategy, processes, tensor_parallel, "qwen3")
        if number + 1 < len(legs):  # as if it had been killed there
            killed_after(folder, 5 * (number + 1))
    assert losses(folder) == pytest.approx(losses(alone["qwen3"]), rel=CLOSE)


def killed_after(folder: Path, step: int) -> None:
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (folder / "status.json").unlink()


@pytest.mark.parametrize(
    ("strategy", "processes", "family"),
    [
        ("ddp", 2, "starcoder2"),
        pytest.param("ddp", 4, "llama", marks=pytest.mark.slow),
        pytest.param("fsdp2", 4, "starcoder2", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(text: Path, tmp_path: Path, strategy: str, processes: int, family: str) -> None:
    run(text, tmp_path / "run", strategy, processes, 2, family)
    whole, before = weights(tmp_path / "run"), losses(tmp_path / "run")
    killed_after(tmp_path / "run", 10)
    run(text, tmp_path / "run", strategy, processes, 2, family)
    assert_same_state(weights(tmp_path / "run"), whole)
    assert losses(tmp_path / "run") == before


@pytest.mark.slow
def test_dropout_with_recomputation_is_that_without(text: Path, tmp_path: Path) -> None:
    """The recomputation draws what the forward drew, on each rank."""
    plain = run(text, tmp_path / "plain", "ddp", 2, 2, "starcoder2")
    again = run(text, tmp_path / "again", "ddp", 2, 2, "starcoder2", train__activation_checkpointing="true")
    assert losses(again) == losses(plain)
    assert_same_state(weights(again), weights(plain))


def refusal_in_rank(argv: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = train_in_rank(argv, None, 0)
    return code, said.getvalue()


HEADS = BLOCKS.replace("num_attention_heads: 4", "num_attention_heads: 3").replace("heads: 2", "heads: 1")


@pytest.mark.parametrize(
    ("processes", "family", "options", "reason"),
    [
        (2, "gpt2", {}, "transformers has no tensor-parallel plan for GPT2LMHeadModel"),
        (2, "olmo2", {}, "'colwise_gather_output'"),
        (2, "mixtral", {}, "'moe_tp_experts'"),
        (3, "llama", {}, "does not divide the number of processes (3)"),
        (
            2,
            "llama",
            {"optim__name": "muon"},
            "optim.name 'muon' with train.tensor_parallel 2: it needs whole matrices",
        ),
        (2, "llama", {"optim__ema_decay": 0.9}, "no rank holds the weights that it averages"),
        (2, "llama", {"train__context_parallel": 2}, "has not been tested"),
        (
            2,
            "starcoder2",
            {"train__compile": "true"},
            "the model has dropout, for which train.tensor_parallel",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_before_any_work(
    text: Path, tmp_path: Path, processes: int, family: str, options: dict[str, Any], reason: str
) -> None:
    options = {"train__tensor_parallel": 2, "data__store_dir": tmp_path / "stores", **options}
    argv = request(text, tmp_path / "run", **options)
    if family in FAMILIES:
        argv = with_family(argv, family)
    elif family != "gpt2":
        argv = with_family(argv, "llama")
        argv[argv.index("--model.type") + 1] = family
    codes, said = zip(*run_ranks(refusal_in_rank, processes, argv, timeout=120))
    assert set(codes) == {EXIT_REQUEST}
    assert reason in said[0]  # rank 0 speaks for all
    assert len(said[0].strip().splitlines()) == 1
    assert not (tmp_path / "stores").exists()
