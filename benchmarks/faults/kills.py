"""SIGKILL at every place of a run, under every strategy; each kill is followed by the same command again.

A trial is one run: killed up to four times, started again each time, in the end compared with the run that nobody hurt.
What must hold after each kill: the ranks that were not killed end by themselves within 10 s (less the time for which a
busy machine gave them no core) with code 71 and name the dead one; no process is left; every committed checkpoint still
has every byte, and none is gone back. In the end: every loss, every evaluation, weights and optimizer equal bit for bit.

Ranks are forks of a process that has imported everything (tests/faults/runs.py), or in every fourth trial started by the
real ``accelerate launch`` with the files of ``accelerate_configs/``, where imports can be hit, and the launcher itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.arm import (
    DISK_PLACES,
    IMPORTS,
    PLACES,
    VARIABLE,
    arm,
    arm_first_save,
    kill_launcher,
)
from tests.faults import kinds, runs
from tests.faults.kinds import STRATEGIES, Trial
from tests.faults.launchers import wait_until
from tests.support.fork_server import CPU_ONLY, ONE_THREAD

STEPS = kinds.STEPS
WITHIN_SECONDS = 10.0
PATIENCE_SECONDS = 900.0
"""With runs that nobody hurts, on a busy machine."""
CONFIGS = {
    "single": "cpu", "ddp": "cpu_2", "fsdp2": "fsdp2", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3",
}  # fmt: skip
AT_START = (
    "rendezvous", "after the rendezvous", "opening the tokenizer", "training the tokenizer", "writing the tokenizer",
    "opening the corpus", "store build", "model build", "wrapping the model", "restore", "start table",
)  # fmt: skip
IN_TRAINING = (
    "forward",
    "backward",
    "update",
    "save",
    "inside a save",
    "inside a save",
    "evaluation",
    "any moment",
)
ON_RANK_0 = ("training the tokenizer", "writing the tokenizer", *DISK_PLACES)
"""Done by rank 0 alone, or at least by it."""


SHARDED = ("fsdp2", "zero1", "zero2", "zero3")
"""There every rank writes its own part of a checkpoint."""


def more_options(strategy: str, fresh: bool, folder: Path) -> tuple[str, ...]:
    """Options beyond those of every run; ``fresh``: its own tokenizer and token store, made by the run itself."""
    words = [
        str(runs.ROOT / word) if word.startswith("ds_configs") else word for word in STRATEGIES[strategy][2]
    ]
    if fresh:
        words += ["--data.store_dir", str(folder / "token_stores"), "--tokenizer.vocab_size", "300"]
    return tuple(words)


def arguments(place: Path, folder: Path, strategy: str, fresh: bool) -> list[str]:
    words = kinds.arguments(place, folder, *more_options(strategy, fresh, folder))
    if fresh:
        cut = words.index("--tokenizer.path")
        del words[cut : cut + 2]
    return words


def expected(place: Path, strategy: str, fresh: bool) -> dict[str, Any]:
    """Of the run that nobody hurts."""
    name = f"expected-{strategy}{'-fresh' if fresh else ''}"
    return runs.recorded(
        place, name, lambda folder: finish(arguments(place, folder, strategy, fresh), folder, strategy)
    )


def finish(words: list[str], folder: Path, strategy: str) -> None:
    """The command, to the end, undisturbed."""
    size, environment, _ = STRATEGIES[strategy]
    run = runs.start(
        words,
        logs=folder / "logs",
        world_size=size,
        inject=kinds.prepared(strategy),
        environment=environment,
    )
    assert run.wait(PATIENCE_SECONDS), f"{strategy}: did not end: {run.output()}"
    assert set(run.codes.values()) == {0}, f"{strategy}: exit codes {run.codes}: {run.output()}"


def compare(folder: Path, wanted: dict[str, Any], what: str, *, steps: int = STEPS) -> None:
    """Bit for bit, and nothing of a kill is left lying about."""
    found = runs.outcome(folder / "run")
    assert sorted(found["losses"]) == list(range(1, steps + 1)), f"{what}: steps {sorted(found['losses'])}"
    for step, record in wanted["losses"].items():
        assert found["losses"][step] == record, f"{what}: step {step}: {found['losses'][step]}, not {record}"
    for name in ("evaluations", "weights"):
        assert found[name] == wanted[name], f"{what}: {name} differ"
    left = [
        str(path.relative_to(folder))
        for path in (folder / "run").rglob("*")
        if path.name.endswith((".tmp", ".old")) or ".damaged-" in path.name or ".abandoned-" in path.name
    ]
    assert not left, f"{what}: left behind: {left}"


def good_checkpoints(folder: Path) -> list[int]:
    """The steps of the committed checkpoints; every byte of every one is compared."""
    from lmcore.checkpoint.reader import listing

    rows = listing(folder / "run" / "checkpoints", verify_bytes=True)
    assert not any(row["problem"] for row in rows), f"a kill has damaged a checkpoint: {rows}"
    return [row["step"] for row in rows]


def become_subreaper() -> None:
    """What loses its parent becomes a child of this process, so that no orphan goes unseen (Linux)."""
    set_child_subreaper = 36  # of linux/prctl.h
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def living_children() -> list[psutil.Process]:
    """All processes below this one that still run."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def assert_nothing_left(begin: float, what: str, living: Callable[[], list[psutil.Process]]) -> None:
    """No process of the run outlives it by more than the 10 s that a rank has to notice, less the time without a core."""
    first: dict[int, float] = {}
    while left := living():
        waited = {child.pid: seconds_without_core(child.pid) for child in left}
        for pid, seconds in waited.items():
            first.setdefault(pid, seconds)
        starved = max(seconds - first[pid] for pid, seconds in waited.items())
        if time.monotonic() - begin - starved > WITHIN_SECONDS:
            words = []
            for child in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    words.append((child.pid, child.cmdline()[:6]))
                    child.kill()
            if words:
                raise AssertionError(f"{what}: processes left behind: {words}")
        time.sleep(0.02)


