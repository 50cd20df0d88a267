"""What is learned from so many tokens and seconds: models and optimizers on one text, several seeds.

    python benchmarks/learning.py                                     # all variants, the demo's size and budget, 3 seeds
    python benchmarks/learning.py --variants gpt2-adamw modern-muon --tokens 204800 --seeds 1
    python benchmarks/learning.py --train 'mytext/*.txt' --size 15M --tokens 4e6
    python benchmarks/learning.py --size w64 --tokens 2e5 --grid 1e-3 2e-3 4e-3 --variants gpt2-adamw-tuned

A size is one of model.size, or wN: the model of that width of the family from which lmcore size chooses. Runs that are in the results
already are not run again, so that an interrupted benchmark goes on and a longer one adds to a shorter one.

Each run is train_lm.py itself, with the same text, tokenizer, block size and number of tokens; the variants differ in
the model and in what stands under VARIANTS. ``gpt2-adamw`` is the demo recipe of version 0.1.0; ``gpt2-adamw-tuned``
is the best of a grid of learning rates (``--grid``), and is what the others are compared with: p is of Welch's t-test
(two-sided, unequal variances) of the last losses over the seeds. Losses are validation losses over the whole validation set;
seconds are those of training alone, without evaluations, as train_lm.py measures them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine

from lmcore.config.parse import parse
from lmcore.humanize import short
from lmcore.run import ladder

ROOT = Path(__file__).resolve().parent.parent

COMMON = {
    "data.valid_fraction": 0.03,
    "data.block_size": 256,
    "tokenizer.vocab_size": 8000,
    "train.precision": "fp32",
    "train.micro_batch_blocks": 4,
    "evaluate.prompts": "[]",
    "report.trackers": "[]",
    "report.every": "5%",
    "checkpoint.every": "never",
}
ADAMW_OF_0_1 = {
    "optim.name": "adamw",
    "optim.lr": 3e-3,
    "optim.warmup": "8%",
    "optim.schedule": "cosine",
    "optim.min_lr_ratio": 0.05,
    "train.global_batch_blocks": 8,
}
MUON = {
    "optim.name": "muon",
    "optim.warmup": "never",
    "optim.schedule": "linear",
    "optim.min_lr_ratio": 0,
    "train.global_batch_blocks": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2-adamw": {"model.preset": "gpt2", **ADAMW_OF_0_1},
    "gpt2-adamw-tuned": {"model.preset": "gpt2", **ADAMW_OF_0_1, "train.global_batch_blocks": 4},
    "gpt2-muon": {"model.preset": "gpt2", **MUON},
    "modern-adamw": {"model.preset": "modern", **ADAMW_OF_0_1, "train.global_batch_blocks": 4},
    "modern-adamw-zero": {
        "model.preset": "modern",
        "model.zero_init": "true",
        **ADAMW_OF_0_1,
        "train.global_batch_blocks": 4,
    },
    "modern-muon": {"model.preset": "modern", **MUON},
    "modern_gguf-muon": {"model.preset": "modern_gguf", **MUON},
    "modern_conv-muon": {"model.preset": "modern_conv", **MUON},
}
RATES = {"gpt2-adamw": 3e-3, "gpt2-adamw-tuned": 2e-3, "modern-adamw": 2e-3, "modern-adamw-zero": 1e-3}
MUON_RATE = 6e-3


def command(variant: str, rate: float, seed: int, folder: Path, asked: argparse.Namespace) -> list[str]:
    """The command line of one run."""
    options = COMMON | VARIANTS[variant] | model_of(variant, asked.size) | {
        "optim.lr": rate,
        "seed": seed,
        "run_dir": folder / f"{variant}-{rate:g}-{seed}",
        "data.store_dir": asked.stores,
        "train.duration": f"{asked.tokens:.0f} tokens",
        "evaluate.every": f"{100 / asked.points:g}%",
        "resume": "never",
    }  # fmt: skip
    words = [sys.executable, str(ROOT / "train_lm.py"), "--data.train", asked.train]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words


def model_of(variant: str, size: str) -> dict[str, Any]:
    """The options of a size: a name of model.size, or a width of the family of lmcore size."""
    if not size.startswith("w"):
        return {"model.size": size}
    config = parse(
        ["--data.train", "x", "--model.preset", VARIANTS[variant]["model.preset"]], default_recipe=None
    )
    values = ladder.with_member(config, int(size[1:]), block_size=COMMON["data.block_size"])
    return {f"model.config.{name}": value for name, value in values["config"].items()}


def key(result: dict[str, Any]) -> tuple[Any, ...]:
    """What a result is of."""
    return tuple(result[name] for name in ("variant", "size", "train", "lr", "seed", "budget"))


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    """(tokens, seconds of training, validation loss) of each evaluation."""
    seconds, last, found = 0.0, 0, []
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train" and record.get("tokens_per_second"):
            seconds += (record["tokens"] - last) / record["tokens_per_second"]
            last = record["tokens"]
        elif record["kind"] == "eval" and record["set"] == "valid":
            found.append((record["tokens"], seconds, record["loss"]))
    return found


def first_below(points: list[tuple[int, float, float]], target: float) -> tuple[float, float] | None:
    """(tokens, seconds) at which the curve first crosses ``target``, linear between two evaluations."""
    for (t0, s0, l0), (t1, s1, l1) in zip(points, points[1:]):  # noqa: RUF007 -- readable as it is
        if l1 <= target < l0:
            share = (l0 - target) / (l0 - l1)
            return t0 + share * (t1 - t0), s0 + share * (s1 - s0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--size", default="5M", help="5M, 15M, ...; or w64, w128, ...")
    parser.add_argument("--train", default="stdlib")
    parser.add_argument("--picture", type=Path, help="a PNG: loss over tokens and over seconds")
    parser.add_argument("--tokens", type=float, default=500 * 2048)
    parser.add_argument("--points", type=int, default=10, help="evaluations of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--grid", type=float, nargs="+", help="learning rates, instead of one for each variant"
    )
    parser.add_argument("--target", type=float, help="a validation loss; tokens and seconds to reach it")
    parser.add_argument("--stores", default="token_stores")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "learning.json")
    asked = parser.parse_args()
    results: list[dict[str, Any]] = json.loads(asked.out.read_text()) if asked.out.exists() else []
    there = {key(result) for result in results}
    with tempfile.TemporaryDirectory() as folder:
        for variant in asked.variants:
            for rate in asked.grid or [RATES.get(variant, MUON_RATE)]:
                for seed in range(1, asked.seeds + 1):
                    if (variant, asked.size, asked.train, rate, seed, asked.tokens) in there:
                        continue
                    words = command(variant, rate, seed, Path(folder), asked)
                    done = subprocess.run(words, env=os.environ, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
                    points = curve(Path(words[words.index("--run_dir") + 1]))
                    results.append(
                        {"variant": variant, "size": asked.size, "train": asked.train, "lr": rate, "seed": seed,
                         "budget": asked.tokens, "curve": points, "machine": machine()}
                    )  # fmt: skip
                    print(
                        f"{variant:18} lr {rate:g} seed {seed}: {points[-1][2]:.4f} in {points[-1][1]:.0f} s",
                        flush=True,
                    )
                    asked.out.parent.mkdir(parents=True, exist_ok=True)
                    asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print()
    print(table(results, asked))
    if asked.picture:
        draw(results, asked)


def settings(results: list[dict[str, Any]], asked: argparse.Namespace) -> dict[tuple[str, float], list[Any]]:
    """(variant, rate) -> the curves of its seeds, of this size, text and budget."""
    found: dict[tuple[str, float], list[Any]] = {}
    for r in results:
        if (r["size"], r["train"], r["budget"]) == (asked.size, asked.train, asked.tokens):
            found.setdefault((r["variant"], r["lr"]), []).append(r["curve"])
    return found


def best_of(found: dict[tuple[str, float], list[Any]], variant: str) -> tuple[str, float] | None:
    """The setting of a variant with the lowest mean loss."""
    rates = [one for one in found if one[0] == variant]
    return min(rates, key=lambda one: statistics.mean(points[-1][2] for points in found[one]), default=None)


def welch(a: list[float], b: list[float]) -> float | None:
    """The two-sided p of Welch's t-test; none with fewer than two values on a side."""
    from scipy.stats import ttest_ind

    return float(ttest_ind(a, b, equal_var=False).pvalue) if min(len(a), len(b)) > 1 else None


