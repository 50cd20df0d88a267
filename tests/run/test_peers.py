"""A dead rank ends the others within seconds, from the first moment; a busy one does not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmcore.process import pid_namespace
from lmcore.run.peers import EXIT_STUCK, Peers, _Peer, connect
from tests.support.fork_server import free_port

ROOT = Path(__file__).parents[2]

RANK = """
import os, signal, sys, time; sys.path.insert(0, {root!r})
from pathlib import Path
from lmcore.run.peers import connect
peers = connect(os.environ)
rank, mode, stuck = peers.rank, sys.argv[1], float(sys.argv[2])
folder = Path({folder!r})
peers.on_end = lambda line, code: (folder / "end").write_text(f"{{rank}} {{line}}")
def wait_for(*names):
    while not all((folder / name).exists() for name in names): time.sleep(0.01)
while len(peers._peers) < (peers.world_size - 1 if rank == 0 else 1): time.sleep(0.01)
(folder / f"met-{{rank}}").touch()
wait_for(*[f"met-{{other}}" for other in range(peers.world_size)])
if mode == "die":
    time.sleep(600)
if mode == "finish":
    if rank == 0: time.sleep(4)
    peers.done()
    if rank == 1: time.sleep(0.5)
    sys.exit(0)
if mode == "same-error":
    time.sleep(0.3 * rank)
    sys.exit(2)
if mode == "refusal":
    if rank == 1:
        peers.leaving("a.txt is not there", 2)
        sys.exit(2)
    time.sleep(float(sys.argv[2]))
    sys.exit(2)
if mode == "error":
    if rank == 1:
        peers.leaving(error="ValueError: a.txt is empty", code=1)
        wait_for("known-0", "known-2")
        sys.exit(1)
    begin = time.monotonic()
    line = peers.wait_for_reason(10)   # its connections to rank 1 are lost
    (folder / f"known-{{rank}}").write_text(f"{{time.monotonic() - begin}}")
    if rank == 2: peers.report(line); sys.exit(peers.fault_code)
    time.sleep(600)                    # inside a collective that nobody ends
if mode == "slow-error":
    if rank == 1: sys.exit(2)
    peers.leaving()
    time.sleep(4)
    sys.exit(3)
if mode == "fork":
    if rank == 1:
        child = os.fork()
        if child: (folder / "child").write_text(str(child))
    time.sleep(600)
from lmcore.run.watchdog import Watchdog
dog = Watchdog(logs=folder / "logs", rank=rank, stuck_seconds=stuck, note=lambda line: None, peers=peers)
dog.start()
for step in range(10):
    dog.beat("step", step)
(folder / f"hurt-{{rank}}").touch()
wait_for(*[f"hurt-{{other}}" for other in range(peers.world_size)])
if rank == int(sys.argv[3]):
    if mode == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if mode == "busy":
        for _ in range(30):
            dog.beat("save", 10); time.sleep(0.2)
        dog.beat("end", 11); peers.done(); dog.close(); sys.exit(0)
    time.sleep(600)
dog.beat("backward", 10)      # it has got further, and waits for the other one in a collective
if mode == "busy":
    peers.wait_for_fault(6.5); dog.beat("end", 11); peers.done(); dog.close(); sys.exit(0)