def seconds_without_core(pid: int) -> float:
    """How long a process was ready to go on, but the machine, busy with other work, gave it no core: of its thread that
    waited longest."""
    found = [0.0]
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError):
            found.append(int(path.read_text().split()[1]) / 1e9)
    return max(found)


class Starved:
    """The ranks of a run that waited for a core since this was made."""

    def __init__(self, run: runs.Run) -> None:
        self.run = run
        self.first = {pid: seconds_without_core(pid) for pid in run.pids}
        self.last = dict(self.first)

    def look(self) -> bool:
        """Ask the kernel; always False."""
        for rank, pid in enumerate(self.run.pids):
            if rank not in self.run.codes:
                self.last[pid] = max(self.last[pid], seconds_without_core(pid))
        return False

    def seconds(self) -> float:
        """Of the rank that waited longest."""
        return max(self.last[pid] - first for pid, first in self.first.items())


# ---- forked ranks ------------------------------------------------------------------------------------------


def kill_forked(place: Path, seed: int, folder: Path) -> Trial:
    """One run of forked ranks, killed at up to four places."""
    become_subreaper()
    draw, trial = random.Random(seed), Trial()
    strategy = [*STRATEGIES][seed % len(STRATEGIES)]
    size, environment, _ = STRATEGIES[strategy]
    fresh = draw.random() < 0.5
    wanted = expected(place, strategy, fresh)
    # One after the other, in their order
    plan = sorted((draw.choice(AT_START) for _ in range(2)), key=AT_START.index)
    plan += [draw.choice(IN_TRAINING) for _ in range(2)]
    if draw.random() < 0.5:  # killed at the start of a resume
        plan = [plan[2], *draw.sample([*AT_START[-5:], "reading a checkpoint"], 2), plan[3]]
    before: list[int] = []
    for hit, spot in enumerate(plan):
        if spot in ("training the tokenizer", "writing the tokenizer", "store build") and not fresh:
            spot = "any moment"
        alone = size == 1 or draw.random() < 0.6
        shards = spot == "inside a save" and strategy in SHARDED
        victim = 0 if size == 1 or (spot in ON_RANK_0 and not shards) else draw.randrange(size)
        number = {"forward": 15, "backward": 15, "update": 10, "save": 2, "inside a save": 60, "store build": 25,
                  "writing the tokenizer": 15, "reading a checkpoint": 20}.get(spot, 1)  # fmt: skip
        number = draw.randrange(number)
        what = f"{strategy}{' fresh' if fresh else ''}, kill {hit}: {spot} {number}, {'rank' if alone else 'all with'} {victim}"
        mark = folder / f"mark-{hit}"
        base = kinds.prepared(strategy)

        def inject(
            rank: int, base: Any = base, spot: str = spot, victim: int = victim, number: int = number,
            mark: Path = mark, alone: bool = alone,
        ) -> None:  # fmt: skip
            base(rank)
            if rank == victim and spot != "any moment":
                arm(spot, number, mark, alone=alone)

        run = runs.start(
            arguments(place, folder, strategy, fresh),
            logs=folder / f"logs-{hit}",
            world_size=size,
            inject=inject,
            environment=environment,
        )
        if spot == "any moment":
            run.wait(draw.uniform(0.0, 1.2 * wanted["seconds"]), until=lambda: False)
            killed = victim not in run.codes
            run.send(signal.SIGKILL, [victim] if alone else None)
        else:
            run.wait(PATIENCE_SECONDS, until=lambda mark=mark, run=run: mark.exists() or bool(run.codes))
            run.wait(0.05, until=lambda: False)
            killed = mark.exists()
            if not alone and killed:
                run.send(signal.SIGKILL)
        begin, starved = run.clock(), Starved(run)
        for _ in range(3):  # each waits for at most 20 s after a death
            run.wait(60, until=lambda run=run, starved=starved: starved.look() or len(run.codes) == size)
        ended = len(run.codes) == size
        seconds = run.clock() - begin - starved.seconds()
        if not killed:  # it does not pass there, or was faster
            ended = ended or run.wait(PATIENCE_SECONDS)
            assert ended, f"{what}: hangs: {run.output()}"
            assert set(run.codes.values()) == {0}, f"{what}: not hit, exit codes {run.codes}: {run.output()}"
            trial.count("places not reached")
            break
        survivors = {rank: code for rank, code in run.codes.items() if code != -9}
        output = run.output(10**6)
        run.kill()
        assert ended, f"{what}: still there after {seconds:.1f} s, {run.codes}: {output[-3000:]}"
        assert seconds <= WITHIN_SECONDS, f"{what}: {seconds:.1f} s, {run.codes}: {output[-3000:]}"
        assert_nothing_left(time.monotonic(), what, living_children)
        trial.count("kills")
        trial.count(f"of {strategy}")
        trial.count("of one rank of two" if alone and size == 2 else "of all ranks")
        trial.count(f"at: {spot}")
        if survivors and set(survivors.values()) != {0}:
            assert set(survivors.values()) == {71}, f"{what}: exit codes {run.codes}: {output[-3000:]}"
            assert re.search(rf"rank {victim} \(pid {run.pids[victim]} .* is dead", output), (
                f"{what}: the dead rank is not named: {output[-3000:]}"
            )
            trial.count("survivors that ended with 71")
        now = good_checkpoints(folder)
        assert max(now, default=0) >= max(before, default=0), f"{what}: {before} before, {now} after"
        before = now
    finish(arguments(place, folder, strategy, fresh), folder, strategy)
    assert_nothing_left(time.monotonic(), f"{strategy}: the end", living_children)
    compare(folder, wanted, f"{strategy}{' fresh' if fresh else ''}: {plan}")
    return trial


