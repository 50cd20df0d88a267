"""Signals only set flags, deadlines and files are seen, numerical decisions are pure, dead and stuck ranks
are named.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest
import torch

from lmcore.errors import RequestError
from lmcore.run import guard as room
from lmcore.run import watchdog
from lmcore.run.anomalies import Action, History, Policy, Report, decide, limit, norm_limit
from lmcore.run.folder import RunFolder
from lmcore.run.guard import (
    DEADLINE,
    FAULT,
    MAX_MINUTES,
    REWIND,
    SAVE_FILE,
    SIGINT,
    SIGTERM,
    SIGUSR1,
    STOP_FILE,
    Guard,
    left_on_request,
    verdict,
)
from lmcore.run.replicas import odd_ranks, parameter_hash
from lmcore.run.watchdog import EXIT_STUCK, Watchdog
from tests.support.disk_faults import forked

ROOT = Path(room.__file__).parents[2]


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    made = Guard(run_dir=tmp_path, environ={}, say=lambda _: None)
    made.install()
    yield made
    made.close(give_signals_back=True)


# ---- signals, deadlines, files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "flag"), [(signal.SIGTERM, SIGTERM), (signal.SIGUSR1, SIGUSR1), (signal.SIGINT, SIGINT)]
)
def test_a_signal_only_sets_a_flag(
    guard: Guard, number: int, flag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    assert guard.flags() == 0
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # again at once, as a launcher that forwards Ctrl-C does
    assert guard.flags() == flag
    assert guard.flags() == flag, "a signal stays set until the process has left"
    assert guard.verdict(flag) == replace(verdict(flag), reason=signal.Signals(number).name)
    assert (verdict(flag).save, verdict(flag).stop, verdict(flag).exit_code) == (True, True, 75)


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def work() -> None:
        made = Guard(run_dir=tmp_path, environ={})
        made.install()
        os.kill(os.getpid(), signal.SIGINT)
        made._first_sigint -= 3
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    assert forked(work) == -signal.SIGINT


def test_before_training_a_signal_leaves_at_once(tmp_path: Path) -> None:
    made = Guard(run_dir=tmp_path, environ={})
    made.install(training=False)
    with pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 75
    made.begin()
    os.kill(os.getpid(), signal.SIGTERM)
    assert made.flags() == SIGTERM
    made.close(give_signals_back=True)


def test_a_forked_data_worker_is_deaf_to_the_signals(guard: Guard) -> None:
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        there.send(b"x")
        there.recv(1)  # it has been signalled
        os._exit(7 if guard.flags() == 0 else 8)
    here.recv(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(pid, number)
    here.send(b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    here.close()
    there.close()


def test_close_gives_the_signals_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    made = Guard(run_dir=tmp_path, environ={})
    made.install()
    made.close()
    os.kill(os.getpid(), signal.SIGTERM)  # in the last moments of a run: it does not change how it ended
    made.close(give_signals_back=True)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_ignored_hangups_stay_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    made = Guard(run_dir=tmp_path, environ={})
    made.install()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    made.close(give_signals_back=True)
    signal.signal(signal.SIGHUP, before)


def test_deadlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0] * 1e6)
    slurm = {"SLURM_JOB_END_TIME": str(int(1e9 + 600))}
    made = Guard(run_dir=tmp_path, stop_before_deadline_seconds=120, environ=slurm)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock on the wall jumps; the deadline does not
    now[0] += 470
    assert made.flags() == 0
    assert made.flags(reserve_seconds=15) == DEADLINE, "a save that takes long must begin earlier"
    now[0] += 11
    assert made.flags() == DEADLINE
    made = Guard(run_dir=tmp_path, max_minutes=2, environ={"SLURM_JOB_END_TIME": "soon"})
    now[0] += 119
    assert made.flags() == 0
    now[0] += 1
    assert made.flags() == MAX_MINUTES
    assert verdict(MAX_MINUTES).checkpoint_reason == "deadline"


def test_a_margin_as_long_as_the_job_leaves_half_of_it_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each piece of the run would be one step, and the queue would start it again for ever."""
    now, heard = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    job = {"SLURM_JOB_END_TIME": "1300"}
    made = Guard(run_dir=tmp_path, stop_before_deadline_seconds=300, environ=job, say=heard.append)
    Guard(run_dir=tmp_path, rank=1, stop_before_deadline_seconds=300, environ=job, say=heard.append)
    assert len(heard) == 1
    assert "300 is more than half of the 300 s" in heard[0]
    now[0] += 149
    assert made.flags() == 0
    now[0] += 1
    assert made.flags() == DEADLINE
    now[0] += 500
    late = Guard(run_dir=tmp_path, environ=job, say=heard.append)
    assert late.flags() == DEADLINE, "a job that should have ended"
    Guard(run_dir=tmp_path, environ={}, say=heard.append)
    assert len(heard) == 2


