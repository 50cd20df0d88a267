"""The fault campaign: kills, damages, hostile inputs and broken environments, by one command.

    python -m benchmarks.faults.campaign --all --out DIR              # everything; the same command again goes on
    python -m benchmarks.faults.campaign --part kills --trials 30 --out DIR --jobs 2
    python -m benchmarks.faults.campaign --report DIR                 # the table, and docs/faults.md from DIR

Trial number i of a part always makes the same choices. Each adds one JSON line to ``DIR/trials.jsonl``; a trial that is
there already is not run again (``--again`` runs those again that broke a promise). The folder of a trial that broke a
promise is kept. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.faults import damages, environments, hostile, kills
from benchmarks.faults.report import table, write_page
from tests.faults import kinds, runs
from tests.faults.kinds import Trial
from tests.faults.launchers import launcher
from tests.faults.preparing import prepare_killed

Work = Callable[[Path, int, Path], Trial]
PARTS: dict[str, tuple[Work, int]] = {
    "environments": (environments.trial, len(environments.CASES)),
    "hostile": (hostile.trial, len(hostile.CASES)),
    "damages": (damages.trial, 240),
    "kills": (kills.kill_forked, 120),
    "launched": (kills.kill_launched, 60),
    "launcher-in-save": (kills.launcher_killed_in_save, len(kills.SAVES)),
    "signals": (kinds.signals, 20),
    "launcher-signals": (launcher, 34),
    "full-disk": (kinds.full, 60),
    "not-finite": (kinds.not_finite, 10),
    "rank-stopped": (kinds.rank_stopped, 4),
    "worker-killed": (kinds.worker_killed, 10),
    "world-size": (kinds.world_size, 10),
    "prepare-killed": (prepare_killed, 15),
    "secrets": (kinds.secrets, 2),
}
"""Name -> the trial and how many of it ``--all`` runs."""
LIMIT_SECONDS = 3600.0
"""A trial that takes longer hangs, also on a busy machine."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults.campaign", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument(
        "--part", action="append", choices=PARTS, default=[], help="only this part (repeatable)"
    )
    parser.add_argument(
        "--trials", type=int, help="trials of each part (default: as many as the whole campaign)"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no trial after so many minutes")
    parser.add_argument("--again", action="store_true", help="run trials again that broke a promise")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="only print the table and write docs/faults.md"
    )
    asked = parser.parse_args()
    if asked.report is not None:
        rows = read_rows(asked.report / "trials.jsonl")
        print(table(rows))
        write_page(rows, runs.ROOT / "docs", {part: number for part, (_, number) in PARTS.items()})
        return 0
    parts = [*PARTS] if asked.all else asked.part
    if not parts or asked.out is None:
        parser.error("name the parts (--all, --part) and a folder for the results (--out)")
    place = asked.out.resolve()
    place.mkdir(parents=True, exist_ok=True)
    done = {
        (row["part"], row["trial"])
        for row in read_rows(place / "trials.jsonl")
        if row["held"] or not asked.again
    }
    waiting = [
        (part, number)
        for part in parts
        for number in range(asked.first, asked.first + (asked.trials or PARTS[part][1]))
        if (part, number) not in done
    ]
    runs.preload()
    runs.prepare(place)
    broken = campaign(place, waiting, asked.jobs, asked.minutes)
    print(table(read_rows(place / "trials.jsonl")))
    return int(broken > 0)


def campaign(place: Path, waiting: list[tuple[str, int]], jobs: int, minutes: float) -> int:
    """Run the trials, each in a fork of its own; returns how many broke a promise."""
    running: dict[int, tuple[str, int, float]] = {}
    stop_at = time.monotonic() + 60 * minutes

    def stop(_number: int, _frame: object) -> None:
        """Asked to end: the trials that run are as if they had not been started."""
        for number in (signal.SIGTERM, signal.SIGKILL):  # the first lets a trial end what it has started
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number) if number == signal.SIGTERM else os.killpg(pid, number)
            time.sleep(3)
        os._exit(75)

    signal.signal(signal.SIGTERM, stop)
    stamp = {"commit": commit(), "system": system()}
    broken = 0
    while waiting or running:
        if time.monotonic() > stop_at:
            waiting = []
        while waiting and len(running) < jobs:
            part, number = waiting.pop(0)
            running[start(place, part, number)] = (part, number, time.monotonic())
        for pid, (part, number, begin) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - begin > LIMIT_SECONDS
            if not ended and late:
                os.killpg(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            if not (ended or late):
                continue
            del running[pid]
            path = result_path(place, part, number)
            row: dict[str, Any] = {"held": False, "counts": {}, "note": ""}
            row["evidence"] = (
                f"the trial did not end within {LIMIT_SECONDS:.0f} s" if late else f"it ended with {status}"
            )
            if path.exists():
                row = json.loads(path.read_text())
                path.unlink()
            row = {
                "part": part, "trial": number, **row, "seconds": round(time.monotonic() - begin, 1),
                "date": time.strftime("%Y-%m-%d", time.gmtime()), **stamp,
            }  # fmt: skip
            with open(place / "trials.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            broken += not row["held"]
            words = " ".join(f"{value} {name}," for name, value in row["counts"].items())
            print(
                f"{part} {number}: {'held' if row['held'] else 'BROKEN'} {words} {row['note']} {row['seconds']} s",
                *([row["evidence"]] if not row["held"] else []),
                sep="\n" if not row["held"] else "",
                flush=True,
            )
        time.sleep(0.02)
    return broken


def start(place: Path, part: str, number: int) -> int:
    """Fork one trial, in a process group of its own; its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    folder = place / "trials" / f"{part}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row: dict[str, Any] = {"held": True, "counts": {}, "note": "", "evidence": ""}
    code = 1
    try:
        try:
            trial = PARTS[part][0](place, number, folder)
        except Exception:  # whatever it is, it is evidence
            text = traceback.format_exc()
            row |= {
                "held": False,
                "evidence": text if len(text) < 6000 else f"{text[:1500]}\n...\n{text[-4500:]}",
            }
        else:
            row |= {"counts": trial.counts, "note": trial.note}
            shutil.rmtree(folder, ignore_errors=True)
        aside = result_path(place, part, number).with_suffix(".tmp")
        aside.write_text(json.dumps(row))
        os.replace(aside, result_path(place, part, number))
        code = 0
    finally:
        os._exit(code)


def result_path(place: Path, part: str, number: int) -> Path:
    return place / f"result-{part}-{number}.json"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The last line of each trial; a line that a kill has torn is none."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.pop((row["part"], row["trial"]), None)
        rows[row["part"], row["trial"]] = row
    return [*rows.values()]


def commit() -> str:
    """The last one that changed the code that is hurt."""
    git, code = ["git", "-C", str(runs.ROOT)], ["--", "lmcore", "train_lm.py"]
    last = subprocess.run(
        [*git, "log", "-1", "--format=%h", *code], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", *code], capture_output=True, text=True, check=False
    )
    return (last.stdout.strip() or "unknown") + ("-changed" if changed.stdout.strip() else "")


def system() -> dict[str, str]:
    """Versions and machine."""
    cores = f"{len(os.sched_getaffinity(0))} cores"
    return {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")} | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {cores}, no GPU",
    }


if __name__ == "__main__":
    sys.exit(main())
