"""Whole runs of ``train_lm.py``, cheap enough to be killed by the thousand.

Imports are what a tiny run mostly consists of. The campaign's own process imports them once, runs no torch
operation (so it has one thread, and a fork of it is safe: tests/support/test_fork_server.py), and every rank of
every run is a fork that executes ``train_lm.py`` as ``__main__``. Only the launchers' own faults go through
real launchers.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from tests.support.fork_server import CPU_ONLY, ONE_THREAD, PRELOADED, free_port, threads_of_this_process

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "train_lm.py"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "lmcore").rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)
WORDS = [
    "the",
    "of",
    "a",
    "and",
    "lion",
    "mouse",
    "runs",
    "under",
    "river",
    "quickly",
    "日本",
    "語",
    "42",
    "def",
]


def preload() -> None:
    """Import what a run imports. Raises if that has left a second thread, which no fork would survive
    safely.
    """
    os.environ.update(ONE_THREAD | CPU_ONLY)
    for name in (*PRELOADED, "matplotlib.figure", *MODULES):
        importlib.import_module(name)
    _script()
    gc.collect()
    gc.freeze()  # what is imported stays: a fork need not look at it (0.2 s at its beginning), nor copy it
    if (threads := threads_of_this_process()) != 1:
        raise RuntimeError(f"{threads} threads after the imports")


@final
@dataclass(kw_only=True)
class Run:
    """One start of all ranks of a run."""

    pids: list[int]
    outputs: list[Path]
    begin: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)
    stalled: float = 0.0
    """Seconds in which the machine let not even :meth:`wait` run: nothing is judged by them."""

    def clock(self) -> float:
        """Seconds, for differences; without those in which the machine stood still while we waited."""
        return time.monotonic() - self.stalled

    def poll(self) -> bool:
        """Reap; True when all ranks have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = 120.0, *, until: Callable[[], bool] | None = None) -> bool:
        """Until all have ended, or ``until`` says so (then True); False when the time is up.

        As a launcher does: when one rank has failed, the others get 20 s, and are killed then.
        """
        give_up = self.clock() + seconds
        failed_at, next_look, before = None, 0.0, self.clock()
        while not self.poll():
            self.stalled += max(0.0, self.clock() - before - 0.5)
            now = before = self.clock()
            if until is not None and now >= next_look:
                if until():
                    return True
                next_look = self.clock() + 0.05  # looking reads files: it must not eat the run's own time
            if failed_at is None and any(code != 0 for code in self.codes.values()):
                failed_at = now
            if now > give_up or (failed_at is not None and now > failed_at + 20):
                if until is None:
                    self.kill()
                return False
            time.sleep(0.002)
        return until is None

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """A signal to these ranks (default: all) that are still there."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)

    def kill(self) -> None:
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        while not self.poll():
            time.sleep(0.002)

    def output(self, characters: int = 3000) -> str:
        """The last lines of every rank."""
        return "\n".join(path.read_text(errors="replace")[-characters:] for path in self.outputs)


def start(
    arguments: Sequence[str],
    *,
    logs: Path,
    world_size: int = 1,
    inject: Callable[[int], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Fork the ranks of one run; ``inject(rank)`` is called in each before the script begins."""
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    run = Run(pids=[], outputs=[])
    for rank in range(world_size):
        output = logs / f"rank-{rank}.out"
        variables = {
            **os.environ,
            **ONE_THREAD,
            **CPU_ONLY,
            "ACCELERATE_USE_CPU": "true",
            **(environment or {}),
        }
        if world_size > 1:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        pid = os.fork()
        if pid == 0:
            _become(arguments, variables, output, rank, inject)
        run.pids.append(pid)
        run.outputs.append(output)
    return run


def _become(
    arguments: Sequence[str],
    variables: Mapping[str, str],
    output: Path,
    rank: int,
    inject: Callable[[int], None] | None,
) -> None:
    """Be one rank; never returns. The end of the interpreter is played by hand, without the parent's
    frames.
    """
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(variables)
        weakref.finalize._registry.clear()  # the parent's temporary folders are not ours
        sys.argv = [str(SCRIPT), *arguments]
        sys.path.insert(0, str(ROOT))
        if inject is not None:
            inject(rank)
        try:
            main = types.ModuleType("__main__")
            main.__file__ = str(SCRIPT)
            sys.modules["__main__"] = main
            exec(_script(), vars(main))
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter does, with whoever has hung in
    finally:
        threading._shutdown()  # joins the threads that a real end would join
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@functools.cache
def _script() -> types.CodeType:
    """``train_lm.py``, read once: the rooms are those of the beginning of the campaign, so the script must
    be too.
    """
    return compile(SCRIPT.read_text(encoding="utf-8"), str(SCRIPT), "exec", dont_inherit=True)


# ---- the corpus and the runs -------------------------------------------------------------------------------


