"""One writer of a run at a time, an honest status, names that cannot lead out, secrets that cannot come
in.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcore.disk import Disk
from lmcore.errors import FaultError, RequestError
from lmcore.names import confined, safe_name
from lmcore.run import folder as run_folder
from lmcore.run.folder import RunFolder, job_id, refuse_separate_disks
from tests.support.checkpoints import Member, Threads
from tests.support.disk_faults import Counter, KillAt, forked

ROOT = Path(run_folder.__file__).parents[2]
QUICK = 0.1


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start another process that locks the folder, and then does what it is told."""
    processes = []

    def start(then: str = "time.sleep(60)", **environment: str) -> subprocess.Popen[str]:
        script = (
            f"import sys, time, os; sys.path.insert(0, {str(ROOT)!r})\n"
            "from lmcore.run.folder import RunFolder\n"
            f"folder = RunFolder({str(tmp_path / 'run')!r}); folder.lock()\n"
            f"print('locked', flush=True)\n{then}\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


# ---- lock --------------------------------------------------------------------------------------------------


def test_second_job_is_refused_and_names_the_holder(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    process = holder(SLURM_JOB_ID="4711", SLURM_STEP_ID="0")
    with pytest.raises(
        RequestError, match=rf"in use by pid {process.pid} on .*SLURM_JOB_ID=4711\.0.*STOP"
    ) as seen:
        RunFolder(tmp_path / "run").lock()
    assert os.uname().nodename in str(seen.value)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_lock_of_a_dead_job_is_taken_at_once(
    tmp_path: Path,
    holder: Callable[..., subprocess.Popen[str]],
    heard: list[str],
    how: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = holder()
    process.send_signal(how)
    process.wait()
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", pytest.fail)
        folder.lock(note=heard.append)
    assert len(heard) == 1
    assert f"pid {process.pid}" in heard[0]
    folder.unlock()


def test_children_of_a_dead_holder_do_not_keep_the_lock(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]], heard: list[str]
) -> None:
    """Data workers are forks of the trainer and outlive its SIGKILL by some seconds."""
    process = holder(
        "pid = os.fork()\nif pid == 0: time.sleep(600); os._exit(0)\nprint(pid, flush=True); time.sleep(60)"
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    folder = RunFolder(tmp_path / "run")
    folder.lock(note=heard.append)
    folder.unlock()
    os.kill(child, signal.SIGKILL)


def test_restart_waits_for_the_process_it_replaces(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    holder("time.sleep(1)")
    folder = RunFolder(tmp_path / "run")
    folder.lock(note=lambda _: None, wait_seconds=30)
    folder.unlock()


def test_unlocked_folder_is_free(tmp_path: Path, heard: list[str]) -> None:
    for _ in range(3):
        folder = RunFolder(tmp_path / "run")
        folder.lock(note=heard.append)
        with pytest.raises(RequestError, match="this very process"):
            RunFolder(tmp_path / "run").lock()
        folder.unlock()
        folder.unlock()
    assert heard == []


def foreign(path: Path, **changes: Any) -> None:
    """A lock that another machine has left, or holds."""
    path.mkdir(parents=True, exist_ok=True)
    lock = {
        "host": "elsewhere",
        "pid": 1,
        "job_id": None,
        "boot": "x",
        "token": "t",
        "since": "2026",
        "beat": 3,
    }
    (path / ".lock").write_text(json.dumps(lock | changes) + "\n")


def test_lock_of_another_machine_without_a_heartbeat_is_taken(tmp_path: Path, heard: list[str]) -> None:
    foreign(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.lock(note=heard.append, beat_seconds=QUICK)
    assert "watching" in heard[0]
    assert "took over the lock of pid 1 on elsewhere" in heard[1]
    folder.unlock()


def test_lock_of_another_machine_with_a_heartbeat_is_respected(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machines may not share the kernel's locks: then the number in the file decides, and no clock."""
    foreign(tmp_path / "run")
    monkeypatch.setattr(time, "sleep", lambda _seconds: foreign(tmp_path / "run", beat=4))
    with pytest.raises(RequestError, match="in use by pid 1 on elsewhere"):
        RunFolder(tmp_path / "run").lock(note=heard.append)


def test_requeued_job_takes_its_own_lock_at_once(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert job_id() == "SLURM_JOB_ID=12.0"
    foreign(tmp_path / "run", job_id="SLURM_JOB_ID=12.0")
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", pytest.fail)
        folder.lock(note=heard.append, beat_seconds=30)
    folder.unlock()


def test_torn_lock_file_does_not_block(tmp_path: Path, heard: list[str]) -> None:
    (tmp_path / "run").mkdir()
    for content in (b"", b"{", b"\xff\x00", b"[1]", b"null"):
        (tmp_path / "run" / ".lock").write_bytes(content)
        folder = RunFolder(tmp_path / "run")
        folder.lock(note=heard.append, beat_seconds=0.02)
        folder.unlock()


def test_heartbeat_decides_without_record_locks(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_record_lock", lambda _fd: None)
    first = RunFolder(tmp_path / "run")
    first.lock(note=heard.append, beat_seconds=QUICK)
    monkeypatch.setattr(run_folder, "_held", {})  # as another process would see it
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _seconds: until_it_beats(tmp_path / "run"))
        with pytest.raises(RequestError, match=f"in use by pid {os.getpid()}"):
            RunFolder(tmp_path / "run").lock(note=heard.append, beat_seconds=QUICK)
    first.unlock()
    second = RunFolder(tmp_path / "run")
    second.lock(note=heard.append, beat_seconds=QUICK)
    second.unlock()
    assert "locking is not supported" in heard[0]


def test_without_record_locks_the_second_of_two_simultaneous_starts_is_refused(
    tmp_path: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found no holder; the one who wrote last has the folder, and the other reads that before it begins."""
    monkeypatch.setattr(run_folder, "_record_lock", lambda _fd: None)
    sleep = time.sleep

    def overtaken(seconds: float) -> None:
        if seconds == run_folder.SETTLE_SECONDS:
            foreign(tmp_path / "run")
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", overtaken)
    with pytest.raises(RequestError, match="in use by pid 1 on elsewhere"):
        RunFolder(tmp_path / "run").lock(note=heard.append, beat_seconds=60)


@pytest.mark.parametrize("change", ["renamed", "removed", "replaced"])
def test_run_folder_moved_while_training_is_noticed(tmp_path: Path, change: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.lock(note=lambda _: None)
    folder.check_owner()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    if change == "removed":
        shutil.rmtree(tmp_path / "elsewhere")
    if change == "replaced":
        RunFolder(tmp_path / "run").create()
    with pytest.raises(FaultError, match="renamed, removed or replaced"):
        folder.check_owner()
    folder.unlock()


def test_lock_file_taken_over_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.lock(note=lambda _: None)
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock").write_text("{}")
    with pytest.raises(FaultError, match="taken over"):
        folder.check_owner()
    folder.unlock()


@pytest.mark.parametrize("name", run_folder.NEVER_LINKS)
def test_link_out_of_the_run_folder_is_not_written_through(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(precious)
    with pytest.raises(
        RequestError, match=r"is a link to .*choose another --run_dir|cannot be (locked|written)"
    ):
        RunFolder(tmp_path / "run").lock(note=lambda _: None)
    assert precious.read_text() == "mine"


def test_checkpoints_that_cannot_be_written_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    allowed = os.access  # root may write everywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "checkpoints" and allowed(path, mode)
    )
    with pytest.raises(RequestError, match="checkpoints cannot be written"):
        RunFolder(tmp_path / "run").lock(note=lambda _: None)
    assert os.listdir(tmp_path / "run" / "checkpoints") == []


def test_full_disk_at_the_lock_is_a_fault_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, holder: Any) -> None:
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")  # which names no file

    monkeypatch.setattr(run_folder, "_write_holder", full)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(FaultError, match=r"run/\.lock: No space left on device"):
        folder.lock(note=lambda _: None)
    folder.unlock()


@pytest.mark.parametrize("name", run_folder.FILES)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_folder_or_fifo_in_the_place_of_a_file_is_refused_at_once(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    with pytest.raises(RequestError, match=f"{name} is not a file"):
        RunFolder(tmp_path / "run").lock(note=lambda _: None)


def until_it_beats(run: Path, fd: int | None = None) -> None:
    """Return when the number in the lock has grown. ``fd``: of the holder, where closing another one would drop the
    kernel's lock.
    """
    opened = os.open(run / ".lock", os.O_RDONLY) if fd is None else fd
    first, give_up = json.loads(os.pread(opened, 10000, 0))["beat"], time.monotonic() + 120
    while json.loads(os.pread(opened, 10000, 0))["beat"] <= first:
        assert time.monotonic() < give_up, "no beat"
        threading.Event().wait(0.01)
    if fd is None:
        os.close(opened)


def test_lock_holder_writes_heartbeats(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.lock(note=print, beat_seconds=0.02)
    until_it_beats(tmp_path / "run", folder._lock_fd)
    folder.unlock()


def test_beat_in_flight_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write to whatever file gets the descriptor next, or make the free lock look taken."""
    write, begun, unlocked = run_folder._write_holder, threading.Event(), threading.Event()

    def late(fd: int, holder: dict[str, Any]) -> None:
        if holder["beat"]:
            begun.set()
            unlocked.wait(0.5)  # longer than an unlock that waits for nobody
        write(fd, holder)

    monkeypatch.setattr(run_folder, "_write_holder", late)
    folder = RunFolder(tmp_path / "run")
    folder.lock(note=print, beat_seconds=0.01)
    assert begun.wait(120)
    beating = folder._beating
    assert beating is not None
    folder.unlock()
    with open(tmp_path / "next", "w+") as following:
        unlocked.set()
        beating.join(120)
        assert not beating.is_alive()
        assert following.read() == ""
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_uncreatable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cannot be written: .*--run_dir"):
        RunFolder(tmp_path / "file" / "run").lock()
    with pytest.raises(RequestError, match="cannot be written"):
        RunFolder("/proc/nowhere/run").lock()


def test_private_folders(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        folder = RunFolder(tmp_path / "a" / "run", private=True)
        folder.create()
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        RunFolder(tmp_path / "open").create()
        assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o777
    finally:
        os.umask(previous)


# ---- status ------------------------------------------------------------------------------------------------


def test_status_says_who_where_and_how_far(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    assert folder.read_status() is None
    folder.write_status("running", step=7, version="1")
    folder.write_status("saved", exit_code=75, reason="SIGTERM")
    status = folder.read_status()
    assert status is not None
    assert {key: status[key] for key in ("state", "exit_code", "reason", "step", "pid", "version")} == {
        "state": "saved",
        "exit_code": 75,
        "reason": "SIGTERM",
        "step": 7,
        "pid": os.getpid(),
        "version": "1",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", status["time"])
    with pytest.raises(ValueError, match="unknown state"):
        folder.write_status("happy")
    (folder.path / "status.json").write_text("{")
    assert folder.read_status() is None


def test_status_is_whole_at_any_instant(tmp_path: Path) -> None:
    counter = Counter()
    folder = RunFolder(tmp_path / "run", disk=Disk(counter))
    folder.create()
    before = len(counter.calls)
    folder.write_status("running", step=1)
    assert "fsync" not in counter.calls[before:], "training waits for no disk"
    before = len(counter.calls)
    folder.write_status("saved", step=1)
    assert "fsync" in counter.calls[before:]
    for number in range(len(counter.calls) - before):
        killed = RunFolder(tmp_path / "run", disk=Disk(KillAt(number, torn=True)))
        assert forked(lambda f=killed: f.write_status("finished", step=2)) == -9
        status = folder.read_status()
        assert status is not None
        assert status["step"] in (1, 2)


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a", "run-1", "gpt2_small.v2", "2026", "_x", "日本語の実験", "Ωmega", "lr=3e-4+b", "x" * 200]
)
def test_good_names(name: str) -> None:
    assert safe_name(name) == name


BAD_NAMES = [
    "",
    ".",
    "..",
    "-rf",
    "--help",
    ".hidden",
    "a/b",
    "/abs",
    "a\0b",
    "a\nb",
    "a b",
    "a\\b",
    "a:b",
    "~root",
]
BAD_NAMES += [
    "$(id)",
    "`id`",
    "a;b",
    "a|b",
    "a*",
    "a?",
    "x" * 201,
    "語" * 70,
    "a\u202eb",
    "e\u0301",
    "a.",
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name: str) -> None:
    with pytest.raises(RequestError, match="cannot be a name"):
        safe_name(name)


def test_fuzzed_names_never_lead_out(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "inner").mkdir(parents=True)
    (root / "escape").symlink_to("/")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    draw = random.Random(5)
    pieces = [
        "..",
        ".",
        "/",
        "//",
        "a",
        "inner",
        "escape",
        "up",
        "etc",
        "passwd",
        "\0",
        "\\",
        "-",
        "~",
        "%2e",
        "語",
        " ",
        "\n",
        "loop",
    ]
    inside = 0
    for _ in range(1000):
        name = "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 7)))
        try:
            path = confined(root, name)
        except RequestError:
            continue
        inside += 1
        real = os.path.realpath(path)
        assert real.startswith(os.path.realpath(root) + os.sep), name
        assert "\0" not in real
    assert inside > 20
    for name in ("escape/etc", "up", "up/other", "escape", "", "inner/..", "inner//a", None, 3):
        with pytest.raises(RequestError):
            confined(root, name)
    assert confined(root, "inner/part-1.bin") == root / "inner" / "part-1.bin"


def test_status_is_written_in_place_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    run.lock()
    run.write_status("running", step=5)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run._disk, "write_json", full)
    run.write_status("running", step=6)
    run.write_status("failed", step=7, exit_code=70, reason="the disk is full")
    status = run.read_status()
    assert status is not None
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 7, 70)
    (run.path / "status.json").unlink()
    run.write_status("running", step=8)  # nothing to write over: the training goes on
    with pytest.raises(OSError, match="No space"):
        run.write_status("failed", exit_code=70)
    run.unlock()


def test_ranks_that_do_not_see_the_run_folder_are_refused(tmp_path: Path) -> None:
    """Ranks 1 and 3 have a disk of their own under the same name."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir()

    def work(member: Member, alone: tuple[int, ...]) -> str:
        try:
            refuse_separate_disks(own if member.rank in alone else shared, member, wait_seconds=0.1)
        except RequestError as refusal:
            return str(refusal)
        return ""

    (shared / ".seen-by-all-of-a-killed-start").touch()
    assert Threads(4).together(lambda member: work(member, ())) == [""] * 4
    said = Threads(4).together(lambda member: work(member, (1, 3)))
    assert len({text.replace(str(own), str(shared)) for text in said}) == 1
    assert re.search(r"is not seen by rank 1 \(.*\), 3 \(.*\): every rank writes its part", said[0])
    assert list(shared.iterdir()) == list(own.iterdir()) == []