def test_files_are_seen_on_rank_0_and_taken_away_when_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made = Guard(run_dir=tmp_path, environ={})
    other = Guard(run_dir=tmp_path, rank=1, world_size=2, environ={})
    (tmp_path / "SAVE").touch()
    assert made.flags() == SAVE_FILE
    assert other.flags() == 0
    now[0] += 1
    (tmp_path / "STOP").touch()
    assert made.flags() == SAVE_FILE | STOP_FILE
    assert made.flags() == 0, "the disk is asked once a second at most"
    made.done(SAVE_FILE)
    assert sorted(os.listdir(tmp_path)) == ["STOP"]
    other.done(STOP_FILE)
    assert sorted(os.listdir(tmp_path)) == ["STOP"]
    made.done(STOP_FILE | SAVE_FILE)
    assert os.listdir(tmp_path) == []


def test_verdicts() -> None:
    assert verdict(0) == room.Verdict()
    save = verdict(SAVE_FILE)
    assert (save.save, save.stop, save.checkpoint_reason) == (True, False, "save file")
    stop = verdict(SAVE_FILE | STOP_FILE)
    assert (stop.save, stop.stop, stop.exit_code, stop.checkpoint_reason) == (True, True, 75, "stop file")
    both = verdict(SIGTERM | DEADLINE)
    assert (both.checkpoint_reason, both.reason) == ("signal", "SIGTERM, the job's end time is near")
    fault = verdict(FAULT | SIGTERM)
    assert (fault.save, fault.stop, fault.exit_code) == (False, True, 70)
    assert verdict(REWIND) == room.Verdict(rewind=True, reason="a rewind")


def test_one_s_own_flags_are_said_once(guard: Guard) -> None:
    guard.raise_flag(FAULT)
    assert guard.flags() == FAULT
    assert guard.flags() == 0


LAUNCHER = """
import subprocess, sys, os, time, pathlib
child = subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(120)  # {name}
"""
CHILD = """
import os, sys, time, pathlib; sys.path.insert(0, {root!r})
from lmcore.run.guard import Guard, SIGTERM
guard = Guard(run_dir={folder!r}); guard.install()
path = pathlib.Path({folder!r}, "pid")
path.write_text(str(os.getpid()))
path.rename({folder!r} + "/ready")
for _ in range(2400):
    if guard.flags() & SIGTERM:
        pathlib.Path({folder!r}, "saved").touch(); raise SystemExit(75)
    time.sleep(0.05)
"""


def wait_for(path: Path, seconds: float = 120.0) -> bool:
    give_up = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(("name", "told"), [("accelerate launch", True), ("a shell with nohup", False)])
