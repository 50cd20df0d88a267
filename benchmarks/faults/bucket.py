"""Kills and faults of the store, done to a run folder in a bucket: is a checkpoint ever lost, or of mixed files?

    python -m benchmarks.faults.bucket --kills 500 --faults 2000
    python -m benchmarks.faults.bucket --kills 10000 --faults 50000       # hours; goes on where the record ends

Started twice, it shares the work by the record.

A real S3 server on the loopback interface (moto), behind a proxy that injects 500, 503, lost answers, time-outs, torn
and shortened uploads, torn and flipped downloads, listings of an earlier moment, and a clock that is a day off. In each
trial a machine takes the lease, fetches the newest checkpoint, saves and uploads some steps, and is killed at a random
request, before or after it is carried out. Half of the machines leave their disk to the next one, the others take it
with them. A machine is a process that is forked, and its end is SIGKILL: nothing of it runs after that. It uploads in the
thread that saves, so that a trial depends on its number alone; kills of the disk's calls are tests/checkpoint's, and kills
of whole training runs are tests/e2e's.

Lost: a machine finds an older checkpoint than the last whose upload was reported as done. Mixed: the manifest of a
checkpoint in the bucket and its files do not belong together, or a machine resumes from other weights than were saved.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.session
import fsspec
from s3fs import S3FileSystem

from lmcore.checkpoint.manifest import committed, step_of
from lmcore.checkpoint.reader import open_checkpoint
from lmcore.run.bucket import Bucket
from lmcore.run.lease import Lease
from lmcore.storage import Store
from tests.support.fork_server import ONE_THREAD, threads_of_this_process
from tests.support.s3_server import KINDS, Faults, environment, serving
from tests.support.small_checkpoints import expected_weights, save

RECORD = Path(__file__).with_name("bucket.json")
SHARE = 0.12
"""Of all requests meet a fault."""
MOST_REQUESTS = 60
PART_KILLS, PART_FAULTS, PART_TRIALS = 50, 200, 1000
"""After so many kills and faults the record is written, and a bucket is begun anew. Part k has the trials from 1000 k on."""
READ_SECONDS = 0.5
"""What a machine waits for an answer. Shorter than a user has it, so that there is time for many trials: the tries are those
of lmcore."""
FORK = multiprocessing.get_context("fork")


# ---- a machine


def die_at(number: int, *, after: bool) -> None:
    """In a machine: be killed at the request of this number, before or after it is carried out."""
    count, real = 0, Store._try

    def attempt(store: Store, what: str, call: Any, **options: Any) -> Any:
        nonlocal count
        here, count = count, count + 1
        if here != number:
            return real(store, what, call, **options)
        if after:
            with contextlib.suppress(FileNotFoundError):  # an answer, too
                real(store, what, call, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("SIGKILL returned")

    Store._try = attempt


def bucket_of(name: str, local: Path) -> Bucket:
    """The run folder as the machine of this name has it, without threads."""
    store = Store("s3://bucket/run", attempts=40, sleep=lambda _: None)
    lease = Lease(store, note=lambda _: None, beat_seconds=0.01, silent_beats=1)
    lease.holder |= {"host": name, "boot": name, "job_id": None}
    lease.start = lambda: None
    return Bucket(store.url, local, keep=2, note=lambda _: None, store=store, lease=lease)


def live(number: int, local: Path, acknowledged: int, report: Any) -> None:
    """What a machine does until it is killed. ``report`` gets what it found, and each step whose upload is done."""
    draw = random.Random(f"machine {number}")
    die_at(draw.randrange(MOST_REQUESTS), after=draw.random() < 0.5)
    bucket = bucket_of(f"machine-{number}", local)
    bucket.open()
    bucket.fetch("auto")
    steps = [step_of(path) for path in committed(local / "checkpoints")]
    newest = steps[-1] if steps else 0
    report({"lost": newest < acknowledged, "mixed": bool(newest) and not _is_of_step(local, newest)})
    bucket.abandon_after(newest if newest else -1)
    for step in range(newest + 1, newest + 4):
        save(local / "checkpoints", step, keep=2)
        bucket._pass(False)
        report({"acknowledged": step})
    bucket.close(limit_seconds=5)


def _is_of_step(local: Path, step: int) -> bool:
    with open_checkpoint(local / "checkpoints" / f"step-{step:08d}") as opened:
        for name, tensor in expected_weights(step).items():
            found = opened.read("model", name)
            if found is None or not bool((found == tensor).all()):
                return False
    return True


def fork_machine(number: int, local: Path, acknowledged: int) -> tuple[int, list[dict[str, Any]]]:
    """The exit code of a machine, and its reports."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reading)

            def report(value: dict[str, Any]) -> None:
                os.write(writing, json.dumps(value).encode() + b"\n")

            try:
                live(number, local, acknowledged, report)
                code = 0
            except BaseException:
                report({"error": traceback.format_exc()[-3000:]})
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as file:
        reports = [json.loads(line) for line in file]
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), reports


# ---- the store, in a process of its own: those that fork machines have one thread


def serve(pipe: Any) -> None:
    """Answer (number of a trial, clock skew) by starting its faults, and ``None`` by the faults done and the mixed
    checkpoints."""
    with serving() as server:
        server.timeout_seconds = READ_SECONDS + 0.1
        pipe.send(server.url)
        while True:
            try:
                number, server.skew_seconds = pipe.recv()
            except EOFError:
                return
            # A time-out takes as long as many other faults: every third trial has some.
            kinds = tuple(kind for kind in KINDS if kind != "timeout" or number % 3 == 0)
            faults = server.faults = Faults(seed=number, share=SHARE, kinds=kinds)
            pipe.send(None)
            pipe.recv()
            server.faults = None
            pipe.send((dict(faults.done), _mixed(server.objects)))


