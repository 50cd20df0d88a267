"""Environments in which programs break: each case is one whole run of ``train_lm.py``.

What an interpreter or a library looks at when it starts is tried with a fresh interpreter (``fresh``), the rest with a
fork of one that has the imports behind it (tests/faults/runs.py).

By default the run must finish with the same weights, losses and evaluations, bit for bit, as in a quiet environment.
Where it cannot, the exit code must be a documented one, the reason one line without a traceback, and ``status.json``
final (if anything could be written at all).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.faults import kinds, runs
from tests.faults.kinds import Trial
from tests.support.fork_server import CPU_ONLY, ONE_THREAD

LIMIT_SECONDS = 1200.0
FINISHED = (0,)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One environment.

    Attributes:
        name: in the table.
        env: variables over those of this process; ``None`` removes one. ``DIR`` is the folder of the trial.
        python: options of the interpreter.
        more: options of the run.
        child: called in the child before the interpreter starts.
        cwd: a folder to start in (``DIR`` as above); default: the repository.
        codes: allowed exit codes; where 0 is not among them the run must be refused or end early.
        says: part of what it then says.
        terminal: (rows, columns) of a terminal that it is connected to; default: files.
        run_dir: default ``DIR/run``.
        fresh: in a fresh interpreter; so are all cases with variables or options of the interpreter.
        other_strategy: what the environment asks for instead of a single process; the run must say it, and every loss
            may differ in the seventh digit (sums in another order), which is within 1e-6 of it.
        before: called with the folder of the trial first.
    """

    name: str
    env: Mapping[str, str | None] = field(default_factory=dict)
    python: Sequence[str] = ()
    more: Sequence[str] = ()
    child: Callable[[], object] | None = None
    cwd: str | None = None
    codes: tuple[int, ...] = FINISHED
    says: str = ""
    terminal: tuple[int, int] | None = None
    run_dir: str = "DIR/run"
    before: Callable[[Path], object] | None = None
    fresh: bool = False
    other_strategy: str = ""


def limit(what: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (value, value))


def close(*numbers: int) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            os.close(number)

    return act


def onto(path: str, *numbers: int) -> Callable[[], None]:
    def act() -> None:
        file = os.open(path, os.O_WRONLY)
        for number in numbers:
            os.dup2(file, number)

    return act


def gone_reader(*numbers: int) -> Callable[[], None]:
    """Pipes whose reader has ended."""

    def act() -> None:
        read, write = os.pipe()
        for number in numbers:
            os.dup2(write, number)
        os.close(read)

    return act