def test_the_trainer_of_a_dead_launcher_is_told(tmp_path: Path, name: str, told: bool) -> None:
    """The simple launcher of accelerate dies of SIGTERM without a word; a login shell may die at any time."""
    child = CHILD.format(root=str(ROOT), folder=str(tmp_path))
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER.format(child=child, name=name)])
    ready = wait_for(tmp_path / "ready")
    launcher.terminate()
    launcher.wait()
    assert ready
    assert wait_for(tmp_path / "saved", seconds=120 if told else 1) == told
    with contextlib.suppress(ProcessLookupError):  # the one that was told has left already
        os.kill(int((tmp_path / "ready").read_text()), signal.SIGKILL)


def test_a_launcher_does_not_undo_a_stop_that_was_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert not left_on_request(tmp_path, again), "a crash before there was a status"
    folder.write_status("saved", exit_code=75, reason="the file STOP")
    assert left_on_request(tmp_path, again)
    assert not left_on_request(tmp_path, {"TORCHELASTIC_RESTART_COUNT": "0"}), "started by a person"
    assert not left_on_request(tmp_path, {})
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(status | {"parent_pid": 1}))
    assert not left_on_request(tmp_path, again), "that was another launcher"
    folder.write_status("running")
    assert not left_on_request(tmp_path, again), "a crash"


# ---- numerical faults --------------------------------------------------------------------------------------

POLICY = Policy(max_skips=2, max_rewinds=2, spike="warn", window=16, sigma=6.0)


def report(step: int, loss: float = 3.0, norm: float = 1.0, applied: bool = True) -> Report:
    return Report(step=step, loss=loss, norm=norm, applied=applied, positions=(step * 8, step * 8 + 8))


def play(
    reports: list[Report], policy: Policy = POLICY, history: History | None = None
) -> tuple[History, list[Action]]:
    history, actions = history or History(), []
    for one in reports:
        history, action = decide(history, policy, one)
        actions.append(action)
    return history, actions


def calm(steps: int, seed: int = 0) -> list[Report]:
    draw = random.Random(seed)
    return [report(step, 3.0 + draw.gauss(0, 0.02), 1.0 + draw.gauss(0, 0.05)) for step in range(steps)]


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)]
)
def test_not_finite_is_skipped_then_rewound(loss: float, norm: float) -> None:
    bad = [report(step, loss, norm, applied=False) for step in (20, 22, 25)]
    _, actions = play([*calm(20), bad[0], report(21), bad[1], report(23), report(24), bad[2]])
    assert [action.kind for action in actions[20:]] == ["skip", "go", "skip", "go", "go", "rewind"]
    assert "step 20, positions 160..167" in actions[20].reason
    assert "1 of at most 2" in actions[20].reason
    assert actions[-1].positions == ((160, 168), (176, 184), (200, 208))
    assert actions[-1].before_step == 20


def test_skips_far_apart_are_borne() -> None:
    reports = [
        report(step, math.nan, applied=False) if step % 9 == 0 else report(step) for step in range(200)
    ]
    _, actions = play(reports)
    assert {action.kind for action in actions} == {"go", "skip"}


def test_rewinds_are_bounded_and_the_bound_forgets() -> None:
    history, kinds = History(), []
    for step in (30, 31, 32, 33, 34, 35, 36, 37, 38):
        history, action = decide(history, POLICY, report(step, math.nan, applied=False))
        kinds.append(action.kind)
        if action.kind == "rewind":
            history = replace(history, skipped=())
    assert kinds == ["skip", "skip", "rewind", "skip", "skip", "rewind", "skip", "skip", "stop"]
    later = replace(history, skipped=((1000, 0, 1), (1001, 1, 2)))
    assert decide(later, POLICY, report(1002, math.nan, applied=False))[1].kind == "rewind"


