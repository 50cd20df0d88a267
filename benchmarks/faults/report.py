"""The table of a campaign, ``docs/faults.json`` and ``docs/faults.md``, from the lines of its trials.

A part that these lines have no trial of stays in the page as it was recorded: each part can be run anew by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROMISES = {
    "kills": "SIGKILL of one rank or of all at a place of the run, under every strategy: survivors exit within 10 s "
    "with code 71, the dead rank is named, no process is left, old checkpoints are whole, the continued run is "
    "bit-equal",
    "launched": "the same under `accelerate launch` with the files of `accelerate_configs/`; also during imports, "
    "and of the launcher",
    "launcher-in-save": "SIGKILL of the launcher at every disk call of a rank's save, for every rank and strategy: "
    "that save is committed, the ranks save at the next boundary and exit with code 75, no process is left, the "
    "continued run is bit-equal",
    "damages": "25 per trial, in any file of a checkpoint, token store or tokenizer: found, or without effect on "
    "what is read",
    "hostile": "data files, names, links, archives, configurations, folders from strangers: a result or a one-line "
    "error; no code runs, no file outside changes, no control characters are printed",
    "environments": "environment variables, limits, permissions, full disks, closed output, terminals: bit-equal, "
    "or a documented exit code",
    "signals": "SIGTERM, SIGUSR1, SIGINT to any rank in any phase: saved at the boundary, code 75, the continued "
    "run is bit-equal",
    "launcher-signals": "signals to accelerate launch, torchrun, a rank, all: saved, no orphans, the continued run "
    "is bit-equal",
    "full-disk": "disk full at byte b of a save: the last good checkpoint is whole; the run stops (70) or "
    "continues, as configured",
    "not-finite": "NaN on rank r in micro-batch m: applied on no rank, reported with step and positions",
    "rank-stopped": "SIGSTOP of one rank: all exit within timeout + 10 s (code 71) with the stacks of all ranks, "
    "the continued run is bit-equal",
    "worker-killed": "SIGKILL of a data worker: no hang, the cause is named, the continued run is bit-equal",
    "world-size": "2, then 1, then 2 processes, with kills: the same samples in every step, losses within 1e-4",
    "prepare-killed": "SIGKILL of the processes that build a token store, at a random moment or disk call: the "
    "store is byte-identical",
    "secrets": "secrets in the environment, and one in a name: in no file of the run (canaries)",
}
KILLS = ("kills", "launched", "launcher-in-save")
Row = Mapping[str, Any]


def totals(rows: Iterable[Row]) -> dict[str, int]:
    """The counts of all trials together."""
    counts: dict[str, int] = {}
    for row in rows:
        for name, value in row["counts"].items():
            counts[name] = counts.get(name, 0) + value
    return dict(sorted(counts.items()))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What ``docs/faults.json`` holds: for each part its trials, days, commits, and the counts of those that held; and every
    broken promise."""
    parts = {}
    for part in sorted({row["part"] for row in rows}, key=[*PROMISES].index):
        mine = [row for row in rows if row["part"] == part]
        parts[part] = {
            "trials": len(mine),
            "held": sum(row["held"] for row in mine),
            "counts": totals(row for row in mine if row["held"]),
            "dates": sorted({row["date"] for row in mine}),
            "commits": sorted({row["commit"] for row in mine}),
        }
    broken = [
        {
            "part": row["part"],
            "trial": row["trial"],
            "commit": row["commit"],
            "evidence": row["evidence"][:1500],
        }
        for row in rows
        if not row["held"]
    ]
    systems = [dict(text) for text in dict.fromkeys(tuple(sorted(row["system"].items())) for row in rows)]
    return {"parts": parts, "broken": broken, "systems": systems}


