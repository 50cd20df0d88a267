"""What the benchmarks share: interleaved timing, medians with their spread, the machine, JSON and a table.

Two things that are compared are always run side by side in one process or one call, in turn (A B A B ...), because a
shared machine changes its speed by more than the differences of interest from minute to minute. Ratios are taken
pair by pair; their median and the 10th and 90th percentile are what counts.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # lmcore, also where it is not installed


def percentile(values: Sequence[float], q: float) -> float:
    """``q`` from 0 to 100; linear interpolation between order statistics."""
    return float(np.percentile(values, q))


def interleave(
    cases: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Call each case in turn, ``rounds`` times after ``warmup`` unrecorded rounds; what each call returned."""
    kept: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(warmup + rounds):
        # Forwards, then backwards: a slow drift of the machine hits both sides of a pair alike.
        for name in names if turn % 2 == 0 else reversed(names):
            value = cases[name]()
            if turn >= warmup:
                kept[name].append(value)
    return kept


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and spread of the pairwise ratios."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and spread of a list."""
    return {"median": statistics.median(values), "p10": percentile(values, 10), "p90": percentile(values, 90)}


def machine() -> dict[str, Any]:
    """Hardware and versions, as they go into every result."""
    import torch
    import transformers

    name = platform.processor() or platform.machine()
    flags = ""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
        flags = " with AMX" if "amx_bf16" in text else ""
    except (OSError, StopIteration):
        pass
    found = {
        "cpu": f"{len(os.sched_getaffinity(0))} cores of {name}{flags}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "load_before": os.getloadavg()[0],
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write(
    name: str, result: Mapping[str, Any], text: str, folder: Path | None = None, *, show: bool = True
) -> None:
    """Print the table, and keep it with all numbers as ``results/<name>.json``, which is replaced as a whole."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(
        json.dumps({**result, "machine": result.get("machine") or machine(), "table": text}, indent=1) + "\n"
    )
    part.replace(path)
    if show:
        print(text)
        print(f"\n{path}")
