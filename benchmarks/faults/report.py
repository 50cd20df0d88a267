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
    "kills": "SIGKILL of one rank or all at a place of the run, under every strategy: survivors out within 10 s with code "
    "71, the dead one named, nothing left behind, old checkpoints whole, the continued run bit-equal",
    "launched": "the same under `accelerate launch` with the files of `accelerate_configs/`: imports and the launcher too",
    "launcher-in-save": "SIGKILL of the launcher at every disk call of a rank's save, for every rank and strategy: that save is "
    "committed, the ranks save at the next boundary and leave with code 75, nothing left behind, the continued run bit-equal",
    "damages": "25 a trial, to any file of a checkpoint, token store or tokenizer: found, or without effect on what is read",
    "hostile": "data files, names, links, archives, configurations, a stranger's folders: a result or one line; no code "
    "runs, nothing outside changes, no control characters",
    "environments": "variables, limits, rights, full disks, closed output, terminals: bit-equal, or a documented exit code",
    "signals": "SIGTERM, SIGUSR1, SIGINT on any rank at any phase: saved at the boundary, code 75, bit-equal after",
    "launcher-signals": "signals to accelerate launch, torchrun, a rank, all: saved, nothing orphaned, bit-equal after",
    "full-disk": "disk full at byte b of a save: the last good checkpoint whole; stop (70) or train on",
    "not-finite": "NaN in rank r, micro-batch m: applied on no rank, said with step and positions",
    "rank-stopped": "SIGSTOP of one rank: out within timeout + 10 s (code 71), stacks of all, bit-equal after",
    "worker-killed": "SIGKILL of a data worker: no hang, the cause named, bit-equal after",
    "world-size": "2, 1, 2 processes with kills: the same samples in every step, losses within 1e-4",
    "prepare-killed": "SIGKILL of the token store's builders at a random moment or disk call: byte-identical",
    "secrets": "secrets of the environment, and one in a name: in no file of the run (canaries)",
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
        "`make faults` runs it: real runs are killed, their files damaged, their inputs and environments hostile. It is",
        "resumable, trial number i always makes the same choices, and each trial adds one line to `trials.jsonl`. A trial",
        '"held" if everything in the second column came out. Bit-equal: the hashes of weights and optimizer and every digit',
        "of every loss and evaluation are those of the run that nobody hurt (CPU, same topology). What the campaigns found,",
        "and what was repaired: [faults_found.md](faults_found.md).",
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
        "CPU that is shown to accelerate as an XPU (tests/support); under Slurm, on several machines and on GPUs: not run.",
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