def with_recorded(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """The summary with what ``path`` has recorded of the other parts."""
    if not path.exists():
        return found
    recorded = json.loads(path.read_text(encoding="utf-8"))
    parts = recorded["parts"] | found["parts"]
    kept = [row for row in recorded["broken"] if row["part"] not in found["parts"]]
    systems = [system for system in recorded["systems"] if system not in found["systems"]]
    return {
        "parts": {part: parts[part] for part in PROMISES if part in parts},
        "broken": kept + found["broken"],
        "systems": systems + found["systems"],
    }


def table(rows: Sequence[Row]) -> str:
    """One line for each part."""
    return table_of(summary(rows))


def table_of(found: Mapping[str, Any]) -> str:
    """:func:`table` of a summary."""
    lines = ["| part | what must hold | trials | held | counted |", "|---|---|---:|---:|---|"]
    for part, row in found["parts"].items():
        counted = ", ".join(
            f"{value:,} {name}" for name, value in row["counts"].items() if not name.startswith("at: ")
        )
        lines.append(f"| {part} | {PROMISES[part]} | {row['trials']:,} | {row['held']:,} | {counted} |")
    return "\n".join(lines)


def write_page(rows: Sequence[Row], docs: Path, planned: Mapping[str, int]) -> None:
    """``docs/faults.json`` and the page that shows it; ``planned``: how many trials of each part the whole campaign has."""
    found = with_recorded(summary(rows), docs / "faults.json")
    (docs / "faults.json").write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    kills = totals(row for part, row in found["parts"].items() if part in KILLS)
    damages, hostile, environments = (
        found["parts"].get(part, {"counts": {}})["counts"] for part in ("damages", "hostile", "environments")
    )
    places = {name.removeprefix("at: "): value for name, value in kills.items() if name.startswith("at: ")}
    strategies = {
        name: kills.get(f"of {name}", 0) for name in ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
    }
    victims = {name: kills.get(f"of {name}", 0) for name in ("one rank of two", "all ranks", "the launcher")}
    ran = {part: found["parts"].get(part, {"trials": 0})["trials"] for part in planned}
    extent = "Every trial of the campaign was run."
    if any(ran[part] < number for part, number in planned.items()):
        counts = ", ".join(f"{part} {ran[part]} of {number}" for part, number in planned.items())
        extent = (
            f"How far this record has got, in trials of the whole campaign: {counts}. The rest is not run."
        )
    lines = [
        "# The fault campaign",
        "",
        "<!-- written by `python -m benchmarks.faults.campaign --report DIR` from the trials of a campaign -->",
        "",
        "`make faults` runs it: real runs are killed, their files are damaged, and their inputs and environments are hostile. It is",
        'resumable, trial number i always makes the same choices, and each trial adds one line to `trials.jsonl`. A trial "held" if',
        "everything in the second column was true. Bit-equal: the hashes of weights and optimizer state and every digit of every",
        "loss and evaluation are those of an undisturbed run (CPU, same topology). What the campaigns found, and what was repaired:",
        "[faults_found.md](faults_found.md).",
        "",
        f"In all: {kills.get('kills', 0):,} kills, {damages.get('damages', 0):,} damages, "
        f"{hostile.get('hostile inputs', 0):,} hostile inputs and "
        f"{environments.get('environments', 0):,} environments held.",
        "",
        table_of(found),
        "",
        extent,
        "",
        "## Kills",
        "",
        "By strategy: " + ", ".join(f"{name} {value}" for name, value in strategies.items()) + ". "
        "By what was killed: " + ", ".join(f"{name} {value}" for name, value in victims.items()) + ". "
        f"{kills.get('survivors that ended with 71', 0)} surviving ranks ended by themselves with code 71. FSDP2 runs on a "
        "CPU that accelerate is made to take for an XPU (tests/support). Not run: Slurm, several machines, GPUs.",
        "",
        "| place | kills |",
        "|---|---:|",
        *(f"| {name} | {value} |" for name, value in sorted(places.items())),
        "",
        "## Damages",
        "",
        *(
            f"- {name}: {value:,}"
            for name, value in damages.items()
            if name != "damages" and not name.startswith("damages")
        ),
        *(f"- {name}: {value:,}" for name, value in damages.items() if name.startswith("damages of")),
        "",
    ]
    if found["broken"]:
        lines += [
            "## Trials that did not hold",
            "",
            "What became of them: [faults_found.md](faults_found.md).",
            "",
        ]
        for row in found["broken"]:
            said = row["evidence"].strip().splitlines()
            errors = [line for line in said if re.match(r"(\d+: )?[\w.]*(Error|Expired|Iteration)\b", line)]
            shown = (errors or said)[-1][:160].replace("|", "/").replace("`", "")
            lines.append(f"- {row['part']} {row['trial']} ({row['commit']}): `{shown}`")
        lines.append("")
    dates = sorted({date for part in found["parts"].values() for date in part["dates"]})
    commits = sorted({commit for part in found["parts"].values() for commit in part["commits"]})
    versions = "; ".join(
        ", ".join(f"{name} {value}" for name, value in system.items()) for system in found["systems"]
    )
    lines += [
        f"Run on {' and '.join(dates)} on the commits {', '.join(commits)}; the machine was shared with other work. {versions}.",
        "",
        "Not run here: the soak of 30 minutes (`python -m tests.faults --kind soak --minutes 30`; version 0.1.0 had a goodput",
        "of 95.7%), real nodes, GPUs, network file systems.",
    ]
    (docs / "faults.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