def test_a_spike_is_seen_and_noise_is_not() -> None:
    for seed in range(20):
        _, actions = play(calm(400, seed), replace(POLICY, window=128))
        assert {action.kind for action in actions} == {"go"}
    history, _ = play(calm(60))
    assert decide(history, POLICY, report(60, 3.5))[1].kind == "warn"
    assert decide(history, POLICY, report(60, 1.0))[1].kind == "go", "falling is no fault"
    assert decide(history, replace(POLICY, spike="off"), report(60, 9.0))[1].kind == "go"
    _, action = decide(history, replace(POLICY, spike="rewind"), report(60, 9.0))
    assert (action.kind, action.positions, action.before_step) == ("rewind", ((480, 488),), 60)


def test_outliers_in_the_window_do_not_hide_the_next_one() -> None:
    history, actions = play([*calm(40), report(40, 8.0), report(41, 8.1), report(42, 8.0)])
    assert [action.kind for action in actions[40:]] == ["warn"] * 3
    _, actions = play([report(43 + i, 8.0) for i in range(16)], history=history)
    assert actions[-1].kind == "go", "a level that stays is the new level, not a spike for ever"


def test_no_judgement_before_there_is_something_to_compare_with() -> None:
    assert limit([1.0] * 7, 6.0, window=8) == math.inf
    assert limit([2.0] * 8, 6.0, window=16) == pytest.approx(2.0 + 6 * 0.002)
    _, actions = play([report(step, 10.0 * (step + 1)) for step in range(7)])
    assert {action.kind for action in actions} == {"go"}


def test_the_norm_limit_does_not_depend_on_a_late_report() -> None:
    policy = replace(POLICY, spike="skip")
    reports = calm(40)
    history, _ = play(reports[:39], policy)
    later, _ = play(reports[39:], policy, history)
    assert norm_limit(history, policy, 40) == norm_limit(later, policy, 40) < 2.0
    assert norm_limit(history, POLICY, 40) == math.inf
    _, action = decide(later, policy, report(40, norm=50.0, applied=False))
    assert action.kind == "skip"
    assert "above the spike limit" in action.reason


def test_decisions_do_not_depend_on_being_killed_in_between() -> None:
    draw = random.Random(2)
    reports = [
        report(step, math.nan, applied=False)
        if draw.random() < 0.05
        else report(step, 3 + draw.gauss(0, 0.3))
        for step in range(300)
    ]
    _, undisturbed = play(reports)
    for cut in (1, 50, 199):
        history, first = play(reports[:cut])
        restored = History.from_json(json.loads(json.dumps(history.to_json())))
        assert restored == history
        _, second = play(reports[cut:], history=restored)
        assert first + second == undisturbed


def test_the_guard_keeps_the_count_of_rewinds_over_a_rewind(tmp_path: Path) -> None:
    made = Guard(run_dir=tmp_path, max_skips=0, max_rewinds=1, environ={})
    saved = made.state_dict()
    assert made.after_step(5, (0, 8), math.nan, 1.0, False).kind == "rewind"
    made.rewound(saved)
    assert made.history.skipped == ()
    assert made.after_step(5, (8, 16), math.nan, 1.0, False).kind == "stop"
    made.load_state_dict(saved)
    assert made.after_step(5, (8, 16), 2.0, 1.0, True).kind == "go"
    with pytest.raises(RequestError, match=r"guard.spike 'maybe'"):
        Guard(run_dir=tmp_path, spike="maybe")


# ---- equal weights? ----------------------------------------------------------------------------------------


def test_one_flipped_bit_changes_the_hash() -> None:
    generator = torch.Generator().manual_seed(0)
    named = [
        ("a", torch.randn(33, 17, generator=generator)),
        ("b", torch.randn(7, generator=generator).bfloat16()),
        ("c", torch.zeros(5, dtype=torch.bool)),
    ]
    first = parameter_hash(named)
    assert 0 <= first < 2**63
    assert parameter_hash([(name, tensor.clone()) for name, tensor in named]) == first
    draw = random.Random(0)
    for _ in range(300):
        which = draw.randrange(2)
        raw = named[which][1].view(torch.uint8).view(-1)
        place, bit = draw.randrange(len(raw)), 1 << draw.randrange(8)
        raw[place] ^= bit
        assert parameter_hash(named) != first
        raw[place] ^= bit
    assert parameter_hash(named) == first
    swapped = named[0][1].clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert parameter_hash([("a", swapped), *named[1:]]) != first, "a sum alone would not see this"
    assert parameter_hash([]) == 0