def table(results: list[dict[str, Any]], asked: argparse.Namespace) -> str:
    """One line for each variant and rate: mean and deviation of the last loss, what the target took, p beside tuned AdamW."""
    lines = [
        "| variant | lr | seeds | loss | p | seconds | tokens to target | seconds to target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = settings(results, asked)
    tuned = best_of(found, "gpt2-adamw-tuned")
    for (variant, rate), curves in found.items():
        losses = [points[-1][2] for points in curves]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        seconds = statistics.mean(points[-1][1] for points in curves)
        reached = [first_below(points, asked.target) for points in curves] if asked.target else []
        hits = [hit for hit in reached if hit is not None]
        to_target = (
            f"{statistics.mean(h[0] for h in hits):,.0f} | {statistics.mean(h[1] for h in hits):.0f}"
            if hits and len(hits) == len(curves)
            else "- | -"
        )
        p = welch(losses, [c[-1][2] for c in found[tuned]]) if tuned and tuned != (variant, rate) else None
        lines.append(
            f"| {variant} | {rate:g} | {len(curves)} | {statistics.mean(losses):.4f}{spread} | "
            f"{'-' if p is None else f'{p:.2g}'} | {seconds:.0f} | {to_target} |"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    """The best rate of each variant: every seed a thin line, over tokens and over seconds."""
    from matplotlib.figure import Figure

    found = settings(results, asked)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True), (0, 1), ("tokens", "seconds of training")
    ):
        for index, variant in enumerate(VARIANTS):
            best = best_of(found, variant)
            for number, points in enumerate(found[best] if best else []):
                axes.plot([p[column] for p in points], [p[2] for p in points], color=f"C{index}", linewidth=0.8,
                          label=f"{variant}, {best[1]:g}" if best and not number else None)  # fmt: skip
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))  # 150k: six digits run into each other
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel("validation loss")
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(asked.picture, dpi=130)


if __name__ == "__main__":
    main()
