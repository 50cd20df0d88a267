"""Steps per second of several programs, in turn, on the same model, data sizes and machine.

    python benchmarks/speed.py loop          # train_lm.py against a bare hand-written loop: what the system costs
    python benchmarks/speed.py trainer       # against transformers.Trainer, same precision and optimizer
    python benchmarks/speed.py shipped       # both as they ship: train_lm.py with bf16, Trainer with its defaults
    python benchmarks/speed.py nanogpt       # against a nanoGPT-style script
    python benchmarks/speed.py nanogpt --model character --blocks 12 --tokens 64 --vocab 128 --precision fp32
    python benchmarks/speed.py saving        # checkpoints every 50 steps, in the background, against none
    python benchmarks/speed.py flat          # ten times the corpus, ten times the steps done, and after a resume
    python benchmarks/speed.py allocator     # one bare loop with glibc as it is, told to keep memory, and jemalloc

Each row: the second program's tokens/s are 1. Ratios pair by pair; the median and the 10th-90th percentile. The CPU
time ratio beside it does not depend on what else the machine does, and shows whether the clock can be believed. Every
program is started several times, first and last in turn: the same program against itself is up to 3% slower where it
is started first, for all its life.
"""

from __future__ import annotations

import argparse
import glob
from pathlib import Path
from typing import Any

import common
from contestants import DEFAULTS, alternate, prepare_corpus

COMPARISONS: dict[str, list[tuple[str, str, dict[str, Any], dict[str, str]]]] = {
    "loop": [("train_lm.py", "train_lm", {}, {}), ("bare loop", "bare", {}, {})],
    "trainer": [("train_lm.py", "train_lm", {}, {}), ("Trainer", "trainer", {}, {})],
    "shipped": [("train_lm.py", "train_lm", {"compile": True}, {}), ("Trainer", "trainer_default", {}, {})],
    "nanogpt": [("train_lm.py", "train_lm", {}, {}), ("nanoGPT-style", "nanogpt", {}, {})],
    "saving": [
        ("saving every 50", "train_lm", {"save_every": "50 steps"}, {}),
        ("never saving", "train_lm", {}, {}),
    ],
    "flat": [
        ("10 x the corpus", "train_lm", {"corpus_times": 10}, {}),
        ("after a resume", "train_lm", {"resume": True}, {}),
        ("10 x the steps", "train_lm", {"earlier_steps": 10}, {}),
        ("fresh", "train_lm", {}, {}),
    ],
    "allocator": [
        ("kept memory", "bare", {}, {}),
        # MALLOC_CONF is a choice made by hand, for which keep_freed_memory changes nothing
        ("glibc", "bare", {}, {"MALLOC_CONF": "none"}),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", choices=sorted(COMPARISONS))
    parser.add_argument("--model", default=DEFAULTS["model"])
    parser.add_argument("--blocks", type=int, default=DEFAULTS["blocks"])
    parser.add_argument("--tokens", type=int, default=DEFAULTS["tokens"])
    parser.add_argument("--vocab", type=int, default=DEFAULTS["vocab"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="steps of one turn")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--launches", type=int, default=4, help="how often every program is started anew")
    parser.add_argument("--warmup", type=int, default=3, help="first steps of a launch that are not counted")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    settings = {
        k: getattr(options, k) for k in ("model", "blocks", "tokens", "vocab", "precision", "compile")
    }
    cases = list(COMPARISONS[options.comparison])
    jemalloc = sorted(glob.glob("/usr/lib/*/libjemalloc.so*"))
    if options.comparison == "allocator" and jemalloc:
        decay = {"LD_PRELOAD": jemalloc[0], "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}
        cases.insert(1, ("jemalloc", "bare", {}, decay))

    prepare_corpus(options.vocab)
    measured = alternate(
        cases,
        settings,
        launches=options.launches,
        rounds=options.rounds,
        steps=options.steps,
        warmup=options.warmup,
    )
    reference = cases[-1][0]
    per_turn = options.steps * options.blocks * options.tokens
    rows, numbers = [], {}
    for label, turns in measured.items():
        seconds, cpu = [t["seconds"] for t in turns], [t["cpu_seconds"] for t in turns]
        theirs = [t["seconds"] for t in measured[reference]]
        ratio = common.ratios(theirs, seconds)
        cpu_ratio = common.ratios([t["cpu_seconds"] for t in measured[reference]], cpu)
        faults = common.spread([t["faults"] / options.steps for t in turns])["median"]
        numbers[label] = {"turns": turns, "ratio": ratio, "cpu_ratio": cpu_ratio}
        rows.append(
            (
                label,
                f"{per_turn / common.spread(seconds)['median']:,.0f}",
                f"{ratio['median']:.3f} ({ratio['p10']:.3f}-{ratio['p90']:.3f})",
                f"{cpu_ratio['median']:.3f}",
                f"{faults:,.0f}",
            )
        )
    setting = (
        f"{options.comparison}: GPT-2 {options.model}, {options.blocks} x {options.tokens} tokens, V = "
        f"{options.vocab}, {options.precision}{', compiled' if options.compile else ''}; "
        f"{options.rounds} turns of {options.steps} steps in {options.launches} launches"
    )
    header = ["program", "tokens/s", f"speed / {reference}", "by CPU time", "page faults a step"]
    text = setting + "\n\n" + common.table(rows, header)
    common.write(
        f"{options.comparison}-{options.model}", {"setting": setting, "cases": numbers}, text, options.out
    )


if __name__ == "__main__":
    main()
