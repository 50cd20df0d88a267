"""Context parallelism: whole runs whose blocks are shared by 2 and 4 processes equal one process, under every strategy, and
resume from and into any of them."""

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
    ROOT,
    STEPS,
    losses,
    request,
    train_in_rank,
    train_under,
    weights,
    write_texts,
)

CLOSE = 2e-6
"""Relative, over 20 steps in fp32: sums over tokens are cut into other parts, each rounded at 6e-8; seen: 3e-7."""
GPT2 = {f"model__config__{part}_pdrop": 0 for part in ("attn", "resid", "embd")}
LLAMA = {
    "model.type": "llama",
    "model.config": "{hidden_size: 32, intermediate_size: 40, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: false}",
}
# name: (strategy, processes, context parallel, family)
RUNS = {
    "cp2": ("ddp", 2, 2, "gpt2"),
    "cp4": ("ddp", 4, 4, "llama"),
    "cp2 x ddp2": ("ddp", 4, 2, "gpt2"),
    "cp2 x fsdp2": ("fsdp2", 4, 2, "llama"),
    "cp2, fsdp2": ("fsdp2", 2, 2, "gpt2"),
    "cp2 x hsdp 2x2": ("hsdp", 4, 2, "llama"),
    "hsdp 2x2": ("hsdp", 4, 1, "llama"),
    "cp2 x zero1": ("zero1", 4, 2, "llama"),
    "cp2, zero2": ("zero2", 2, 2, "gpt2"),
    "cp4, zero3": ("zero3", 4, 4, "llama"),
    "cp2 x zero3": ("zero3", 4, 2, "gpt2"),
}
FAST = ("cp2", "cp2 x fsdp2")


def run(
    text: Path,
    folder: Path,
    strategy: str = "single",
    processes: int = 1,
    context_parallel: int = 1,
    family: str = "gpt2",
    **options: Any,
) -> Path:
    """A run of :data:`STEPS` steps with documents kept apart, accumulation and clipping; nothing is dropped."""
    # 12 blocks a step; clipped at 0.5, below the norms of most steps.
    sizes = {"train__micro_batch_blocks": 3, "optim__clip_norm": 0.5, "checkpoint__keep": 10}
    if strategy.startswith("zero"):
        options["engine__deepspeed"] = ROOT / "ds_configs" / f"{strategy}.json"
    common = {"data__document_mask": "true", "train__context_parallel": context_parallel, **sizes, **options}
    argv = request(text, folder, **common, **(GPT2 if family == "gpt2" else {}))
    if family == "llama":  # instead of the small GPT-2
        kept = [i for i in range(0, len(argv), 2) if not argv[i].startswith("--model.")]
        argv = [part for i in kept for part in argv[i : i + 2]]
        argv += [part for name, value in LLAMA.items() for part in (f"--{name}", value)]
    codes = run_ranks(train_under, processes, argv, strategy, timeout=240, launched=strategy != "single")
    assert codes == [0] * processes
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("context"), train=300, held=30)


@pytest.fixture(scope="module")
def alone(text: Path) -> dict[str, Path]:
    """One process, by family."""
    return {family: run(text, text / f"alone-{family}", family=family) for family in ("gpt2", "llama")}


def evaluations(folder: Path) -> list[float]:
    from lmcore.report.metrics import read_metrics

    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl", kind="eval")]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_shared_blocks_train_as_one_process(
    text: Path, tmp_path: Path, alone: dict[str, Path], name: str
) -> None:
    strategy, processes, context_parallel, family = RUNS[name]
    made = run(text, tmp_path / "run", strategy, processes, context_parallel, family)
    assert len(losses(made)) == STEPS
    assert losses(made) == pytest.approx(losses(alone[family]), rel=CLOSE)
    assert len(evaluations(made)) == 2
    assert evaluations(made) == pytest.approx(evaluations(alone[family]), rel=CLOSE)
    found, expected = weights(made), weights(alone[family])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Adam makes full steps of the noise in the keys' biases, whose true gradient is zero
        if "exp_avg" in key:
            torch.testing.assert_close(found[key].float(), value.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "legs",
    [
        [("ddp", 2, 2), ("single", 1, 1)],
        pytest.param([("ddp", 2, 2), ("single", 1, 1), ("ddp", 4, 4)], marks=pytest.mark.slow),
        pytest.param(
            [("single", 1, 1), ("fsdp2", 4, 2), ("zero2", 2, 2), ("ddp", 4, 2)], marks=pytest.mark.slow
        ),
    ],
)
def test_resume_moves_between_context_sizes_and_strategies(
    text: Path, tmp_path: Path, alone: dict[str, Path], legs: list[tuple[str, int, int]]
) -> None:
    """Each leg stops at its checkpoint after 5 more steps, and the next goes on from there."""
    folder = tmp_path / "run"
    for number, (strategy, processes, context_parallel) in enumerate(legs):
        run(text, folder, strategy, processes, context_parallel, "llama")
        if number + 1 < len(legs):  # as if it had been killed there
            for checkpoint in (folder / "checkpoints").glob("step-*"):
                if int(checkpoint.name.removeprefix("step-")) > 5 * (number + 1):
                    shutil.rmtree(checkpoint)
            (folder / "status.json").unlink()
    assert losses(folder) == pytest.approx(losses(alone["llama"]), rel=CLOSE)


def refusal_in_rank(argv: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = train_in_rank(argv, None, 0)
    return code, said.getvalue()


@pytest.mark.parametrize(
    ("processes", "options", "reason"),
    [
        (3, {"train__context_parallel": 2}, "does not divide the number of processes (3)"),
        (2, {"train__context_parallel": 2, "data__block_size": 18}, "must be a multiple of 2 x"),
        (2, {"train__context_parallel": 2, "model__attention": "eager"}, "its attention is eager"),
        (2, {"train__context_parallel": 2, "loss__factory": "a:b"}, "only loss.factory a:b knows"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_any_work(
    text: Path, tmp_path: Path, processes: int, options: dict[str, Any], reason: str
) -> None:
    argv = request(text, tmp_path / "run", data__store_dir=tmp_path / "stores", **options)
    codes, said = zip(*run_ranks(refusal_in_rank, processes, argv, timeout=120))
    assert set(codes) == {EXIT_REQUEST}
    assert reason in said[0]  # rank 0 speaks for all
    assert not (tmp_path / "stores").exists()