def test_the_odd_ranks_are_named() -> None:
    assert odd_ranks([5, 5, 5]) == []
    assert odd_ranks([5, 7, 5]) == [1]
    assert odd_ranks([7, 5, 5, 5]) == [0]
    assert odd_ranks([5, 7]) == [1]


# ---- dead and stuck ranks ----------------------------------------------------------------------------------

RANK = """
import sys, time, os, signal; sys.path.insert(0, {root!r})
from pathlib import Path
from lmcore.run.guard import Guard
rank, world_size, stuck, mode = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
folder = Path({folder!r})
patient = 600  # what comes before the fault may take its time: the machine may be slow
def on_end(line): (folder / "end").write_text(str(rank) + " " + line)
def wait_for(*paths):
    while not all(path.exists() for path in paths): time.sleep(0.01)
guard = Guard(run_dir=folder, rank=rank, world_size=world_size, stuck_seconds=stuck, environ={{}})
guard.install()
guard.watch(session="s1", on_end=on_end)
guard.beat("start", 0, allow_seconds=patient)
wait_for(*[folder / "logs" / f".alive-rank-{{other:05d}}.json" for other in range(world_size)])
for step in range(10**6):
    guard.beat("step", step, allow_seconds=patient)
    if step == 10 and rank == 1:
        (folder / "hurt").touch()
        if mode == "stop": os.kill(os.getpid(), signal.SIGSTOP)
        if mode == "sleep": time.sleep(1000)
        if mode == "spin":
            while True: pass
        if mode == "leave": guard.close(); raise SystemExit(0)
    if step == 10 and rank != 1 and mode in ("stop", "sleep", "spin"):
        wait_for(folder / "hurt")
        guard.beat("backward", step)   # it has got further, and waits for rank 1 in a collective
        time.sleep(1000)
    if step == 10 and mode == "alone":
        guard.beat("forward", step)
        time.sleep(1000)
    if step == 10 and mode == "leave":
        wait_for(folder / "hurt")
    if step == 10 + 125 and mode == "leave": break   # the watchdog has looked twice at where rank 1 was
    time.sleep(0.02)
guard.close()
"""


@final
class Ranks:
    """The processes of one pretended run; their output goes to files."""

    def __init__(self, folder: Path, mode: str, *, world_size: int = 2, stuck: float = 2.0) -> None:
        script = RANK.format(root=str(ROOT), folder=str(folder))
        self.folder = folder
        self.processes = []
        for rank in range(world_size):
            with open(folder / f"out-{rank}", "w") as out:
                command = [sys.executable, "-c", script, str(rank), str(world_size), str(stuck), mode]
                self.processes.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))

    def codes(self) -> list[int]:
        return [process.wait(120) for process in self.processes]

    def output(self, rank: int) -> str:
        return (self.folder / f"out-{rank}").read_text()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def test_a_killed_rank_is_named_at_once(tmp_path: Path) -> None:
    """Not after ``stuck_seconds``; by all the others, who do not take each other's end for the cause."""
    with Ranks(tmp_path, "die", world_size=3, stuck=3600) as ranks:
        assert wait_for(tmp_path / "hurt")
        ranks.processes[1].kill()
        assert ranks.codes() == [EXIT_STUCK, -9, EXIT_STUCK]
        for rank in (0, 2):
            assert f"rank 1 (pid {ranks.processes[1].pid} on" in ranks.output(rank)
            assert "is dead" in ranks.output(rank)
        assert (tmp_path / "end").read_text().startswith("0 rank 1")


