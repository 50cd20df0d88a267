"""The training loop of ``train_lm.py`` against a bare hand-written loop of the same model, step by step in one process.

    python benchmarks/loop.py [--config recipes/demo.yaml] [--rounds 20] [--steps 5]

What is compared: a whole run (data, guard, report, metrics, agreement on what is due) and, in turn with it, the least
that trains the same model: the same module, kernels, optimizer and batches of one size, already in memory; forward,
backward, clip, update. Both sides take ``--steps`` steps in turn; the ratio is that of tokens per second.

How: the run asks for its learning rate at the top of every step. The benchmark answers, and takes its own steps there.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  # the root must be on the path first

import train_lm  # noqa: E402
from benchmarks.common import ratios, spread, table, write  # noqa: E402
from lmcore import command_line  # noqa: E402


def bare_loop(module: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> Any:
    """A generator: each ``send(n)`` trains n steps and returns their seconds."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    module.train()
    number, seconds = 0, 0.0
    while True:
        count = yield seconds
        start = time.perf_counter()
        for _ in range(count):
            batch = batches[number % len(batches)]
            loss_sum, labels = module(**batch)
            (loss_sum / labels).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            number += 1
        seconds = time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "recipes/demo.yaml"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="steps of each side in a round")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    asked = parser.parse_args()
    ours: list[float] = []
    bare: list[float] = []
    side: dict[str, Any] = {}
    learning_rate = train_lm.optim.learning_rate
    open_model = train_lm.assemble.open_model

    def remembered(*args: Any, **kwargs: Any) -> Any:
        module = open_model(*args, **kwargs)
        side["module"] = copy.deepcopy(module)
        return module

    def at_the_top_of_a_step(step: int, **schedule: Any) -> float:
        if step == 0:
            first = next(iter(side["session"].read()))
            side["batches"] = [dict(batch) for batch in first.micro_batches]
            side["bare"] = bare_loop(side["module"], side["batches"])
            next(side["bare"])
        elif step % asked.steps == 0:
            ours.append(time.perf_counter() - side["start"])
            bare.append(side["bare"].send(asked.steps))
        if step % asked.steps == 0:
            side["start"] = time.perf_counter()
        return learning_rate(step, **schedule)

    class Remembered(train_lm.Session):  # type: ignore[misc]  # only here, to reach into a running script
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            side["session"] = self

    train_lm.optim.learning_rate = at_the_top_of_a_step
    train_lm.assemble.open_model = remembered
    train_lm.Session = Remembered
    with tempfile.TemporaryDirectory() as folder:
        steps = asked.steps * (asked.rounds + 3)
        words = {
            "config": asked.config,
            "run_dir": f"{folder}/run",
            "train.duration": f"{steps} steps",
            "train.precision": asked.precision,
            "evaluate.every": "never",
            "evaluate.at_end": "false",
            "checkpoint.every": "never",
        }
        argv = [part for name, value in words.items() for part in (f"--{name}", value)]
        code = train_lm.main(command_line.parse(argv))
    assert code == 0, code
    kept = slice(2, None)  # both sides warm up
    result = {
        "loop": {
            "config": Path(asked.config).name,
            "precision": asked.precision,
            "steps_per_round": asked.steps,
            "rounds": len(ours[kept]),
            "ours_seconds_per_step": spread([s / asked.steps for s in ours[kept]]),
            "bare_seconds_per_step": spread([s / asked.steps for s in bare[kept]]),
            "tokens_per_second_ratio": ratios(bare[kept], ours[kept]),
        }
    }
    ratio = result["loop"]["tokens_per_second_ratio"]
    row = (
        Path(asked.config).stem,
        asked.precision,
        f"{result['loop']['ours_seconds_per_step']['median'] * 1000:.0f}",
        f"{result['loop']['bare_seconds_per_step']['median'] * 1000:.0f}",
        f"{ratio['median']:.3f} ({ratio['p10']:.3f} to {ratio['p90']:.3f})",
    )
    header = ("model", "precision", "train_lm.py ms/step", "bare ms/step", "tokens/s, ratio (10% to 90%)")
    write(f"loop_{asked.precision}", result, table([row], header))


if __name__ == "__main__":
    main()
