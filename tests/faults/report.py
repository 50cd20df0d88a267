"""``docs/faults.md`` from the record of the campaigns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults.soak import story

PROMISES = {
    "kill": "SIGKILL at a random moment or inside a save, restarted: weights, optimizer, losses bit-equal",
    "signal": "SIGTERM, SIGUSR1, SIGINT on any rank at any phase: saved at the boundary, code 75, bit-equal after",
    "full": "disk full at byte b of a save: the last good checkpoint intact; stop (70) or train on",
    "nan": "NaN in rank r, micro-batch m: applied on no rank, said with step and positions",
    "rank-killed": "SIGKILL one rank: the others out within 10 s, the dead one named, bit-equal after",
    "rank-stopped": "SIGSTOP one rank: out within timeout + 10 s (code 71), stacks of all, bit-equal after",
    "worker-killed": "SIGKILL a data worker: no hang, the cause named, bit-equal after",
    "world-size": "2, 1, 2 processes with kills: the same samples in every step, losses within 1e-4",
    "damage": "a bit flipped, file cut, page zeroed, file deleted, added, swapped: found, the older one taken",
    "secrets": "secrets of the environment, and one in a name: in no file of the run (canaries)",
    "strategies": "single, DDP, FSDP2 (CPU shown as XPU to accelerate), ZeRO-1/2/3: NaNs; all ranks killed, bit-equal",
    "launcher": "signals to accelerate launch, torchrun, a rank, all: saved, nothing orphaned, bit-equal after",
    "prepare-killed": "SIGKILL of prepare at a random moment or disk call, one or two processes: byte-identical",
    "soak": "kills every 15 to 60 s, restarted by itself: bit-equal, at least 95% of the time in steps that count",
}


def write_report(record: list[dict[str, Any]], path: Path) -> None:
    """One table of all campaigns so far, and every broken promise with its evidence."""
    lines = [
        "# The fault campaign",
        "",
        "`python -m tests.faults --kind kill --n 100` hurts real runs and appends to `docs/faults.json`; this page is",
        'written from it. A trial is one run, hurt and restarted until it ends; "held" means that everything in the',
        "second column came out. Bit-equal compares the sha256 of all weights and optimizer states and every digit of",
        "every loss with the run that nobody hurt (CPU, same topology).",
        "",
        "| fault | promise | trials | held | counted | last run |",
        "|---|---|---:|---:|---|---|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in record):
        rows = [row for row in record if row["kind"] == kind]
        trials, broken = sum(row["trials"] for row in rows), sum(row["broken"] for row in rows)
        counts: dict[str, int] = {}
        for row in rows:
            for name, value in row["counts"].items():
                counts[name] = counts.get(name, 0) + value
        counted = ", ".join(f"{value:,} {name}" for name, value in sorted(counts.items()))
        last = rows[-1]
        lines.append(
            f"| {kind} | {PROMISES.get(kind, '')} | {trials:,} | {trials - broken:,} | {counted} | {last['date']} |"
        )
    soaks = [row for row in record if row["kind"] == "soak" and not row["broken"]]
    if soaks:
        lines += ["", "Soaks (what each share means: `tests/faults/soak.py`):", ""]
        lines += [f"- {row['date']}: {story(row['counts'])}." for row in soaks]
    if record:
        versions = ", ".join(f"{name} {value}" for name, value in record[-1]["versions"].items())
        lines += ["", f"Versions of the last campaign: {versions}."]
    evidence = [(row, item) for row in record for item in row["evidence"]]
    if evidence:
        lines += ["", "## Broken promises, and what became of them", ""]
        for row, item in evidence:
            last_line = item["text"].strip().splitlines()[-1][:200]
            repair = item.get("repaired", "open")
            lines.append(f"- {row['kind']} {item['trial']} ({row['date']}): `{last_line}`: {repair}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