@pytest.mark.parametrize("mode", ["stop", "sleep", "spin"])
def test_a_stuck_rank_is_named_with_everybodys_stacks(tmp_path: Path, mode: str) -> None:
    with Ranks(tmp_path, mode, stuck=1.5) as ranks:
        assert ranks.codes() == [EXIT_STUCK, -9], "a stuck rank does not keep the device"
        assert f"rank 1 (pid {ranks.processes[1].pid} on" in ranks.output(0)
        assert "is stuck: no progress for 1.5 s" in ranks.output(0)
        for rank in (0, 1):
            stacks = (tmp_path / "logs" / f"stacks-rank-{rank:05d}.txt").read_text()
            assert 'File "<string>", line' in stacks


def test_a_stuck_rank_names_itself(tmp_path: Path) -> None:
    with Ranks(tmp_path, "alone", world_size=1, stuck=1.5) as ranks:
        assert ranks.codes() == [EXIT_STUCK]
        assert "rank 0 (this one, at forward, step 10) is stuck: no progress for 1.5 s" in ranks.output(0)
        assert 'File "<string>", line' in (tmp_path / "logs" / "stacks-rank-00000.txt").read_text()


def test_leaving_in_good_order_is_no_death(tmp_path: Path) -> None:
    with Ranks(tmp_path, "leave", stuck=30) as ranks:
        assert ranks.codes() == [0, 0]
        assert ranks.output(0) == ranks.output(1) == ""
    assert not list((tmp_path / "logs").glob("stacks-*")), "what is empty is cleared away"


ELSEWHERE = """
import socket, sys, time; sys.path.insert(0, {root!r})
rank = int(sys.argv[1])
socket.gethostname = lambda: f"node-{{rank}}"
from lmcore.run.watchdog import Watchdog
from pathlib import Path
dog = Watchdog(logs=Path({logs!r}), rank=rank, world_size=4, session="s", stuck_seconds=0, say=print)
dog.start()
if rank == 3:
    sys.stdin.readline()
    dog.name_the_dead(answer_seconds=0)  # it has lost the connection, too, and says so before it ends
    raise SystemExit(1)
time.sleep(1000)
"""


