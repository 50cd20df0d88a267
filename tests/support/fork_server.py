"""Ranks for multi-process tests, without paying for the imports of each.

A fresh interpreter needs 4 to 6 s for torch, transformers, accelerate and DeepSpeed. Here one server process
imports them once and runs no torch operation; each rank is a fork of it. A fork is safe while the parent has
one thread: torch starts its thread pools at the first operation, so the server has none, and says so in every
rank's environment (``SERVER_THREADS``, checked by tests/support/test_fork_server.py).

Example::

    def work(rank_dependent: int) -> int:          # module-level, so that it is found by its name
        engine = Engine(TrainConfig(precision="fp32"))
        ...

    results = run_ranks(work, 2, 7)                # [result of rank 0, result of rank 1]

The rendezvous store lives in the calling process on a free port, so that parallel test runs never meet.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "numpy",
    "safetensors.torch",
    "transformers",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "deepspeed",
    "sentencepiece",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "train_lm",
    "lmcore.engine.engine",
    "lmcore.engine.sharded_init",
    "lmcore.run.trainer",
    "lmcore.run.finish",
    "lmcore.report.html",
    "lmcore.saved.card",
    "lmcore.saved.export",
)
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

_server: tuple[subprocess.Popen[bytes], socket.socket] | None = None


class RankFailure(AssertionError):
    """A rank raised, died or did not end in time; the message holds its traceback and its last output."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 240.0,
    env: Mapping[str, str] | None = None,
    launched: bool | None = None,
) -> list[Any]:
    """Run ``function(*args)`` in ``world_size`` processes; return what each returned, in rank order.

    Args:
        function: module-level; arguments and results must pickle (tensors travel by value).
        timeout: seconds for all of them together; then they are killed and :class:`RankFailure` is raised.
        env: variables for every rank, over those of this process.
        launched: whether the ranks see a launcher's variables (``RANK``, ``WORLD_SIZE``, ...); by default
            they do if there are several.
    """
    import torch.distributed as dist  # the server's own process must not pay for it before its preload

    launched = world_size > 1 if launched is None else launched
    payload = pickle.dumps((function.__module__, function.__qualname__, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        # Held here until all have ended; each rank is a client, as under torchrun's agent.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if launched else None
        pids = []
        for rank in range(world_size):
            variables = {**os.environ, **ONE_THREAD, **CPU_ONLY, **(env or {})}
            if store is not None:
                variables |= launcher_environment(rank, world_size, store.port)
            answer = Path(folder, f"{rank}.result")
            request = (
                payload,
                variables,
                sys.path,
                os.getcwd(),
                str(answer),
                str(Path(folder, f"{rank}.out")),
            )
            pids.append(_fork(pickle.dumps(request)))
        return _collect(function.__qualname__, folder, pids, timeout)


def launcher_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set for one rank of one machine whose agent holds the store at ``port``."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def free_port() -> int:
    """A port on which nobody listens, below those that the kernel hands out by itself: between this and its use no
    connection of anybody's can get it.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first, 20_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _collect(name: str, folder: str, pids: list[int], timeout: float) -> list[Any]:
    """Wait until every rank has answered, or one has failed, died or is late."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    try:
        while len(results) < len(pids):
            for rank, pid in enumerate(pids):
                if rank in results:
                    continue
                answer = Path(folder, f"{rank}.result")
                alive = _alive(pid)  # asked first: a rank that answers and ends in between is seen next time
                if answer.exists():
                    good, value = pickle.loads(answer.read_bytes())
                    if not good:
                        raise RankFailure(f"{name}: rank {rank} raised\n{value}{_output(folder, rank)}")
                    results[rank] = value
                elif not alive:
                    raise RankFailure(f"{name}: rank {rank} died{_output(folder, rank)}")
            if time.monotonic() > deadline:
                late = [rank for rank in range(len(pids)) if rank not in results]
                outputs = "".join(_output(folder, rank) for rank in late)
                raise RankFailure(f"{name}: ranks {late} did not end within {timeout:.0f} s{outputs}")
            time.sleep(0.005)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        give_up = time.monotonic() + 60
        while any(map(_alive, pids)) and time.monotonic() < give_up:
            time.sleep(0.001)  # until then they hold the lock of their run
    return [results[rank] for rank in range(len(pids))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _output(folder: str, rank: int) -> str:
    path = Path(folder, f"{rank}.out")
    text = path.read_text(errors="replace")[-4000:] if path.exists() else ""
    return f"\n--- last output of rank {rank} ---\n{text}" if text else ""


# ---- the server, seen from a test --------------------------------------------------------------------------


def _fork(request: bytes) -> int:
    """Ask the server, which is started at the first call, for one more rank; return its process id."""
    global _server
    if _server is None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, os.path.abspath(__file__), str(theirs.fileno())]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**os.environ, **ONE_THREAD, **CPU_ONLY}
        )
        theirs.close()
        _server = process, ours
        atexit.register(_stop)
    _, connection = _server
    connection.sendall(struct.pack("<Q", len(request)) + request)
    return struct.unpack("<Q", _receive(connection, 8))[0]


def _stop() -> None:
    if _server is not None:
        _server[1].close()
        _server[0].wait()


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the other side is gone")
        data += part
    return data


# ---- the server itself -------------------------------------------------------------------------------------


def threads_of_this_process() -> int:
    """Operating system threads (Linux)."""
    return len(os.listdir("/proc/self/task"))


def serve(connection: socket.socket) -> None:
    """Import everything, then fork one rank for each request until the test process is gone."""
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended ranks vanish at once
    threads = threads_of_this_process()
    gc.collect()
    gc.freeze()  # a rank's collector need not look at, and so copy, what was imported
    while True:
        try:
            request = _receive(connection, struct.unpack("<Q", _receive(connection, 8))[0])
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become_rank(request, threads)
        connection.sendall(struct.pack("<Q", pid))


def _become_rank(request: bytes, server_threads: int) -> None:
    """Run one function in this fork and leave; never returns."""
    payload, variables, path, folder, answer, output = pickle.loads(request)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _die_with_parent()
    os.environ.clear()
    os.environ.update(variables, SERVER_THREADS=str(server_threads))
    sys.path[:] = path
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        module, name, args = pickle.loads(payload)
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
        result = pickle.dumps((True, target(*args)))
    except BaseException:
        result = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    Path(answer + ".part").write_bytes(result)
    os.rename(answer + ".part", answer)
    os._exit(0)  # no exit handlers: they belong to the server's imports


def _die_with_parent() -> None:
    import ctypes  # only a rank needs it

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
