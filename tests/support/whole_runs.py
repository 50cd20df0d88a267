"""Tiny whole runs of ``train_lm.py`` in forked processes, and what tests compare of them."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from lmcore.config import parse
from lmcore.errors import EXIT_FAULT, EXIT_REQUEST, EXIT_SAVED, one_line_errors
from lmcore.report.metrics import read_metrics
from tests.support.fork_server import run_ranks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

STEPS = 20


def write_texts(folder: Path, *, train: int, held: int, seed: int = 0) -> Path:
    """``train.txt`` and ``held.txt`` of so many sentences in ``folder``. Returns the folder."""
    (folder / "train.txt").write_text(words(train, seed), encoding="utf-8")
    (folder / "held.txt").write_text(words(held, seed + 1), encoding="utf-8")
    return folder


def words(count: int, seed: int) -> str:
    """A small language: sentences of a few words, some of them Japanese."""
    draw = random.Random(seed)
    lexicon = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "日本語",
        "ですから",
        "テスト",
        "epsilon",
        "zeta",
        "eta",
        "、",
        "。",
    ]
    lines = [" ".join(draw.choice(lexicon) for _ in range(draw.randint(3, 12))) for _ in range(count)]
    return "\n".join(lines) + "\n"


def request(text: Path, run_dir: Path, **options: Any) -> list[str]:
    """A command line for a tiny GPT-2; ``options`` with ``__`` for the dots."""
    small = {
        "run_dir": run_dir,
        "seed": 7,
        "data.train": text / "train.txt",
        "data.valid": text / "held.txt",
        "data.store_dir": text / "stores",
        "data.block_size": 16,
        "data.processes": 1,
        "tokenizer.vocab_size": 320,
        "model.config.n_layer": 2,
        "model.config.n_head": 2,
        "model.config.n_embd": 32,
        "model.config.n_positions": 64,
        "train.duration": f"{STEPS} steps",
        "train.global_batch_blocks": 12,
        "train.micro_batch_blocks": 6,
        "train.precision": "fp32",
        "optim.lr": 0.003,
        "evaluate.every": "10 steps",
        "evaluate.prompts": "[]",
        "checkpoint.every": "5 steps",
        "report.every": 1,
        "report.trackers": "[]",
    }
    merged = small | {name.replace("__", "."): value for name, value in options.items()}
    return [part for name, value in merged.items() for part in (f"--{name}", str(value))]


def train_in_rank(argv: list[str], kill_before_step: int | None, kill_with: int) -> int:
    """In a rank: what ``train_lm.py`` does, with a kill on the way.

    Its report has no pictures, which are half of the time of a run this small; tests/report and tests/e2e/test_docs.py
    draw them.
    """
    import train_lm
    from lmcore.report import curves, html
    from lmcore.run.trainer import Run

    curves.CAN_DRAW = html.CAN_DRAW = False

    if kill_before_step is not None:
        learning_rate = Run.learning_rate

        def lethal(run: Run) -> float:
            if run.state.step == kill_before_step:
                os.kill(os.getpid(), kill_with)
            return learning_rate(run)

        Run.learning_rate = lethal
    try:
        with one_line_errors():
            config = parse.parse(argv, default_recipe=None)
        return train_lm.main(config)
    except SystemExit as exit:
        if exit.code in (EXIT_REQUEST, EXIT_FAULT, EXIT_SAVED):
            return int(exit.code or 0)
        raise


def train_under(argv: list[str], strategy: str) -> int:
    """As :func:`train_in_rank`; FSDP2 and HSDP, which a launcher asks for by variables, on a CPU shown as another device."""
    if strategy in ("fsdp2", "hsdp"):
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
        if strategy == "hsdp":
            os.environ.update(
                ACCELERATE_USE_PARALLELISM_CONFIG="true",
                PARALLELISM_CONFIG_DP_REPLICATE_SIZE="2",
                PARALLELISM_CONFIG_DP_SHARD_SIZE="2",
            )
        from tests.support.engine_runs import pretend_gpus

        pretend_gpus()
    return train_in_rank(argv, None, 0)


def train(
    argv: list[str],
    world_size: int = 1,
    *,
    kill_before_step: int | None = None,
    kill_with: int = signal.SIGTERM,
) -> list[int]:
    """Exit codes of the ranks."""
    return run_ranks(train_in_rank, world_size, argv, kill_before_step, kill_with, timeout=240)


def losses(run_dir: Path) -> dict[int, float]:
    return {
        record["step"]: record["loss"] for record in read_metrics(run_dir / "metrics.jsonl", kind="train")
    }


def weights(run_dir: Path) -> dict[str, Any]:
    from lmcore.checkpoint import writer

    found = writer.find(run_dir / "checkpoints")
    assert found is not None
    with found:
        tensors = {}
        for kind in ("model", "optim"):
            keys = found.keys(kind)
            assert keys
            for key in keys:
                tensors[f"{kind}/{key}"] = found.read(kind, *(key if isinstance(key, tuple) else (key,)))
        return tensors


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] == b[name]).all(), name