def test_a_dead_rank_of_another_machine_is_named_and_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 waits in a collective, rank 2 is dead, rank 3 has failed as we did and said so."""
    logs = tmp_path / "logs"
    script = ELSEWHERE.format(root=str(ROOT), logs=str(logs))
    others = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], stdin=subprocess.PIPE)
        for rank in (1, 2, 3)
    ]
    said: list[str] = []
    dog = Watchdog(
        logs=logs, rank=0, world_size=4, session="s", stuck_seconds=0, say=said.append, leave=lambda _: None
    )
    dog.start()
    sleep, asked = time.sleep, dict[int, float]()

    def until_rank_1_has_answered(seconds: float) -> None:
        """However slow it is; the dead one is waited for as long as ever."""
        sleep(seconds)
        give_up = time.monotonic() + 120
        alive = logs / ".alive-rank-00001.json"
        asked.setdefault(1, dog._peers[1]["beat_time"])
        while json.loads(alive.read_text())["beat_time"] == asked[1] and time.monotonic() < give_up:
            sleep(0.02)

    try:
        for rank in (1, 2, 3):
            assert wait_for(logs / f".alive-rank-{rank:05d}.json")
        others[1].kill()
        others[1].wait()
        assert others[2].stdin is not None
        others[2].stdin.close()  # rank 3 may fail now
        others[2].wait()
        assert dog.dead_peers() == [], "by looking nothing is known of other machines"
        monkeypatch.setattr(time, "sleep", until_rank_1_has_answered)
        dog.name_the_dead(wait_seconds=0)
        pid = others[1].pid
        assert said == [
            f"rank 2 (pid {pid} on node-2) gives no sign of life; its last word was start, step 0"
        ]
    finally:
        dog.close()
        for process in others:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def sign(logs: Path, rank: int, pid: int, **more: object) -> None:
    """What a rank of this machine has left whose process is gone."""
    content = {
        "session": "new",
        "host": os.uname().nodename,
        "pid": pid,
        "start": "1",
        "count": 5,
        "what": "backward",
        "step": 3,
        "beat_time": 0,
        "done": False,
        "failed": False,
    }
    logs.mkdir(exist_ok=True)
    (logs / f".alive-rank-{rank:05d}.json").write_text(json.dumps(content | more))


def dog_of(logs: Path, left: list[int], said: list[str], **more: Any) -> Watchdog:
    """The watchdog of rank 0; where it would end the process it takes a note."""
    settings = {"rank": 0, "world_size": 2, "session": "new", "stuck_seconds": 60.0} | more
    return Watchdog(logs=logs, say=said.append, leave=left.append, **settings)


def test_signs_of_an_earlier_start_are_ignored(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    sign(logs, 1, 999999, session="old")
    left: list[int] = []
    said: list[str] = []
    dog = dog_of(logs, left, said)
    dog._tick = 3600  # only this thread looks
    dog.start()
    assert dog.dead_peers() == []
    sign(logs, 1, 999999)
    assert "rank 1 (pid 999999" in dog.dead_peers()[0]
    assert "backward, step 3" in dog.dead_peers()[0]
    dog.name_the_dead()
    assert "rank 1 (pid 999999" in said[0]
    dog.close()
    dog.close()
    assert left == []


def test_a_rank_that_ends_because_of_another_s_death_is_not_accused(tmp_path: Path) -> None:
    """The ranks do not look at the same moment: the first to see it is gone when the last one looks."""
    left: list[int] = []
    said: list[str] = []
    sign(tmp_path, 1, 999999)
    first = dog_of(tmp_path, left, said, world_size=3)
    first._publish(done=False)
    first._read_peers()
    first._end(first._dead(), "dead")
    assert left == [EXIT_STUCK]
    own = json.loads((tmp_path / ".alive-rank-00000.json").read_text())
    (tmp_path / ".alive-rank-00000.json").write_text(json.dumps(own | {"pid": 999998}))
    last = dog_of(tmp_path, left, said, rank=2, world_size=3)
    [word] = last.dead_peers()
    assert word.startswith("rank 1 (pid 999999")
    sign(tmp_path, 1, 999999, done=True)
    [word] = dog_of(tmp_path, left, said, rank=2, world_size=3).dead_peers()
    assert word.startswith("rank 0 (pid 999998"), "it is the only one"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("at_once", [True, False])
def test_of_ranks_that_are_all_at_fault_one_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int], at_once: bool
) -> None:
    """They stand at the same place, so that each of them names all; at the same moment, or one after the other."""
    monkeypatch.setattr(watchdog, "_STACKS_SECONDS", 0.1)
    told: list[int] = []
    dogs = [
        dog_of(tmp_path, [], [], rank=rank, on_end=lambda _, rank=rank: told.append(rank)) for rank in (0, 1)
    ]
    for dog in dogs:
        dog._failed = at_once
        dog._publish(done=False)
    for rank in order:
        dogs[rank]._failed = True
        dogs[rank]._publish(done=False)
        dogs[rank]._report_end("both are stuck", [0, 1])
    assert told == [0 if at_once else order[0]]


def test_a_long_phase_may_ask_for_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda *_words, **_more: None
    )  # ends the process
    left: list[int] = []
    dog = dog_of(tmp_path, left, [], world_size=1, stuck_seconds=0.3)
    dog.beat("compile", 0, allow_seconds=600)
    dog.start()
    time.sleep(1.2)
    assert left == []
    dog.beat("step", 1)
    give_up = time.monotonic() + 120
    while not left and time.monotonic() < give_up:
        time.sleep(0.02)
    assert left == [EXIT_STUCK]
    dog.close()
