"""The soak: a run is killed every 15 to 60 s for a long time and started again each time by itself.

At the end its weights and every loss must be those of a run that nobody hurt, and at least 95% of the time must have
gone into steps that count (*goodput*; asked of soaks of ten minutes and more, told of all). All the time from the
first start to the last end is one of:

| seconds | what |
|---|---|
| counted | training of a step, the last time that this step was trained |
| repeated | training of a step that was trained again later, and the step that a kill cut off |
| saving | a save, for as long as it keeps the loop from going on; what is written in the background is not in it |
| restart | from a kill (or from the save at a SIGTERM) until the loop begins to read again |
| end | the last evaluation, the last commit, the end of the process |

A start is a fork of a process that has the imports behind it (tests/faults/runs.py): what the imports of a cold
start cost depends on the machine, not on the trainer, and is told in docs/faults_found.md.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import runs
from tests.faults.kinds import Trial, lighten

MINUTES = 0.1
"""Of the default tests; the record is of 30."""
PAUSE_SECONDS = (15.0, 60.0)
"""Between two kills; a soak of less than two minutes shortens it in proportion."""
SAVE_EVERY = "1.5 s"
"""Where a save holds training up for 0.03 s and kills are 37 s apart, the least is lost at about
sqrt(2 x 0.03 x 37) = 1.5 s (J. W. Young, 1974).
"""
GOODPUT = 0.95
JUDGED_MINUTES = 10.0


def arguments(place: Path, folder: Path, steps: int) -> list[str]:
    """A run whose step takes some 15 ms of one core."""
    base = runs.base_arguments(place, steps=steps)
    model = '{"n_layer": 4, "n_head": 4, "n_embd": 64, "n_positions": 64}'
    return [
        *(*base, "--run_dir", str(folder / "run"), "--model.config", model, "--data.block_size", "32"),
        *("--train.global_batch_blocks", "8", "--train.micro_batch_blocks", "8"),
        *("--checkpoint.every", SAVE_EVERY, "--evaluate.every", "never"),
    ]


def watched(times: Path) -> Callable[[int], None]:
    """An injection: when the loop begins, and when each step and each save ends, goes to a file at once."""

    def inject(rank: int) -> None:
        from lmcore.run.trainer import Run

        lighten()
        batches, record, save = Run.batches, Run.record, Run.save

        def watched_batches(self: Any) -> Any:
            mark(times, "begin")
            return batches(self)

        def watched_record(self: Any, *words: Any, **numbers: Any) -> None:
            record(self, *words, **numbers)
            mark(times, "step", self.state.step)

        def watched_save(self: Any, reason: str) -> None:
            save(self, reason)
            mark(times, "save")

        for name, method in (
            ("batches", watched_batches),
            ("record", watched_record),
            ("save", watched_save),
        ):
            setattr(Run, name, method)

    return inject


def mark(times: Path, word: str, step: int = 0) -> None:
    """One line, written at once: a kill loses none. The clock is the machine's, the same in all processes."""
    file = os.open(times, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{word} {step} {time.monotonic():.6f}\n".encode())
    os.close(file)


def account(lines: list[str]) -> dict[str, float]:
    """Seconds by what they went into, and counts, from the marks of all starts."""
    seconds = dict.fromkeys(("counted", "repeated", "saving", "restart", "end"), 0.0)
    counts = {"steps trained": 0, "saves": 0}
    last_time: dict[int, float] = {}  # of each step, the seconds of its last training
    events = [line.split() for line in lines]
    before = float(events[0][2])
    for number, (word, step, at) in enumerate(events):
        took, before = max(0.0, float(at) - before), max(before, float(at))
        if word == "step":
            counts["steps trained"] += 1
            seconds["repeated"] += last_time.get(int(step), 0.0)
            last_time[int(step)] = took
        elif word == "save":
            counts["saves"] += 1
            seconds["saving"] += took
        elif word == "kill":
            seconds["repeated"] += took
        elif word == "ended" and number == len(events) - 1:
            seconds["end"] += took
        else:
            seconds["restart"] += took
    seconds["counted"] = sum(last_time.values())
    return seconds | counts | {"steps": len(last_time)}


def seconds_per_step(place: Path, folder: Path) -> float:
    """Of this machine at this moment: the median of a short run, without its beginning."""
    run = runs.start(arguments(place, folder, 200), logs=folder / "logs", inject=watched(folder / "times"))
    assert run.wait(120), run.output()
    assert run.codes == {0: 0}, run.output()
    events = [line.split() for line in (folder / "times").read_text().splitlines()]
    steps = [float(at) for word, _, at in events if word == "step"][50:]
    return sorted(after - before for before, after in itertools.pairwise(steps))[len(steps) // 2]


def has_saved(run_dir: Path, before: list[int]) -> bool:
    """Whether there are other checkpoints than ``before``."""
    return runs.committed_steps(run_dir) != before


def soak(place: Path, seed: int, folder: Path, minutes: float = MINUTES) -> Trial:
    """Killed every 15 to 60 s for so many minutes, one time in six by SIGTERM; then compared and counted."""
    draw, trial = random.Random(seed), Trial()
    steps = int(minutes * 60 * 0.97 / seconds_per_step(place, folder / "calibration"))
    shortened = min(1.0, minutes / 2)
    times = folder / "times"
    mark(times, "start")
    while True:
        saved = runs.committed_steps(folder / "run")
        run = runs.start(arguments(place, folder, steps), logs=folder / "logs", inject=watched(times))
        run.wait(shortened * draw.uniform(*PAUSE_SECONDS), until=lambda: False)
        # A kill that comes before the first save of a start, on a slow machine, would go on so for ever.
        run.wait(120, until=functools.partial(has_saved, folder / "run", saved))
        number = signal.SIGTERM if draw.random() < 1 / 6 else signal.SIGKILL
        if not run.codes:
            if number == signal.SIGKILL:
                mark(times, "kill")
            run.send(number)
            assert run.wait(120), run.output()
        mark(times, "ended")
        if run.codes == {0: 0}:
            break
        assert run.codes in ({0: -9}, {0: 75}), f"{run.codes}: {run.output()}"
        trial.count("SIGKILL" if run.codes == {0: -9} else "SIGTERM")
    undisturbed = folder / "undisturbed"
    run = runs.start(arguments(place, undisturbed, steps), logs=undisturbed / "logs", inject=lighten)
    assert run.wait(20 * 60 * minutes + 120), run.output()
    assert run.codes == {0: 0}, run.output()
    alone = time.monotonic() - run.begin
    found, expected = runs.outcome(folder / "run"), runs.outcome(undisturbed / "run")
    assert sorted(found["losses"]) == list(range(1, steps + 1)), "a step is missing"
    for step, record in expected["losses"].items():
        assert found["losses"][step] == record, f"step {step}: {found['losses'][step]} instead of {record}"
    assert found == expected, "weights or evaluation differ"
    shutil.rmtree(undisturbed)
    spent = account(times.read_text().splitlines())
    for name in ("counted", "repeated", "saving", "restart", "end"):
        trial.count(f"ms {name}", round(1000 * spent[name]))
    trial.count("ms of the undisturbed run", round(1000 * alone))
    trial.count("steps", steps)
    trial.count("steps trained again", round(spent["steps trained"]) - steps)
    trial.count("saves", round(spent["saves"]))
    trial.note = story(trial.counts)
    share = goodput(trial.counts)
    assert minutes < JUDGED_MINUTES or share >= GOODPUT, f"goodput {share:.1%}: {trial.note}"
    return trial


def goodput(counts: dict[str, int]) -> float:
    """Time in steps that count over all the time."""
    every = sum(counts[f"ms {name}"] for name in ("counted", "repeated", "saving", "restart", "end"))
    return counts["ms counted"] / every


def story(counts: dict[str, int]) -> str:
    """One sentence for the report."""
    names = ("counted", "repeated", "saving", "restart", "end")
    every = sum(counts[f"ms {name}"] for name in names)
    kills = counts.get("SIGKILL", 0) + counts.get("SIGTERM", 0)
    shares = ", ".join(f"{name} {counts[f'ms {name}'] / every:.2%}" for name in names)
    return (
        f"{kills} kills in {every / 60_000:.1f} minutes: goodput {goodput(counts):.1%} ({shares}); "
        f"{counts['steps trained again']:,} of {counts['steps']:,} steps trained again; a restart took "
        f"{counts['ms restart'] / 1000 / (kills + 1):.2f} s, a save held training up for "
        f"{counts['ms saving'] / counts['saves']:.0f} ms; the undisturbed run took "
        f"{counts['ms of the undisturbed run'] / 60_000:.1f} minutes"
    )
