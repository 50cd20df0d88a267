"""Signals only set flags, deadlines and files are seen, decisions about numbers that are not finite are pure."""

from __future__ import annotations

import contextlib
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
from typing import Any

import pytest
import torch

from lmcore.config.schema import GuardConfig
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
    Verdict,
    left_on_request,
    verdict,
)
from lmcore.run.replicas import odd_ranks, parameter_hash
from tests.support.disk_faults import forked

ROOT = Path(__file__).parents[2]


def make(
    run_dir: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    max_minutes: float | None = None,
    note: Any = print,
    environ: Any = None,
    **options: Any,
) -> Guard:
    """A guard with these options of ``guard.*``."""
    return Guard(
        GuardConfig(**options),
        run_dir=run_dir,
        rank=rank,
        world_size=world_size,
        max_minutes=max_minutes,
        note=note,
        environ=environ,
    )


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    made = make(run_dir=tmp_path, environ={}, note=lambda _: None)
    made.install()
    yield made
    made.close(give_signals_back=True)


# ---- signals, deadlines, files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "flag"), [(signal.SIGTERM, SIGTERM), (signal.SIGUSR1, SIGUSR1), (signal.SIGINT, SIGINT)]
)
def test_signal_only_sets_a_flag(
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


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def work() -> None:
        made = make(run_dir=tmp_path, environ={})
        made.install()
        os.kill(os.getpid(), signal.SIGINT)
        made._first_sigint -= 3
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    assert forked(work) == -signal.SIGINT


def test_signal_before_training_ends_at_once(tmp_path: Path) -> None:
    made = make(run_dir=tmp_path, environ={})
    made.install(training=False)
    with pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 75
    made.begin()
    os.kill(os.getpid(), signal.SIGTERM)
    assert made.flags() == SIGTERM
    made.close(give_signals_back=True)


def test_forked_data_worker_ignores_signals(guard: Guard) -> None:
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


def test_close_restores_the_signal_handlers(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    made = make(run_dir=tmp_path, environ={})
    made.install()
    made.close()
    os.kill(os.getpid(), signal.SIGTERM)  # in the last moments of a run: it does not change how it ended
    made.close(give_signals_back=True)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_ignored_sighup_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    made = make(run_dir=tmp_path, environ={})
    made.install()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    made.close(give_signals_back=True)
    signal.signal(signal.SIGHUP, before)


def test_deadlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0] * 1e6)
    slurm = {"SLURM_JOB_END_TIME": str(int(1e9 + 600))}
    made = make(run_dir=tmp_path, stop_before_deadline_seconds=120, environ=slurm)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock on the wall jumps; the deadline does not
    now[0] += 470
    assert made.flags() == 0
    assert made.flags(reserve_seconds=15) == DEADLINE, "a save that takes long must begin earlier"
    now[0] += 11
    assert made.flags() == DEADLINE
    made = make(run_dir=tmp_path, max_minutes=2, environ={"SLURM_JOB_END_TIME": "soon"})
    now[0] += 119
    assert made.flags() == 0
    now[0] += 1
    assert made.flags() == MAX_MINUTES
    assert verdict(MAX_MINUTES).checkpoint_reason == "deadline"


def test_margin_as_long_as_the_job_leaves_half_of_it_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each piece of the run would be one step, and the queue would start it again for ever."""
    now, heard = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    job = {"SLURM_JOB_END_TIME": "1300"}
    made = make(run_dir=tmp_path, stop_before_deadline_seconds=300, environ=job, note=heard.append)
    make(run_dir=tmp_path, rank=1, stop_before_deadline_seconds=300, environ=job, note=heard.append)
    assert len(heard) == 1
    assert "300 is more than half of the 300 s" in heard[0]
    now[0] += 149
    assert made.flags() == 0
    now[0] += 1
    assert made.flags() == DEADLINE
    now[0] += 500
    late = make(run_dir=tmp_path, environ=job, note=heard.append)
    assert late.flags() == DEADLINE, "a job that should have ended"
    make(run_dir=tmp_path, environ={}, note=heard.append)
    assert len(heard) == 2


def test_files_are_seen_on_rank_0_and_taken_away_when_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made = make(run_dir=tmp_path, environ={})
    other = make(run_dir=tmp_path, rank=1, world_size=2, environ={})
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
    assert verdict(0) == Verdict()
    save = verdict(SAVE_FILE)
    assert (save.save, save.stop, save.checkpoint_reason) == (True, False, "save file")
    stop = verdict(SAVE_FILE | STOP_FILE)
    assert (stop.save, stop.stop, stop.exit_code, stop.checkpoint_reason) == (True, True, 75, "stop file")
    both = verdict(SIGTERM | DEADLINE)
    assert (both.checkpoint_reason, both.reason) == ("signal", "SIGTERM, the job's end time is near")
    fault = verdict(FAULT | SIGTERM)
    assert (fault.save, fault.stop, fault.exit_code) == (False, True, 70)
    assert verdict(REWIND) == Verdict(rewind=True, reason="a rewind")


LAUNCHER = """
import subprocess, sys, os, time, pathlib
child = subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(120)  # {name}
"""
CHILD = """
import os, sys, time, pathlib; sys.path.insert(0, {root!r})
from lmcore.config.schema import GuardConfig
from lmcore.run.guard import Guard, SIGTERM
guard = Guard(GuardConfig(), run_dir={folder!r}); guard.install()
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
def test_rank_of_a_dead_launcher_is_signalled(tmp_path: Path, name: str, told: bool) -> None:
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