time.sleep(600)
"""


class Ranks:
    """The processes of one pretended run; their output goes to files."""

    def __init__(
        self, folder: Path, mode: str, *, world_size: int = 2, stuck: float = 2.0, victim: int = 1
    ) -> None:
        self.folder, self.processes = folder, []
        script = RANK.format(root=str(ROOT), folder=str(folder))
        meeting = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(world_size):
            with open(folder / f"out-{rank}", "w") as out:
                command = [sys.executable, "-c", script, mode, str(stuck), str(victim)]
                env = {**os.environ, **meeting, "RANK": str(rank)}
                self.processes.append(
                    subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
                )

    def met(self) -> None:
        give_up = time.monotonic() + 60
        while len(list(self.folder.glob("met-*"))) < len(self.processes):
            assert time.monotonic() < give_up, "the ranks have not met"
            time.sleep(0.02)

    def codes(self, seconds: float = 60) -> list[int]:
        return [process.wait(seconds) for process in self.processes]

    def output(self, rank: int) -> str:
        return (self.folder / f"out-{rank}").read_text()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def at_once(check: Callable[..., None], folder: Path, *cases: tuple[Any, ...]) -> None:
    """``check(folder of the case, *case)`` for all cases at the same time: their processes sleep most of it."""
    folders = [folder / "-".join(map(str, case)) for case in cases]
    for one in folders:
        one.mkdir()
    with ThreadPoolExecutor(len(cases)) as pool:
        for done in [pool.submit(check, one, *case) for one, case in zip(folders, cases)]:
            done.result()


def test_killed_rank_is_named_by_all_others_within_seconds(tmp_path: Path) -> None:
    """Before torch is imported; whichever rank it is, the connecting one included."""

    def check(folder: Path, victim: int) -> None:
        with Ranks(folder, "die", world_size=3) as ranks:
            ranks.met()
            ranks.processes[victim].kill()
            begin = time.monotonic()
            others = [rank for rank in range(3) if rank != victim]
            codes = ranks.codes()
            assert time.monotonic() - begin < 10
            assert [codes[rank] for rank in others] == [EXIT_STUCK] * 2
            for rank in others:
                assert f"rank {victim} (pid {ranks.processes[victim].pid} on" in ranks.output(rank)
                assert "is dead" in ranks.output(rank)
            assert (folder / "end").read_text().startswith(f"{min(others)} rank {victim}"), "one rank speaks"

    at_once(check, tmp_path, (0,), (1,), (2,))


def test_killed_rank_with_a_forked_child_is_noticed(tmp_path: Path) -> None:
    """A data worker that outlives its rank holds copies of the rank's open files."""
    with Ranks(tmp_path, "fork") as ranks:
        while not (tmp_path / "child").exists() or not (child := (tmp_path / "child").read_text()):
            time.sleep(0.02)
        ranks.processes[1].kill()
        assert ranks.codes()[0] == EXIT_STUCK
    os.kill(int(child), signal.SIGKILL)


def test_finished_rank_is_not_reported_dead(tmp_path: Path) -> None:
    with Ranks(tmp_path, "finish", world_size=3) as ranks:
        assert ranks.codes() == [0, 0, 0]
        assert [ranks.output(rank) for rank in range(3)] == ["", "", ""]


def test_ranks_that_meet_the_same_error_keep_their_exit_code(tmp_path: Path) -> None:
    with Ranks(tmp_path, "same-error", world_size=3) as ranks:
        assert ranks.codes() == [2, 2, 2]


def test_slower_ranks_come_to_a_refusal_by_themselves(tmp_path: Path) -> None:
    """All ranks refuse alike; one may still be importing when the first has ended. Longer than a dead rank's grace."""
    with Ranks(tmp_path, "refusal", world_size=3, stuck=4) as ranks:
        assert ranks.codes() == [2, 2, 2]
        assert [ranks.output(rank) for rank in range(3)] == ["", "", ""], "each says it itself"
        assert not (tmp_path / "end").exists()


@pytest.mark.slow
def test_refusal_of_one_rank_ends_the_others_with_its_line_and_code(tmp_path: Path) -> None:
    with Ranks(tmp_path, "refusal", world_size=3, stuck=60) as ranks:
        begin = time.monotonic()
        assert ranks.codes() == [2, 2, 2]
        assert time.monotonic() - begin < 40
        assert (tmp_path / "end").read_text().startswith("0 rank 1")
        for rank in (0, 2):
            assert f"rank 1 (pid {ranks.processes[1].pid} on" in ranks.output(rank)
            assert "has ended: a.txt is not there" in ranks.output(rank)


def test_error_of_one_rank_is_known_to_all_others_at_once(tmp_path: Path) -> None:
    """While it still lives, on every rank, and named as the reason for the end instead of "is dead"."""
    with Ranks(tmp_path, "error", world_size=3) as ranks:
        assert ranks.codes() == [1, 1, 1]
        said = f"rank 1 (pid {ranks.processes[1].pid} on {socket.gethostname()}) has ended: ValueError: a.txt is empty"
        assert (tmp_path / "end").read_text() == f"0 {said}"
        for rank in (0, 2):
            assert ranks.output(rank) == f"train_lm.py: {said}\n"
            assert float((tmp_path / f"known-{rank}").read_text()) < 5


def test_rank_that_is_already_ending_is_not_killed(tmp_path: Path) -> None:
    with Ranks(tmp_path, "slow-error") as ranks:
        assert ranks.codes() == [3, 2]


def test_stuck_rank_is_named_with_the_stacks_of_all(tmp_path: Path) -> None:
    def check(folder: Path, mode: str, victim: int) -> None:
        with Ranks(folder, mode, stuck=1.5, victim=victim) as ranks:
            other = 1 - victim
            codes = ranks.codes()
            assert codes[other] == EXIT_STUCK
            assert codes[victim] in (EXIT_STUCK, -signal.SIGKILL), "it does not keep the device"
            assert f"rank {victim} (pid {ranks.processes[victim].pid} on" in ranks.output(other)
            assert "is stuck" in ranks.output(other)
            for rank in (0, 1):
                stacks = (folder / "logs" / f"stacks-rank-{rank:05d}.txt").read_text()
                assert 'File "<string>", line' in stacks

    at_once(check, tmp_path, ("stop", 0), ("stop", 1), ("sleep", 0), ("sleep", 1))