# ---- ranks of the real launcher ----------------------------------------------------------------------------


def living_with(marker: str) -> list[psutil.Process]:
    """All processes of this machine that were started with this word in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            content = Path(f"/proc/{process.pid}/environ").read_bytes()
            if marker.encode() in content and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_launched(place: Path, seed: int, folder: Path) -> Trial:
    """One run under ``accelerate launch``: the launcher, one rank or all are killed, most often at the start."""
    draw, trial = random.Random(seed), Trial()
    strategy = [*STRATEGIES][seed % len(STRATEGIES)]
    size = STRATEGIES[strategy][0]
    fresh = draw.random() < 0.5
    wanted = expected(place, strategy, fresh)
    target = draw.choice(["the launcher", "the launcher", "one rank", "one rank", "all ranks"])
    spots = [f"import {name}" for name in IMPORTS] + [*AT_START[:3], *AT_START[5:], *IN_TRAINING[:-1]]
    spot = draw.choice(spots[: 12 if draw.random() < 0.6 else None])
    by_clock = target == "the launcher" and draw.random() < 0.5
    if spot == "store build" and not fresh:
        spot = "model build"
    shards = spot == "inside a save" and strategy in SHARDED
    victim = 0 if size == 1 or (spot in ON_RANK_0 and not shards) else draw.randrange(size)
    number = draw.randrange(
        {"forward": 30, "backward": 30, "update": 20, "save": 4, "inside a save": 100, "store build": 25}.get(
            spot, 1
        )
    )
    what = f"{strategy}{' fresh' if fresh else ''}, launched: {spot} {number}, {target}, rank {victim}"
    marker = f"lmcore-fault-{uuid.uuid4().hex}"
    mark, logs = folder / "mark", folder / "logs"
    logs.mkdir(parents=True)
    # What FSDP2 and ZeRO need beyond the launcher's file is what tests of this machine need (no GPU).
    asked = {"place": spot, "number": number, "ranks": [victim], "mark": str(mark), "alone": target == "one rank",
             "pretend_gpus": strategy == "fsdp2"}  # fmt: skip
    options = ["--num_processes", "2"] if size == 2 else []
    words = arguments(place, folder, strategy, fresh)
    if "--engine.deepspeed" in words:  # the launcher's file names it
        cut = words.index("--engine.deepspeed")
        del words[cut : cut + 2]
    variables = {
        **os.environ, **ONE_THREAD, **CPU_ONLY, VARIABLE: json.dumps(asked), "FAULT_MARKER": marker,
        "PYTHONPATH": f"{Path(__file__).parent / 'inject'}{os.pathsep}{runs.ROOT}",
    }  # fmt: skip
    with open(logs / "launcher.out", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
             f"accelerate_configs/{CONFIGS[strategy]}.yaml", *options, str(runs.SCRIPT), *words],
            cwd=runs.ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip

    def said() -> str:
        return f"{what}: {(logs / 'launcher.out').read_text(errors='replace')[-3500:]}"

    try:
        if by_clock:  # from its own first moment on, its imports included
            what += ", by the clock"
            wait_until(lambda: process.poll() is not None, draw.uniform(0.5, 12.0))
        else:
            reached = wait_until(lambda: mark.exists() or process.poll() is not None, PATIENCE_SECONDS)
            assert reached, f"the place was not reached: {said()}"
        if not (mark.exists() or (by_clock and process.poll() is None)):
            assert process.wait(PATIENCE_SECONDS) == 0, said()
            trial.count("places not reached")
        else:
            if target == "the launcher":
                process.kill()
                time.sleep(draw.choice([0.0, 0.2]))
                # The rank that waits there to be killed goes too: nothing must depend on it
                if mark.exists():
                    os.kill(json.loads(mark.read_text())["pid"], signal.SIGKILL)
            elif target == "all ranks":
                for child in living_with(marker):
                    if child.pid != process.pid:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            child.kill()
            begin = time.monotonic()
            # accelerate's own launcher may take its time to end; the ranks may not.
            launcher = process.pid
            assert_nothing_left(
                begin, said(), lambda: [child for child in living_with(marker) if child.pid != launcher]
            )
            trial.count("kills")
            trial.count(f"of {strategy}")
            trial.count(
                f"of {'one rank of two' if target == 'one rank' and size == 2 else target if target != 'one rank' else 'all ranks'}"
            )
            trial.count("under accelerate launch")
            trial.count("at: any moment" if by_clock else f"at: {spot}")
            assert wait_until(lambda: process.poll() is not None, 60), f"the launcher does not end: {said()}"
            assert process.returncode != 0, said()
            trial.note = what
            good_checkpoints(folder)
    finally:
        for child in living_with(marker):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
    finish(arguments(place, folder, strategy, fresh), folder, strategy)
    compare(folder, wanted, what)
    return trial


# ---- the launcher, at every disk call of every rank's save -------------------------------------------------

SAVES: tuple[tuple[str, int], ...] = tuple(
    (strategy, rank) for strategy, (size, _, _) in STRATEGIES.items() for rank in range(size)
)
"""A trial each: strategy, and the rank during whose save the launcher is killed."""
SAVES_STEPS, SAVES_EVERY = 500, 3
"""A save of one process has 114 calls here, of one of two ranks 54 to 119; up to 3.6 steps go by from kill to kill."""


def launch(words: list[str], folder: Path, hit: int, strategy: str, inject: Callable[[int], None]) -> int:
    """Fork a launcher, which forks the ranks and waits for them as torch's does; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        size, environment, _ = STRATEGIES[strategy]
        run = runs.start(
            words, logs=folder / f"logs-{hit}", world_size=size, inject=inject, environment=environment
        )
        (folder / "ranks.tmp").write_text(json.dumps(run.pids))
        os.replace(folder / "ranks.tmp", folder / f"ranks-{hit}")
        code = int(not run.wait(PATIENCE_SECONDS) or any(run.codes.values()))
    finally:
        os._exit(code)