def head(*numbers: int) -> Callable[[], None]:
    """``| head -3``."""

    def act() -> None:
        process = subprocess.Popen(["head", "-3"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert process.stdin is not None
        for number in numbers:
            os.dup2(process.stdin.fileno(), number)

    return act


def ignore(*numbers: signal.Signals) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    return act


def block(*numbers: signal.Signals) -> Callable[[], None]:
    return lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers) and None


def user(number: int, *limits: tuple[int, int]) -> Callable[[], None]:
    """Another user: permissions count for it, and it may have no name."""

    def act() -> None:
        os.setgroups([])
        os.setgid(number)
        os.setuid(number)
        for what, value in limits:
            resource.setrlimit(what, (value, value))

    return act


def removed_cwd() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def for_all(folder: Path) -> None:
    folder.chmod(0o777)


def small_disk(size: str, inodes: int = 0) -> Callable[[], None]:
    """A file system of its own over ``DIR/disk``, seen by this child alone."""

    def act() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        new_mount_namespace, private = 0x00020000, (1 << 18) | (1 << 14)
        if libc.unshare(new_mount_namespace) or libc.mount(b"none", b"/", None, private, None):
            raise OSError(ctypes.get_errno(), "unshare")
        options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
        target = os.path.join(os.environ["FAULT_DIR"], "disk")
        os.makedirs(target, exist_ok=True)
        if libc.mount(b"tmpfs", target.encode(), b"tmpfs", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")

    return act


def can_mount() -> bool:
    """Whether this machine lets us mount a small file system."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with (
            contextlib.suppress(BaseException),
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ):
            os.environ["FAULT_DIR"] = folder
            small_disk("1m")()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def open_to_all(path: Path) -> bool:
    """Whether every user may start this program."""
    real = path.resolve()
    return all(folder.stat().st_mode & 0o001 for folder in (real, *real.parents, *path.parents))


GIB = 1 << 30
NO_GPU_WORDS = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
CASES: list[Case] = [
    # language
    Case(name="LANG=C", env={"LANG": "C", "LC_ALL": "C"}),
    Case(name="no LANG at all", env={"LANG": None, "LC_ALL": None, "LC_CTYPE": None}),
    Case(name="a locale that is not installed", env={"LC_ALL": "ja_JP.eucJP"}),
    Case(name="LC_ALL=POSIX, -X utf8=0", env={"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}, python=["-X", "utf8=0"]),
    Case(name="PYTHONIOENCODING=ascii", env={"PYTHONIOENCODING": "ascii"}),
    Case(name="PYTHONIOENCODING=utf-16", env={"PYTHONIOENCODING": "utf-16"}),
    Case(name="an unknown time zone", env={"TZ": "Nowhere/Town"}),
    # the interpreter
    Case(name="python -O", python=["-O"]),
    Case(name="python -OO", python=["-OO"], codes=(2,), says="strips docstrings"),
    Case(name="python -X dev", python=["-X", "dev"]),
    Case(name="python -E -s", python=["-E", "-s"]),
    Case(name="python -B -u", python=["-B", "-u"]),
    Case(name="PYTHONHASHSEED=123", env={"PYTHONHASHSEED": "123"}),
    Case(name="PYTHONPYCACHEPREFIX on /proc", env={"PYTHONPYCACHEPREFIX": "/proc/none"}),
    # places
    Case(name="no HOME", env={"HOME": None}),
    Case(name="HOME is empty", env={"HOME": ""}),
    Case(name="HOME does not exist", env={"HOME": "/nowhere/home"}),
    Case(name="HOME cannot be written", env={"HOME": "/proc"}),
    Case(name="HOME is a file", env={"HOME": "/etc/hostname"}),
    Case(name="TMPDIR is missing", env={"TMPDIR": "/nowhere/tmp"}),
    Case(name="TMPDIR cannot be written", env={"TMPDIR": "/proc"}),
    Case(name="TMPDIR is a file", env={"TMPDIR": "/etc/hostname"}),
    Case(name="LMCORE_CACHE cannot be written", env={"LMCORE_CACHE": "/proc/x"}),
    Case(name="LMCORE_CACHE is a file", env={"LMCORE_CACHE": "/etc/hostname"}),
    Case(name="XDG_CACHE_HOME is /dev/null", env={"XDG_CACHE_HOME": "/dev/null", "LMCORE_CACHE": None}),
    Case(name="HF_HOME cannot be written", env={"HF_HOME": "/proc/x"}),
    Case(name="MPLCONFIGDIR cannot be written", env={"MPLCONFIGDIR": "/proc/x"}),
    Case(name="the current folder is removed", child=removed_cwd, codes=(2,), says="current folder cannot be found"),
    Case(name="the current folder is /", cwd="/"),
    Case(name="a current folder with odd characters", cwd="DIR/a b'\"$(x)\n\x1b[31m"),
    Case(name="a run folder with odd characters", run_dir="DIR/r u'n\"$(x);&\x1b[31m"),
    Case(name="a run folder that is not UTF-8", run_dir="DIR/r\udcffn", codes=(2,), says="is not UTF-8"),
    Case(name="a run folder below a file", run_dir="/etc/hostname/run", codes=(2,)),
    Case(name="a run folder that cannot be written", run_dir="/proc/run", codes=(2,)),
    # rights and limits
    Case(name="umask 077", child=lambda: os.umask(0o077)),
    Case(name="umask 000", child=lambda: os.umask(0)),
    Case(name="umask 0777", child=lambda: os.umask(0o777)),
    Case(name="another user with a folder of its own", child=user(65534), before=for_all, env={"HOME": "/nowhere"}),
    Case(name="a user without a name", child=user(54321), before=for_all, env={"HOME": None, "USER": None, "LOGNAME": None}),
    Case(name="a user who may not write the run folder", child=user(54321), codes=(2,), env={"HOME": "/nowhere"}),
    Case(name="a user who may start 20 threads", child=user(54322, (resource.RLIMIT_NPROC, 20)), before=for_all, codes=(0, 1, 70)),
    Case(name="64 open files", child=limit(resource.RLIMIT_NOFILE, 64)),
    Case(name="32 open files", child=limit(resource.RLIMIT_NOFILE, 32)),
    Case(name="32 open files and two workers", child=limit(resource.RLIMIT_NOFILE, 32), more=["--data.workers", "2"]),
    Case(name="address space of 8 GiB", child=limit(resource.RLIMIT_AS, 8 * GIB)),
    Case(name="address space of 3 GiB", child=limit(resource.RLIMIT_AS, 3 * GIB)),
    Case(name="files of at most 30 KB", child=limit(resource.RLIMIT_FSIZE, 30_000), codes=(70,)),
    Case(name="no locked memory", child=limit(resource.RLIMIT_MEMLOCK, 0)),
    Case(name="a stack of 1 MiB", child=limit(resource.RLIMIT_STACK, 1 << 20)),
    Case(name="nice 19, one core", child=lambda: (os.nice(19), os.sched_setaffinity(0, {0}))),
    # output and input
    Case(name="stdout closed", fresh=True, child=close(1)),
    Case(name="stderr closed", fresh=True, child=close(2)),
    Case(name="stdin closed", fresh=True, child=close(0)),
    Case(name="all three closed", fresh=True, child=close(0, 1, 2)),
    Case(name="stdout is /dev/full", child=onto("/dev/full", 1)),
    Case(name="stdout and stderr are /dev/full", child=onto("/dev/full", 1, 2)),
    Case(name="| head -3", child=head(1)),
    Case(name="2>&1 | head -3", child=head(1, 2)),
    Case(name="the reader of stdout and stderr has ended", child=gone_reader(1, 2)),
    Case(name="a terminal of one column", terminal=(1, 1)),
    Case(name="a terminal of 0 x 0", terminal=(0, 0)),
    Case(name="a terminal of 12 columns", terminal=(5, 12), env={"TERM": "xterm-256color"}),
    Case(name="a terminal of 5,000 columns", terminal=(400, 5000)),
    Case(name="a terminal, TERM=dumb", terminal=(24, 80), env={"TERM": "dumb"}),
    Case(name="a terminal, no TERM", terminal=(24, 80), env={"TERM": None}),
    Case(name="COLUMNS=abc, LINES=-1", env={"COLUMNS": "abc", "LINES": "-1"}),
    Case(name="COLUMNS=0 on a terminal", terminal=(24, 80), env={"COLUMNS": "0"}),
    Case(name="FORCE_COLOR and NO_COLOR", env={"FORCE_COLOR": "1", "NO_COLOR": "1"}),
    # signals
    Case(name="nohup", child=ignore(signal.SIGHUP)),
    Case(name="SIGINT, SIGTERM and SIGUSR1 ignored", child=ignore(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)),
    Case(name="SIGCHLD ignored, two workers", child=ignore(signal.SIGCHLD), more=["--data.workers", "2"]),
    Case(name="SIGTERM and SIGCHLD blocked", child=block(signal.SIGTERM, signal.SIGCHLD)),
    # launchers' variables without a launcher
    Case(name="TORCHELASTIC_* left over", env=NO_GPU_WORDS),
    Case(name="TORCHELASTIC_RESTART_COUNT=3", env={"TORCHELASTIC_RESTART_COUNT": "3"}),
    Case(name="TORCHELASTIC_RESTART_COUNT=x", env={"TORCHELASTIC_RESTART_COUNT": "x"}, codes=(0, 2)),
    Case(name="RANK=0 alone", env={"RANK": "0"}, codes=(0, 2)),
    Case(name="LOCAL_RANK=0 alone", env={"LOCAL_RANK": "0"}, codes=(0, 2)),
    Case(name="WORLD_SIZE=2 without an address", env={"WORLD_SIZE": "2", "RANK": "0"}, codes=(2,)),
    Case(name="RANK=x", env={"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, codes=(2,)),
    Case(name="RANK beyond WORLD_SIZE", codes=(2,),
         env={"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}),
    Case(name="WORLD_SIZE=1 with an address",
         env={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}),
    Case(name="ACCELERATE_MIXED_PRECISION=fp16", env={"ACCELERATE_MIXED_PRECISION": "fp16"}, codes=(0, 2)),
    Case(name="ACCELERATE_USE_DEEPSPEED without a file", env={"ACCELERATE_USE_DEEPSPEED": "true"}, other_strategy="zero2"),
    Case(name="inside a Slurm allocation, without srun",
         env={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}),
    Case(name="mpirun's variables", env={"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}),
    # libraries
    Case(name="CUDA_VISIBLE_DEVICES=0,1 without GPUs", env={"CUDA_VISIBLE_DEVICES": "0,1"}),
    Case(name="OMP_NUM_THREADS=x", env={"OMP_NUM_THREADS": "x"}, codes=(0, 2)),
    Case(name="a proxy that is none", env={"http_proxy": "x:y", "https_proxy": "http://127.0.0.1:1", "no_proxy": ""}),
    Case(name="LD_PRELOAD of nothing", env={"LD_PRELOAD": "/nowhere/x.so"}),
    Case(name="MALLOC_PERTURB_", env={"MALLOC_PERTURB_": "85"}),
    Case(name="TORCH_LOGS and TORCH_SHOW_CPP_STACKTRACES", env={"TORCH_LOGS": "+all", "TORCH_SHOW_CPP_STACKTRACES": "1"}),
]  # fmt: skip
ON_SMALL_DISKS = [
    Case(name=f"a disk of {size}", child=small_disk(size), run_dir="DIR/disk/run", codes=codes)
    for size, codes in (("64k", (2, 70)), ("256k", (70,)), ("400k", (70,)), ("600k", (70,)), ("64m", FINISHED))
] + [
    Case(name="a disk of 12 files", child=small_disk("64m", 12), run_dir="DIR/disk/run", codes=(2, 70)),
    Case(name="a disk of 30 files", child=small_disk("64m", 30), run_dir="DIR/disk/run", codes=(0, 70)),
    Case(name="token stores on a disk of 64k", child=small_disk("64k"), codes=(2,),
         more=["--data.store_dir", "DIR/disk/stores"]),
]  # fmt: skip
CASES += ON_SMALL_DISKS
"""Needs the right to mount; without it these trials say so and count nothing."""
CASES.sort(key=lambda case: bool(case.fresh or case.python or case.env))  # the quick ones first


def trial(place: Path, number: int, folder: Path) -> Trial:
    """Case ``number``: one whole run."""
    from benchmarks.faults import kills

    case = CASES[number]
    if case in ON_SMALL_DISKS and not can_mount():
        return Trial(note=f"{case.name}: not run, no right to mount", counts={"not run": 1})
    if "user" in case.name.split() and not open_to_all(Path(sys.executable)):
        return Trial(
            note=f"{case.name}: not run, others may not start this interpreter", counts={"not run": 1}
        )
    wanted = kills.expected(place, "single", False)
    for path in (folder, place):
        path.chmod(0o755)

    def here(text: str) -> str:
        return text.replace("DIR", str(folder))

    if case.before is not None:
        case.before(folder)
    environment = {
        **os.environ,
        **ONE_THREAD,
        **CPU_ONLY,
        "LMCORE_CACHE": str(folder / "cache"),
        "FAULT_DIR": str(folder),
    }
    for name, value in case.env.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    run_dir = here(case.run_dir)
    words = [*runs.base_arguments(place, steps=kinds.STEPS, every=kinds.SAVE_EVERY), "--run_dir", run_dir]
    words += [here(word) for word in case.more]
    os.environ["FAULT_DIR"] = str(folder)
    cwd = here(case.cwd) if case.cwd else str(runs.ROOT)
    os.makedirs(cwd, exist_ok=True)
    output = folder / "output"
    begin = time.monotonic()
    if case.fresh or case.python or case.env:
        command = [sys.executable, *case.python, str(runs.SCRIPT), *words]
        code = run_fresh(command, case, environment, cwd, output)
    else:
        code = run_forked(words, case, environment, cwd, folder)
    text = output.read_bytes().decode(errors="replace") if output.exists() else ""
    said = f"{case.name}: exit code {code} after {time.monotonic() - begin:.0f} s: {text[-2500:]}"
    assert code in case.codes, said
    assert "Traceback (most recent call last)" not in text, said
    assert case.says in text, said
    if code == 0 and case.other_strategy:
        assert re.search(rf"strategy +{case.other_strategy}\n", text), said
        found = runs.outcome(Path(run_dir))
        assert found["losses"].keys() == wanted["losses"].keys(), said
        for step, row in found["losses"].items():
            other = wanted["losses"][step]
            assert row["position"] == other["position"], f"{case.name}: step {step}: {row}, not {other}"
            assert math.isclose(row["loss"], other["loss"], rel_tol=1e-6), (
                f"{case.name}: step {step}: {row}, not {other}"
            )
    elif code == 0 and "/disk/" not in run_dir:
        found = runs.outcome(Path(run_dir))
        for name in ("losses", "evaluations", "weights"):
            assert found[name] == wanted[name], f"{case.name}: {name} differ: {said}"
        state = runs.status(Path(run_dir))
        assert (state["state"], state["exit_code"]) == ("finished", 0), f"{case.name}: {state}"
    elif code != 0:
        assert text.strip(), f"{case.name}: it ended with {code} without a word"
        state = runs.status(Path(run_dir))
        assert state.get("state", "failed") == "failed", f"{case.name}: {state}"
    ending = f"ended with {code}" if code else "finished bit-equal"
    if code == 0 and case.other_strategy:
        ending = "finished, equal to 1e-6"
    return Trial(
        note=case.name,
        counts={"environments": 1, ending: 1},
    )


def run_fresh(command: list[str], case: Case, environment: dict[str, str], cwd: str, output: Path) -> int:
    """In a fresh interpreter, with files or a terminal of its own."""
    with open(output, "wb") as file:
        if case.terminal is None:
            process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=case.child
            )  # fmt: skip
            try:
                return process.wait(LIMIT_SECONDS)
            finally:
                process.kill()
                process.wait()
        main, other = terminal_of(case.terminal)
        with os.fdopen(other, "rb+", buffering=0) as end:
            process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=end, stdout=end, stderr=end, start_new_session=True
            )
        give_up = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and time.monotonic() < give_up:
            drain(main, file)
        drain(main, file)
        process.kill()
        return process.wait()


def run_forked(words: list[str], case: Case, environment: dict[str, str], cwd: str, folder: Path) -> int:
    """In a fork of this process, which has the imports behind it."""
    ends = terminal_of(case.terminal) if case.terminal else None

    def inject(_rank: int) -> None:
        os.chdir(cwd)
        if ends is not None:
            os.setsid()
            fcntl.ioctl(ends[1], termios.TIOCSCTTY, 0)
            for number in (0, 1, 2):
                os.dup2(ends[1], number)
        if case.child is not None:
            case.child()

    logs = folder / "logs"
    run = runs.start(words, logs=logs, inject=inject, environment=environment)
    with open(folder / "output", "wb") as file:
        if ends is None:
            run.wait(LIMIT_SECONDS)
        else:
            os.close(ends[1])
            give_up = time.monotonic() + LIMIT_SECONDS
            while not run.poll() and time.monotonic() < give_up:
                drain(ends[0], file)
            drain(ends[0], file)
            run.kill()
        file.write((logs / "rank-0.out").read_bytes())
    return run.codes[0]


def terminal_of(size: tuple[int, int]) -> tuple[int, int]:
    """A terminal of so many rows and columns: our end, its end."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    return main, other


def drain(terminal: int, file: IO[bytes]) -> None:
    """What came in the last moment goes to the file: a full terminal would hold its writer up."""
    ready, _, _ = select.select([terminal], [], [], 0.05)
    while ready:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # its other end is closed
            time.sleep(0.02)
            return
        file.write(data)
        ready, _, _ = select.select([terminal], [], [], 0)
