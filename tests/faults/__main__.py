"""The fault campaign: hurt runs in every way that we know, and count what is lost.

    python -m tests.faults                          # a few of each kind
    python -m tests.faults --kind kill --n 100      # a hundred trials of one kind
    python -m tests.faults --kind soak --minutes 30 # kills every 15 to 60 s; takes an hour, with the undisturbed run

Trial number i of a kind always makes the same choices. Exit code 1 if a promise was broken; the folder of that trial is
kept and named. The large campaign, which keeps a record and goes on where it ended, is
``python -m benchmarks.faults.campaign``; it runs these kinds too.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults import runs
from tests.faults.kinds import KINDS, Kind
from tests.faults.launchers import launcher
from tests.faults.preparing import prepare_killed
from tests.faults.soak import MINUTES, soak

MORE: dict[str, Kind] = {"launcher": launcher, "prepare-killed": prepare_killed}
DEFAULT = {"kill": 3, "signal": 5, "full": 4, "nan": 2, "damage": 1}
"""Trials, not faults: a trial of a kill, a signal or a NaN holds several."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kind", action="append", choices=[*KINDS, *MORE, "soak"], help="only this kind (repeatable)"
    )
    parser.add_argument("--n", type=int, help="trials of each kind (default: as many as the default tests)")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="length of a soak")
    parser.add_argument("--place", type=Path, help="where the runs live (default: a new temporary folder)")
    options = parser.parse_args()
    trials = KINDS | MORE | {"soak": functools.partial(soak, minutes=options.minutes)}
    runs.preload()
    broken = 0
    place = options.place or Path(tempfile.mkdtemp(prefix="faults-"))
    runs.prepare(place)
    for kind in options.kind or [*trials]:
        broken += campaign(kind, trials[kind], place, options.first, options.n or DEFAULT.get(kind, 1))
    if not broken and options.place is None:
        shutil.rmtree(place)
    return int(broken > 0)


def campaign(kind: str, hurt: Kind, place: Path, first: int, count: int) -> int:
    """Trials ``first`` to ``first + count`` of one kind; how many broke their promise."""
    broken = 0
    for number in range(first, first + count):
        folder = place / f"{kind}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        try:
            trial = hurt(place, number, folder)
        except (AssertionError, OSError, KeyError, ValueError, IndexError):
            broken += 1
            print(f"{kind} {number}: BROKEN; {folder} is kept\n{traceback.format_exc()}", flush=True)
        else:
            seconds = time.monotonic() - started
            print(f"{kind} {number}: held {trial.counts} {trial.note} {seconds:.1f} s", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    return broken


if __name__ == "__main__":
    sys.exit(main())