def launcher_killed_in_save(place: Path, seed: int, folder: Path) -> Trial:
    """The launcher is killed at the first call with which a rank's save changes the disk, then, in the continued run, at
    the second, and so on, until a save has no further call.

    Each time the ranks, told by the kernel, finish the step, save together and leave with code 75; the checkpoint that was
    being written is committed, too.
    """
    become_subreaper()
    trial = Trial()
    strategy, victim = SAVES[seed % len(SAVES)]
    size = STRATEGIES[strategy][0]

    def words(folder: Path) -> list[str]:
        base = runs.base_arguments(place, steps=SAVES_STEPS, every=SAVES_EVERY)
        return [*base, "--run_dir", str(folder / "run"), *more_options(strategy, False, folder)]

    wanted = runs.recorded(
        place, f"expected-saves-{strategy}", lambda folder: finish(words(folder), folder, strategy)
    )
    before = 0
    for number in itertools.count():
        what = f"{strategy}, rank {victim}, call {number}"
        mark, base = folder / f"mark-{number}", kinds.prepared(strategy)

        def inject(rank: int, number: int = number, mark: Path = mark, base: Any = base) -> None:
            from lmcore.run import guard

            base(rank)
            # Ranks know a launcher by its command; here it is a fork of the campaign.
            guard._LAUNCHERS = (*guard._LAUNCHERS, "benchmarks.faults")
            if rank == victim:
                arm_first_save(number, mark, kill_launcher)

        pid = launch(words(folder), folder, number, strategy, inject)

        def said(number: int = number, what: str = what) -> str:
            logs = sorted((folder / f"logs-{number}").glob("*.out"))
            return f"{what}: " + "\n".join(path.read_text(errors="replace")[-2000:] for path in logs)

        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            assert status == 0, said()
            assert mark.read_text() == "passed", said()
            break
        assert mark.read_text() == "reached", said()
        ranks = json.loads((folder / f"ranks-{number}").read_text())
        codes: dict[int, int] = {}
        end = time.monotonic() + PATIENCE_SECONDS
        while len(codes) < size:  # they are this process's children now
            for rank, child in enumerate(ranks):
                if rank not in codes and (done := os.waitpid(child, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(done[1])
            if time.monotonic() > end:
                for rank, child in enumerate(ranks):
                    if rank not in codes:
                        os.kill(child, signal.SIGKILL)
                raise AssertionError(f"hangs, {codes}: {said()}")
            time.sleep(0.002)
        assert set(codes.values()) == {75}, f"{codes}: {said()}"
        assert_nothing_left(time.monotonic(), what, living_children)
        status_now, steps = runs.status(folder / "run"), good_checkpoints(folder)
        assert (status_now["state"], status_now["exit_code"]) == ("saved", 75), f"{what}: {status_now}"
        assert max(steps) == status_now["step"] > before, f"{what}: {before} before, {steps}, {status_now}"
        before = max(steps)
        left = [path.name for path in (folder / "run" / "checkpoints").glob(".*")]
        assert not left, f"{what}: left behind: {left}"
        trial.count("kills")
        trial.count(f"of {strategy}")
        trial.count("of the launcher")
        trial.count("at: inside a save, at every call")
    calls = trial.counts.get("kills", 0)
    assert calls > 8, f"{strategy}, rank {victim}: {calls} calls are no save"
    trial.note = f"{strategy}, rank {victim}: {calls} calls"
    compare(folder, wanted, trial.note, steps=SAVES_STEPS)
    return trial


PLACES_KNOWN = {*PLACES, *DISK_PLACES, "any moment"}
assert {*AT_START, *IN_TRAINING} <= PLACES_KNOWN
