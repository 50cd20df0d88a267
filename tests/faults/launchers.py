"""Signals to the real launchers: the trainer saves, nobody is left behind, and the run goes on bit for bit.

Each trial starts ``accelerate launch`` (one process; two processes) or ``torchrun`` and pays for the imports of
every process, so the continuation, whose launcher does not matter, is a fork as elsewhere (tests/faults/runs.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults import runs
from tests.faults.kinds import Trial, children, last_logged, lighten
from tests.support.fork_server import CPU_ONLY, ONE_THREAD

STEPS, SAVE_EVERY, HELD = 200, 50, 140
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCHERS: dict[str, tuple[int, list[str]]] = {
    "accelerate launch": (1, [*ACCELERATE, "--config_file", "accelerate_configs/cpu.yaml"]),
    "accelerate launch of two": (2, [*ACCELERATE, "--config_file", "accelerate_configs/cpu_2.yaml"]),
    "torchrun": (
        2,
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    ),
}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TARGETS = ("the launcher", "one rank", "all")
CASES = [
    *(
        (launcher, target, number)
        for number, target, launcher in itertools.product(SIGNALS, TARGETS, LAUNCHERS)
    ),
    *((launcher, "the launcher", signal.SIGKILL) for launcher in LAUNCHERS),
    *(
        (launcher, "one rank, --max_restarts 2", number)
        for number in (signal.SIGKILL, signal.SIGTERM)
        for launcher in [*LAUNCHERS][1:]
    ),
]


def arguments(place: Path, folder: Path, world_size: int) -> list[str]:
    """Of a run that waits at step :data:`HELD` until the file ``told`` is there: no signal comes too late."""
    base = runs.base_arguments(place, steps=STEPS, every=SAVE_EVERY)
    cut = base.index("--model.config")
    hold = HELD * 2 // world_size  # micro-batches
    model = {"seconds": 0.005, "hold_after": hold, "told": str(folder / "told")}
    base[cut : cut + 2] = ["--model.factory", "tests.slurm.paced:build", "--model.config", json.dumps(model)]
    return [*base, "--run_dir", str(folder / "run")]


def undisturbed(place: Path, world_size: int) -> dict[str, Any]:
    """Of the run that nobody hurts: as :func:`tests.faults.runs.recorded`."""

    def run(folder: Path) -> None:
        (folder / "told").touch()
        to_the_end(place, folder, world_size)

    return runs.recorded(place, f"undisturbed-launcher-{world_size}", run)


def to_the_end(place: Path, folder: Path, world_size: int) -> None:
    run = runs.start(
        arguments(place, folder, world_size), logs=folder / "logs", world_size=world_size, inject=lighten
    )
    assert run.wait(180), f"did not end: {run.output()}"
    assert set(run.codes.values()) == {0}, f"exit codes {run.codes}: {run.output()}"


def descendants(pid: int) -> list[int]:
    """All processes below this one (Linux)."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def alive(pids: list[int]) -> list[int]:
    """Those that still run: neither gone nor waiting to be reaped."""
    left = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                left.append(pid)
    return left


@contextlib.contextmanager
def launched(command: list[str], argv: list[str], logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher; whatever happens, nothing of it outlives the trial."""
    logs.mkdir(parents=True, exist_ok=True)
    # A campaign in the background of a shell ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(logs / "launcher.out", "wb") as output:
        process = subprocess.Popen(
            [*command, str(runs.SCRIPT), *argv],
            cwd=runs.ROOT,
            env={**os.environ, **ONE_THREAD, **CPU_ONLY},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        for pid in [process.pid, *descendants(process.pid)]:  # torchrun's ranks are in groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_until(what: Any, seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while not what():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.01)
    return True


def launcher(place: Path, seed: int, folder: Path) -> Trial:
    """Trial ``seed`` is one of :data:`CASES`: a launcher, who is hit, by what."""
    name, target, number = CASES[seed % len(CASES)]
    world_size, command = LAUNCHERS[name]
    what = f"{name}, {number.name} to {target}"
    expected = undisturbed(place, world_size)
    words = [*command, "--max_restarts", "2"] if "max_restarts" in target else command
    # After a crash; what was asked to stop has stopped
    restarts = words != command and number == signal.SIGKILL
    with launched(words, arguments(place, folder, world_size), folder / "logs") as process:

        def said() -> str:
            return f"{what}: {(folder / 'logs' / 'launcher.out').read_text(errors='replace')[-4000:]}"

        # Beyond a save, so that a checkpoint of the signal's step is not one of the schedule.
        goal = SAVE_EVERY + 10 + seed % 20
        reached = wait_until(lambda: last_logged(folder) >= goal or process.poll() is not None, 180)
        assert reached, said()
        assert process.poll() is None, said()
        everybody = [process.pid, *descendants(process.pid)]
        ranks = sorted(children(process.pid))
        assert len(ranks) == world_size, said()
        at_step = last_logged(folder)
        if target == "the launcher":
            os.kill(process.pid, number)
        elif target == "all":
            for pid in [process.pid, *ranks]:
                os.kill(pid, number)
        else:
            os.kill(ranks[seed % world_size], number)
        (folder / "told").touch()
        assert wait_until(lambda: process.poll() is not None, 180), said()
        assert wait_until(lambda: not alive(everybody), 120), f"left behind: {alive(everybody)}; {said()}"
        status = runs.status(folder / "run")
        if restarts:
            assert process.returncode == 0, said()
            assert (status["state"], status["exit_code"]) == ("finished", 0), f"{status}: {said()}"
            assert runs.events(folder / "run", "resume"), said()
        else:
            assert process.returncode != 0, said()
            assert (status["state"], status["exit_code"]) == ("saved", 75), f"{status}: {said()}"
            assert "SIG" in status["reason"], status
            assert not runs.events(folder / "run", "resume"), said()
            newest = runs.committed_steps(folder / "run")[-1]
            assert newest == status["step"] >= at_step, f"signal at {at_step}, saved {newest}: {said()}"
    to_the_end(place, folder, world_size)
    found = runs.outcome(folder / "run")
    assert sorted(found["losses"]) == list(range(1, STEPS + 1)), what
    for step, record in expected["losses"].items():
        assert found["losses"][step] == record, f"{what}: step {step}: {found['losses'][step]}, not {record}"
    for part in found:
        assert found[part] == expected[part], f"{what}: {part}"
    trial = Trial(note=what)
    trial.count(name)
    trial.count(f"{number.name} to {target}")
    return trial
