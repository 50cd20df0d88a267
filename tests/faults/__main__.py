"""The fault campaign: hurt runs in every way that we know, and count what is lost.

    python -m tests.faults                          # a few of each kind
    python -m tests.faults --kind kill --n 100      # a hundred trials of one kind, appended to docs/faults.json
    python -m tests.faults --kind soak --minutes 30 # kills every 15 to 60 s; takes an hour, with the undisturbed run
    python -m tests.faults --report                 # docs/faults.md from docs/faults.json

Resumable: trial number i of a kind always makes the same choices, and a kind goes on where its record ends.
Exit code 1 if a promise was broken; the folder of that trial is kept and named.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults import runs
from tests.faults.kinds import KINDS, Kind
from tests.faults.launchers import launcher
from tests.faults.preparing import prepare_killed
from tests.faults.report import write_report
from tests.faults.soak import MINUTES, soak

RECORD = runs.ROOT / "docs" / "faults.json"
MORE: dict[str, Kind] = {"launcher": launcher, "prepare-killed": prepare_killed}
DEFAULT = {"kill": 3, "signal": 5, "full": 4, "nan": 2, "damage": 1}
"""Trials, not faults: a trial of a kill, a signal or a NaN holds several."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kind", action="append", choices=[*KINDS, *MORE, "soak"], help="only this kind (repeatable)"
    )
    parser.add_argument("--n", type=int, help="trials of each kind (default: as many as the default tests)")
    parser.add_argument(
        "--first", type=int, help="number of the first trial (default: where the record ends)"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="length of a soak")
    parser.add_argument("--record", type=Path, default=RECORD, help="JSON file that the results are added to")
    parser.add_argument("--no-record", action="store_true", help="only print")
    parser.add_argument("--place", type=Path, help="where the runs live (default: a new temporary folder)")
    parser.add_argument("--report", action="store_true", help="only write docs/faults.md from the record")
    options = parser.parse_args()
    record = json.loads(options.record.read_text()) if options.record.exists() else []
    if options.report:
        write_report(record, runs.ROOT / "docs" / "faults.md")
        return 0
    trials = KINDS | MORE | {"soak": functools.partial(soak, minutes=options.minutes)}
    runs.preload()
    broken = 0
    place = options.place or Path(tempfile.mkdtemp(prefix="faults-"))
    runs.prepare(place)
    for kind in options.kind or [*trials]:
        known = [row for row in record if row["kind"] == kind]
        first = options.first if options.first is not None else max((row["to"] for row in known), default=0)
        row = campaign(kind, trials[kind], place, first, options.n or DEFAULT.get(kind, 1))
        broken += row["broken"]
        if not options.no_record:
            # Read again: another campaign may have added to it meanwhile.
            record = json.loads(options.record.read_text()) if options.record.exists() else []
            record.append(row)
            options.record.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if not options.no_record:
        write_report(record, runs.ROOT / "docs" / "faults.md")
    if not broken and options.place is None:
        shutil.rmtree(place)
    return int(broken > 0)


def campaign(kind: str, hurt: Kind, place: Path, first: int, count: int) -> dict[str, Any]:
    """Trials ``first`` to ``first + count`` of one kind; a row of the record."""
    begin, counts, evidence, done = time.time(), {}, [], 0
    totals: dict[str, int] = counts
    for number in range(first, first + count):
        folder = place / f"{kind}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        try:
            trial = hurt(place, number, folder)
        except (AssertionError, OSError, KeyError, ValueError, IndexError):
            text = traceback.format_exc()
            evidence.append({"trial": number, "text": text[-1500:]})
            print(f"{kind} {number}: BROKEN; {folder} is kept\n{text}", flush=True)
        else:
            for name, value in trial.counts.items():
                totals[name] = totals.get(name, 0) + value
            print(
                f"{kind} {number}: held {trial.counts} {trial.note} {time.monotonic() - started:.1f} s",
                flush=True,
            )
            shutil.rmtree(folder, ignore_errors=True)
        done += 1
    return {
        "kind": kind,
        "from": first,
        "to": first + done,
        "trials": done,
        "broken": len(evidence),
        "counts": dict(sorted(totals.items())),
        "evidence": evidence,
        "date": time.strftime("%Y-%m-%d", time.gmtime(begin)),
        "seconds": round(time.time() - begin),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}
        | {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"},
    }


if __name__ == "__main__":
    sys.exit(main())