def _mixed(objects_of: Any) -> int:
    """How many manifests in the bucket name a file that is not there or has other content."""
    while True:
        with contextlib.suppress(RuntimeError):  # a last request of the killed machine arrives meanwhile
            objects = objects_of()
            break
    wrong = 0
    for name, data in objects.items():
        folder, _, last = name.rpartition("/")
        if last == "manifest.json":
            files = json.loads(data)["files"]
            found = {file: hashlib.sha256(objects.get(f"{folder}/{file}", b"")).hexdigest() for file in files}
            wrong += any(found[file] != entry["sha256"] for file, entry in files.items())
    return wrong


@contextlib.contextmanager
def store_process() -> Iterator[Any]:
    """A pipe to a running :func:`serve`; the environment leads to its server."""
    if (threads := threads_of_this_process()) != 1:
        raise RuntimeError(f"{threads} threads: a fork would not survive them safely")
    here, there = FORK.Pipe()
    process = FORK.Process(target=serve, args=(there,))
    process.start()
    there.close()
    os.environ.update(environment(here.recv()))
    try:
        yield here
    finally:
        here.close()
        process.kill()
        process.join()


def prepare() -> None:
    """What every machine needs, done once: its driver's options and descriptions."""
    fsspec.config.conf["s3"] = {"config_kwargs": {"connect_timeout": 2, "read_timeout": READ_SECONDS}}
    S3FileSystem.retries = 1
    loader = botocore.loaders.JSONFileLoader
    load, read = loader.load_file, loader()
    once = functools.cache(lambda path: load(read, path))
    loader.load_file = lambda self, path: once(path)
    botocore.session.get_session().create_client("s3", region_name="us-east-1")


# ---- the campaign


def campaign(kills: int, faults: int, *, first: int = 0, max_seconds: float = float("inf")) -> dict[str, Any]:
    """Trials from number ``first`` on, until so many kills and faults are done. Returns the counts."""
    total: dict[str, Any] = {"trials": 0, "kills": 0, "lost": 0, "mixed": 0, "steps": 0}
    kinds: Counter[str] = Counter()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bucket-") as home, store_process() as store:
        prepare()
        local, acknowledged = Path(home) / "disk", 0
        while total["kills"] < kills or sum(kinds.values()) < faults:
            if time.monotonic() - begin > max_seconds:
                break
            number = first + total["trials"]
            draw = random.Random(number)
            if draw.random() < 0.5:
                shutil.rmtree(local, ignore_errors=True)
            store.send((number, draw.choice([-86_400.0, 0.0, 86_400.0])))
            store.recv()
            code, reports = fork_machine(number, local, acknowledged)
            store.send(None)
            done, mixed = store.recv()
            if code not in (0, -signal.SIGKILL):
                raise RuntimeError(f"trial {number} ended with code {code}: {reports}")
            kinds.update(done)
            total["trials"] += 1
            total["kills"] += code == -signal.SIGKILL
            total["mixed"] += mixed
            for report in reports:
                total["lost"] += report.get("lost", 0)
                total["mixed"] += report.get("mixed", 0)
                acknowledged = report.get("acknowledged", acknowledged)
        total["steps"] = acknowledged
    return {**total, "faults": dict(sorted(kinds.items())), "seconds": round(time.monotonic() - begin, 1)}


@contextlib.contextmanager
def record_of(path: Path) -> Iterator[dict[str, Any]]:
    """The record, to be changed; by one process at a time."""
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = json.loads(path.read_text()) if path.exists() else {"parts": []}
        record.setdefault("begun", len(record["parts"]))
        yield record
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text(json.dumps(record, indent=1) + "\n")
        aside.rename(path)
    finally:
        os.close(lock)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults.bucket", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--faults", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time; resumable")
    parser.add_argument("--record", type=Path, default=RECORD, help="JSON file that the counts are added to")
    options = parser.parse_args()
    if any(os.environ.get(name) != count for name, count in ONE_THREAD.items()):
        # Again from the start: threads of numpy would not survive a fork.
        os.environ.update(ONE_THREAD)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.faults.bucket", *sys.argv[1:]])
    end = time.monotonic() + 60 * options.minutes
    while True:
        with record_of(options.record) as record:
            done = record["parts"]
            kills = options.kills - sum(part["kills"] for part in done)
            faults = options.faults - sum(sum(part["faults"].values()) for part in done)
            if (kills <= 0 and faults <= 0) or time.monotonic() >= end:
                break
            number = record["begun"]
            record["begun"] += 1  # also where this part is cut off: its numbers are not used twice
        found = campaign(
            min(kills, PART_KILLS),
            min(faults, PART_FAULTS),
            first=number * PART_TRIALS,
            max_seconds=end - time.monotonic(),
        )
        part = {
            "first": number * PART_TRIALS,
            **found,
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
            "versions": {name: version(name) for name in ("torch", "fsspec", "s3fs", "moto")},
        }
        with record_of(options.record) as record:
            record["parts"].append(part)
        print(json.dumps(found), flush=True)
    return 1 if any(part["lost"] or part["mixed"] for part in done) else 0


if __name__ == "__main__":
    sys.exit(main())