ORPHAN = """
import os, sys, time; sys.path.insert(0, {root!r})
from lmcore.run import guard
read = os.getppid
if {when!r} == "before":      # the launcher has died before the first question, and left us to process 1
    os.getppid = lambda: 1
else:                         # it dies while the kernel is being asked
    parents = iter([read(), 1])
    os.getppid = lambda: next(parents)
guard.Path = lambda path: type("P", (), {{"read_bytes": lambda self: {command!r}}})()
guard.die_with_parent()
print("trains on")
"""


@pytest.mark.parametrize(
    ("when", "command", "env", "code"),
    [
        ("before", b"/sbin/init", {"ACCELERATE_MIXED_PRECISION": "no"}, 75),
        ("before", b"/sbin/init", {"TORCHELASTIC_RUN_ID": "none"}, 75),
        ("during", b"python\0accelerate launch", {"ACCELERATE_MIXED_PRECISION": "no"}, 75),
        ("before", b"/sbin/init", {}, 0),  # nohup from a shell that has ended
        (
            "before",
            b"accelerate launch",
            {"ACCELERATE_MIXED_PRECISION": "no"},
            0,
        ),  # a container's first process
    ],
)
def test_launcher_killed_at_start_leaves_no_orphan(
    when: str, command: bytes, env: dict[str, str], code: int
) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    script = ORPHAN.format(root=str(ROOT), when=when, command=command)
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean | env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "trains on" in done.stdout) == (code, code == 0), done.stderr


def test_launcher_restart_keeps_a_requested_stop(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    again = {"TORCHELASTIC_RESTART_COUNT": "1"}
    assert not left_on_request(tmp_path, again), "a crash before there was a status"
    folder.write_status("saved", exit_code=75, reason="the file STOP")
    assert left_on_request(tmp_path, again)
    assert not left_on_request(tmp_path, {"TORCHELASTIC_RESTART_COUNT": "0"}), "started by a person"
    assert not left_on_request(tmp_path, {})
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(status | {"parent_pid": os.getppid() + 1}))
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
    assert "(3 in 16 steps)" in actions[-1].reason
    assert actions[-1].before_step == 20


def test_isolated_skips_do_not_trigger_a_rewind() -> None:
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


def test_spike_is_detected_and_noise_is_not() -> None:
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


def test_no_spike_before_there_is_a_window() -> None:
    assert limit([1.0] * 7, 6.0, window=8) == math.inf
    assert limit([2.0] * 8, 6.0, window=16) == pytest.approx(2.0 + 6 * 0.002)
    _, actions = play([report(step, 10.0 * (step + 1)) for step in range(7)])
    assert {action.kind for action in actions} == {"go"}


def test_norm_limit_does_not_depend_on_a_late_report() -> None:
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


def test_guard_keeps_its_count_over_a_rewind(tmp_path: Path) -> None:
    made = make(run_dir=tmp_path, max_skips=0, max_rewinds=1, environ={})
    saved = made.state_dict()
    assert made.after_step(5, (0, 8), math.nan, 1.0, False).kind == "rewind"
    made.rewound(saved)
    assert made.history.skipped == ()
    assert made.after_step(5, (8, 16), math.nan, 1.0, False).kind == "stop"
    made.load_state_dict(saved)
    assert made.after_step(5, (8, 16), 2.0, 1.0, True).kind == "go"


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


def test_deviating_ranks_are_named() -> None:
    assert odd_ranks([5, 5, 5]) == []
    assert odd_ranks([5, 7, 5]) == [1]
    assert odd_ranks([7, 5, 5, 5]) == [0]
    assert odd_ranks([5, 7]) == [1]