def test_waiting_for_a_rank_that_is_busy_saving_is_not_stuck(tmp_path: Path) -> None:
    def check(folder: Path, victim: int) -> None:
        with Ranks(folder, "busy", stuck=1.0, victim=victim) as ranks:
            assert ranks.codes() == [0, 0], ranks.output(0) + ranks.output(1)

    at_once(check, tmp_path, (0,), (1,))


def test_occupied_port_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections, and never answers."""
    port = free_port()
    monkeypatch.setattr(sys.modules[__name__], "free_port", lambda: port)
    token = f"{port}/2/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/0"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 15_000 + zlib.crc32(token.encode()) % 17_000))
        other.listen()
        with Ranks(tmp_path, "same-error") as ranks:
            assert ranks.codes() == [2, 2]
            assert len(list(tmp_path.glob("met-*"))) == 2


def test_garbage_on_the_port_is_ignored(tmp_path: Path) -> None:
    """Other programs may connect, and say anything."""
    with Ranks(tmp_path, "die") as ranks:
        ranks.met()
        [listener] = [
            c.laddr.port
            for c in psutil.Process(ranks.processes[0].pid).net_connections("tcp")
            if c.status == psutil.CONN_LISTEN
        ]
        for words in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"[]\n{}\n",
            b'{"lmcore": "x", "rank": 1}\n',
            b"\xff" * 70_000,
        ):
            with socket.create_connection(("127.0.0.1", listener)) as stranger:
                stranger.sendall(words)
        time.sleep(3.5)
        assert [process.poll() for process in ranks.processes] == [None, None]


DIES_ONCE_MET = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from lmcore.run import peers as module
rank = int(os.environ["RANK"])
late_seconds, victim = float(sys.argv[1]), int(sys.argv[2])
time.sleep(0 if rank == victim else late_seconds)
peers = module.connect(os.environ)
if rank == victim:
    assert peers.wait_until_met(30)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("late_seconds", ["0", "0.3"])
def test_rank_that_dies_as_soon_as_it_has_met_is_noticed(
    tmp_path: Path, late_seconds: str, victim: int
) -> None:
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    try:
        for rank in range(2):
            command = [sys.executable, "-c", DIES_ONCE_MET.format(root=str(ROOT)), late_seconds, str(victim)]
            env = {**os.environ, **meeting, "RANK": str(rank)}
            with open(tmp_path / f"out-{rank}", "w") as out:
                ranks.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
        assert ranks[1 - victim].wait(30) == EXIT_STUCK
        said = (tmp_path / f"out-{1 - victim}").read_text()
        assert f"rank {victim} (pid {ranks[victim].pid}" in said
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_rank_goes_on_without_a_connection_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcore.run.peers._PEERS", None)
    monkeypatch.setattr(Peers, "_follow", lambda self: None)  # a port that is closed between machines
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    peers = connect(env)
    assert peers is not None
    assert not peers.wait_until_met(0.1)


@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_at_start_ends_the_other(tmp_path: Path, victim: int) -> None:
    """Started by hand, as srun does: no launcher ends the other one, which would wait for half an hour."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    argv = ["--run_dir", str(tmp_path / "run"), "--data.train", str(ROOT / "README.md")]
    ranks = []
    try:
        for rank in range(2):
            env = {
                **os.environ,
                **meeting,
                "RANK": str(rank),
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            }
            with open(tmp_path / f"out-{rank}", "w") as out:
                command = [sys.executable, str(ROOT / "train_lm.py"), *argv]
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out))
        while not any(
            c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(ranks[1].pid).net_connections()
        ):
            assert ranks[1].poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        ranks[victim].kill()
        begin = time.monotonic()
        assert ranks[1 - victim].wait(60) == EXIT_STUCK
        assert time.monotonic() - begin < 10
        assert f"rank {victim} (pid {ranks[victim].pid}" in (tmp_path / f"out-{1 - victim}").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_pid_of_a_rank_in_another_container_is_none_of_this_one() -> None:
    """Containers with the network of their machine have one host name: a signal would reach a stranger, or this rank itself."""
    known: dict[str, Any] = {"socket": socket.socket(), "pid": os.getpid(), "host": socket.gethostname()}
    with known["socket"]:
        assert _Peer(**known, pids=pid_namespace()).is_here
        assert not _Peer(**known, pids="pid:[1]").is_here


def test_single_process_has_no_peers() -> None:
    alone: list[dict[str, Any]] = [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    ]
    assert [connect(env) for env in alone] == [None, None]
