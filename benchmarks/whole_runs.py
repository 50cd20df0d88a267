"""Whole runs from command to end, beside each other.

    python benchmarks/whole_runs.py processes     # two processes with DDP, and one process with two threads
    python benchmarks/whole_runs.py startup       # from the command to the end of the first step
    python benchmarks/whole_runs.py time_to_loss  # until the held-out loss of one epoch with Trainer's defaults

``processes``: the same global batch; the rates that the runs themselves log, in turn. ``time_to_loss``: same model,
text and tokenizer. Trainer makes one epoch with its defaults (float32, AdamW at 5e-5, linear, 8 blocks a step), and
only its ``train()`` is timed; then ``train_lm.py`` (bf16, its own defaults, the peak rate ``--lr``) trains until its
held-out loss is as low, and everything is timed, from the start of the command to its end: imports, evaluations,
checkpoints, export. Processor time is given beside the clock, which other work on the machine disturbs.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common  # first: it puts the root on the path
from contestants import (
    DEFAULTS,
    MODELS,
    NO_DROPOUT,
    corpus,
    held_out_tokens,
    plain_gpt2,
    prepare_corpus,
    train_tokens,
)

from lmcore.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TOKENS, VOCAB, BLOCKS = 256, 8000, 8


def options(run_dir: Path, **more: str) -> list[str]:
    """Of ``train_lm.py``, for the demo's model and text."""
    config = MODELS["demo"] | NO_DROPOUT | {"n_positions": TOKENS}
    given = {
        "run_dir": str(run_dir),
        "tokenizer.path": str(corpus(VOCAB) / "tokenizer"),
        "data.store_dir": str(corpus(VOCAB)),
        "data.block_size": str(TOKENS),
        "model.type": "gpt2",
        "optim.name": "adamw",
        "train.global_batch_blocks": str(BLOCKS),
        **{f"model.config.{name}": str(value) for name, value in config.items()},
        **more,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def run(command: Sequence[str], **environment: str) -> tuple[float, float]:
    """Seconds by the clock and of processor time, children and threads included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
        capture_output=True,
        text=True,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def processes(rounds: int) -> None:
    """Two processes of one thread, and one process of two threads."""
    processes_and_machines = ["--num_processes=2", "--num_machines=1"]
    launch = ["accelerate", "launch", "--multi_gpu", *processes_and_machines, "train_lm.py"]
    sides = {
        "2 processes x 1 thread (DDP, gloo)": (launch, "1", str(BLOCKS // 2)),
        "1 process x 2 threads": ([sys.executable, "train_lm.py"], "2", str(BLOCKS)),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (command, threads, micro) in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                given = options(
                    Path(folder) / "run",
                    **{
                        "train.duration": "40 steps",
                        "train.micro_batch_blocks": micro,
                        "train.precision": "bf16",
                        "evaluate.every": "never",
                        "evaluate.at_end": "false",
                        "checkpoint.every": "never",
                        "report.every": "1 steps",
                    },
                )
                run([*command, *given], OMP_NUM_THREADS=threads)
                lines = read_metrics(Path(folder) / "run/metrics.jsonl", kind="train")
                logged = [line["tokens_per_second"] for line in lines]
            rates[name].append(statistics.median(logged[5:]))
    first, second = rates.values()
    ratio = common.ratios(first, second)
    rows = [(name, f"{statistics.median(values):,.0f}") for name, values in rates.items()]
    rows.append(("ratio", f"{ratio['median']:.3f} ({ratio['p10']:.3f}-{ratio['p90']:.3f})"))
    common.write(
        "processes",
        {"rates": rates, "ratio": ratio},
        common.table(rows, ["demo model, bf16, 8 x 256", "tokens/s"]),
    )


def startup(rounds: int) -> None:
    """Seconds from the command to the end of the first step; and of the imports alone, in a process of their own."""
    first_step, imports = [], []
    program = "import torch, transformers, accelerate; from transformers import GPT2LMHeadModel"
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            given = options(
                Path(folder) / "run",
                **{
                    "train.duration": "2 steps",
                    "report.every": "1 steps",
                    "evaluate.at_end": "false",
                    "checkpoint.every": "never",
                },
            )
            start = time.time()
            run([sys.executable, "train_lm.py", *given])
            first_step.append(
                read_metrics(Path(folder) / "run/metrics.jsonl", kind="train")[0]["time"] - start
            )
        imports.append(run([sys.executable, "-c", program])[0])
    rows = [
        (name, f"{common.spread(values)['median']:.1f}", f"{min(values):.1f}")
        for name, values in (
            ("to the end of the first step", first_step),
            ("importing the libraries alone", imports),
        )
    ]
    numbers = {"first_step_seconds": first_step, "imports_seconds": imports}
    common.write(
        "startup", numbers, common.table(rows, ["demo model, text prepared", "seconds, median", "least"])
    )


def trainer_epoch(folder: Path) -> dict[str, float]:
    """One epoch of the demo's text with Trainer's defaults; seconds of ``train()``, and the loss that it reaches."""
    import torch
    from transformers import Trainer, TrainingArguments

    from lmcore.model.module import ModelWithLoss

    settings = DEFAULTS | {"model": "demo", "tokens": TOKENS, "vocab": VOCAB}

    def blocks(tokens: Any) -> list[dict[str, Any]]:
        ids = torch.from_numpy(tokens.astype("int64"))
        cut = [ids[i : i + TOKENS] for i in range(0, len(ids) - TOKENS + 1, TOKENS)]
        return [{"input_ids": block, "labels": block} for block in cut]

    torch.manual_seed(0)
    model = plain_gpt2(settings, padded=False)
    training = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=BLOCKS,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=training, train_dataset=blocks(train_tokens(settings)))
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.eval()
    module, total, count = ModelWithLoss(model), 0.0, 0
    held_out = torch.from_numpy(held_out_tokens(VOCAB).astype("int64"))
    with torch.no_grad():
        for i in range(0, len(held_out) - TOKENS, TOKENS):
            ids = held_out[i : i + TOKENS + 1].unsqueeze(0)
            loss_sum, labels = module(input_ids=ids[:, :-1], labels=ids[:, 1:])
            total, count = total + float(loss_sum), count + int(labels)
    return {"seconds": seconds, "cpu_seconds": cpu, "loss": total / count, "steps": trainer.state.global_step}


def time_to_loss(lr: str) -> None:
    """See the top."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = trainer_epoch(Path(folder) / "trainer")
        print(theirs, flush=True)
        run_dir = Path(folder) / "run"
        given = options(
            run_dir,
            **{
                "train.duration": "1 epochs",
                "train.precision": "bf16",
                "optim.lr": lr,
                "evaluate.every": "40 steps",
                "evaluate.early_stopping.target": str(theirs["loss"]),
            },
        )
        seconds, cpu = run([sys.executable, "train_lm.py", *given])
        last = read_metrics(run_dir / "metrics.jsonl", kind="eval")[-1]
    ours = {"seconds": seconds, "cpu_seconds": cpu, "loss": last["loss"], "steps": last["step"]}
    rows = [
        (
            name,
            f"{side['steps']:,.0f}",
            f"{side['loss']:.4f}",
            f"{side['seconds']:.0f}",
            f"{side['cpu_seconds']:.0f}",
        )
        for name, side in (("Trainer, defaults, one epoch", theirs), ("train_lm.py, until as low", ours))
    ]
    ratio = [f"{ours[key] / theirs[key]:.3f}" for key in ("seconds", "cpu_seconds")]
    rows.append(("ratio", "", "", *ratio))
    header = ["demo model and text", "steps", "held-out loss", "seconds", "processor seconds"]
    common.write("time_to_loss", {"trainer": theirs, "train_lm": ours}, common.table(rows, header))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", choices=["processes", "startup", "time_to_loss"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lr", default="3e-3")
    asked = parser.parse_args()
    prepare_corpus(VOCAB)
    if asked.comparison == "processes":
        processes(asked.rounds)
    elif asked.comparison == "startup":
        startup(asked.rounds)
    else:
        time_to_loss(asked.lr)


if __name__ == "__main__":
    main()