def write_corpus(path: Path, lines: int = 2000) -> None:
    """A small text in which there is something to learn; always the same."""
    state = 12345
    rows = []
    for _ in range(lines):
        row = []
        for _ in range(12):
            state = (state * 1103515245 + 12345) % (1 << 31)
            row.append(WORDS[(state >> 16) % len(WORDS)])
        rows.append(" ".join(row))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def base_arguments(place: Path, *, steps: int = 40, every: int = 5) -> list[str]:
    """A run of one or two seconds that uses every part: dropout, evaluation, background saves, retention."""
    return [
        *("--data.train", str(place / "corpus.txt"), "--data.store_dir", str(place / "token_stores")),
        *("--tokenizer.path", str(place / "tokenizer"), "--data.valid_fraction", "0.02"),
        *("--model.config", '{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}'),
        *("--data.block_size", "16", "--train.global_batch_blocks", "4", "--train.micro_batch_blocks", "2"),
        *("--train.duration", str(steps), "--checkpoint.every", str(every), "--checkpoint.keep", "2"),
        *("--evaluate.every", "15", "--evaluate.blocks", "8", "--evaluate.prompts", "[]"),
        *(
            "--report.every",
            "1",
            "--report.trackers",
            "[]",
            "--optim.lr",
            "3e-3",
            "--train.precision",
            "fp32",
        ),
    ]


def prepare(place: Path) -> None:
    """Corpus, tokenizer and token store, made once by a run of one step."""
    place.mkdir(parents=True, exist_ok=True)
    if (place / "ready").exists():
        return
    write_corpus(place / "corpus.txt")
    arguments = base_arguments(place, steps=1)
    cut = arguments.index("--tokenizer.path")
    arguments[cut : cut + 2] = ["--tokenizer.vocab_size", "300"]
    run = start([*arguments, "--run_dir", str(place / "first")], logs=place / "logs" / "first")
    if not run.wait(120) or run.codes != {0: 0}:
        raise RuntimeError(f"the first run failed: {run.output()}")
    (place / "first" / "tokenizer").rename(place / "tokenizer")
    (place / "ready").touch()


def recorded(place: Path, name: str, run: Callable[[Path], None]) -> dict[str, Any]:
    """What the undisturbed run called ``name`` came to, and its seconds; made once, by the trial that needs it first.

    Trials run side by side, each in a process of its own: the lock lets one of them train, and the record is of the code
    as it is now.

    Args:
        run: trains to the end in the folder that it is given, with its run folder ``run``.
    """
    name = f"{name}-{code_hash()}"
    with open(place / f"{name}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        path, folder = place / f"{name}.json", place / name
        if not path.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            begin = time.monotonic()
            run(folder)
            found = outcome(folder / "run") | {"seconds": time.monotonic() - begin}
            path.write_text(json.dumps(found))
    found = json.loads(path.read_text())
    for key in ("losses", "evaluations"):  # JSON has no numbers as keys
        found[key] = {int(step): row for step, row in found[key].items()}
    return {"run": folder / "run", **found}


@functools.cache
def code_hash() -> str:
    """Of the code that is hurt: what is expected of it is computed by itself."""
    digest = hashlib.sha256()
    for path in [SCRIPT, *sorted((ROOT / "lmcore").rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def outcome(run_dir: Path) -> dict[str, Any]:
    """What two runs are compared by: bit for bit."""
    return {"weights": weights(run_dir), "losses": losses(run_dir), "evaluations": evaluations(run_dir)}


def losses(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The last training record of every step, without what the clock decides."""
    records: dict[int, dict[str, Any]] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill; the step is logged again
        if record.get("kind") == "train":
            keys = ("step", "epoch", "tokens", "position", "loss", "lr", "grad_norm", "skipped_steps")
            records[record["step"]] = {key: record.get(key) for key in keys}
    return records


def evaluations(run_dir: Path) -> dict[int, float]:
    """The last evaluation of every step."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record.get("kind") == "eval":
                found[record["step"]] = record["loss"]
    return found


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """All events of this name."""
    found = []
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record.get("kind") == "event" and record.get("event") == name:
                found.append(record)
    return found


def committed_steps(run_dir: Path) -> list[int]:
    """The steps of the committed checkpoints."""
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())


def weights(run_dir: Path) -> dict[str, str]:
    """sha256 of every tensor file of the newest checkpoint: weights and optimizer, bit for bit."""
    newest = run_dir / "checkpoints" / f"step-{committed_steps(run_dir)[-1]:08d}"
    manifest = json.loads((newest / "manifest.json").read_text())
    tensors = {name: entry["sha256"] for name, entry in manifest["files"].items() if name != "state.json"}
    return tensors | {"step": str(manifest["step"])}


def status(run_dir: Path) -> dict[str, Any]:
    """``status.json``, or an empty dict."""
    try:
        return dict(json.loads((run_dir / "status.json").read_text()))
    except (OSError, ValueError):
        return {}
