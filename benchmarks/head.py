"""The vocabulary head: chunked with gradients in the forward pass, against the plain head and torch's own chunked one.

    python benchmarks/head.py                     # GPT-2's head on this machine, a few minutes on 2 CPU cores
    python benchmarks/head.py --device cuda --tokens 16384

Each variant computes the loss of a linear head (D x V) over N tokens and its gradients for the hidden states and the
weight, in bfloat16 autocast as in training. Time: interleaved, median. Memory: the peak of what the variant itself
allocates (torch's allocator, not the process), the gradients that it hands out included.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from lmcore.model.loss import causal_lm_loss, choose_chunk


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Highest number of bytes that ``run`` holds at once beyond what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    now = highest = 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--chunks", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that does other work too")
    parser.add_argument("--without-torchs", action="store_true", help="it is slow on a CPU")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = options.device
    clock = time.process_time if options.cpu_time else time.perf_counter

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.width, generator=generator).to(device).requires_grad_()
    weight = (
        (0.02 * torch.randn(options.vocab, options.width, generator=generator)).to(device).requires_grad_()
    )
    labels = torch.randint(0, options.vocab, (options.tokens,), generator=generator).to(device)
    auto = choose_chunk("auto", tokens=options.tokens, vocab_size=options.vocab, device_type=device)

    def ours(chunk: int) -> Callable[[], Tensor]:
        return lambda: causal_lm_loss(hidden, weight, None, labels, chunk=chunk)[0]

    def plain_torch() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    def torch_chunked() -> Tensor:
        made = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=made)

    losses: dict[str, Callable[[], Tensor]] = {"plain": plain_torch, f"chunked, auto = {auto}": ours(auto)}
    losses |= {f"chunked, {chunk}": ours(chunk) for chunk in options.chunks if chunk != auto}
    try:
        if options.without_torchs:
            raise RuntimeError("as asked")
        torch_chunked()
        losses["torch's linear_cross_entropy, chunked"] = torch_chunked
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        print(f"torch's linear_cross_entropy: left out ({error})")

    def step(loss: Callable[[], Tensor]) -> Callable[[], float]:
        def run() -> float:
            start = clock()
            with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16"):
                value = loss()
            (value / options.tokens).backward()
            hidden.grad = weight.grad = None
            if device == "cuda":
                torch.cuda.synchronize()
            return clock() - start

        return run

    steps = {name: step(loss) for name, loss in losses.items()}
    memory = {name: peak_bytes(run, device) for name, run in steps.items()}
    times = common.interleave(steps, rounds=options.rounds)
    rows, numbers = [], {}
    for name in steps:
        ratio = common.ratios(times[name], times["plain"])
        numbers[name] = {"seconds": times[name], "peak_bytes": memory[name], "time_ratio": ratio}
        rows.append(
            (
                name,
                f"{common.spread(times[name])['median']:.3f} s",
                f"{ratio['median']:.2f} ({ratio['p10']:.2f}-{ratio['p90']:.2f})",
                f"{memory[name] / 2**20:,.0f} MiB",
                f"{memory[name] / memory['plain']:.3f}",
            )
        )
    measured = "CPU time" if options.cpu_time else "wall time"
    shape = f"N = {options.tokens}, D = {options.width}, V = {options.vocab}"
    setting = f"{measured}; {shape}, {options.precision}, {device}"
    text = setting + "\n\n" + common.table(rows, ["head", "time", "time / plain", "peak", "peak / plain"])
    common.write(
        f"head-{device}-{options.precision}", {"setting": setting, "cases": numbers}, text, options.out
    )


if __name__ == "__main__":
    main()
