"""SIGKILL of ``prepare``: whatever was killed, the token store that comes out is byte for byte the same.

The parts of the corpus are plain and compressed files of several formats; one or two processes build the store
together, as ranks do. A kill comes at a random moment, or at a call that changes the disk.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import runs
from tests.faults.kinds import Trial

FILES, PART_BYTES = 24, 3000


def write_texts(folder: Path) -> None:
    """Text, JSON lines, and both compressed; of different sizes, always the same."""
    folder.mkdir(parents=True)
    for number in range(FILES):
        path = folder / f"{number:03}.txt"
        runs.write_corpus(path, 40 + 17 * number)
        text = path.read_text(encoding="utf-8")
        if number % 4 >= 2:
            path.unlink()
            path = path.with_suffix(".jsonl")
            lines = text.splitlines()
            path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
        if number % 2:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            path.unlink()


def build(place: Path, stores: Path, worker: int) -> None:
    """What ``prepare`` does, with small parts, with the texts beside ``stores``."""
    from lmcore.data.store import build as tokens
    from lmcore.data.text import documents as text
    from lmcore.data.tokenizer.tokenizer import load_tokenizer

    [source] = text.resolve_sources([{"path": str(stores.parent / "texts"), "name": "texts"}])
    tokens.build_store(
        source, load_tokenizer(place / "tokenizer"), store_dir=stores, worker=worker, part_bytes=PART_BYTES
    )


def start(place: Path, stores: Path, workers: int, inject: Callable[[int], None] | None = None) -> runs.Run:
    """Fork the processes that build a store together."""
    stores.parent.mkdir(parents=True, exist_ok=True)
    run = runs.Run(pids=[], outputs=[])
    for worker in range(workers):
        output = stores.with_name(f"{stores.name}-{worker}.out")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
                if inject is not None:
                    inject(worker)
                build(place, stores, worker)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        run.pids.append(pid)
        run.outputs.append(output)
    return run


def at_call(number: int) -> Callable[[int], None]:
    """Worker 0 kills itself before call ``number`` of those that change the disk."""

    def inject(worker: int) -> None:
        from lmcore import disk as files

        count = 0

        def before(_call: Any) -> None:
            nonlocal count
            if worker == 0 and count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        files.DISK.before = before

    return inject


def contents(stores: Path) -> dict[str, bytes]:
    """Every file of the store, leftovers included."""
    return {
        str(path.relative_to(stores)): path.read_bytes()
        for path in sorted(stores.rglob("*"))
        if path.is_file()
    }


def undisturbed(place: Path, folder: Path) -> tuple[dict[str, bytes], float]:
    """Texts in ``folder``, the store of them that nobody disturbed, and how long it takes.

    In a folder of the trial's own: other trials run at the same time.
    """
    write_texts(folder / "texts")
    run = start(place, folder / "undisturbed-stores", 1)
    assert run.wait(120), run.output()
    assert run.codes == {0: 0}, run.output()
    return contents(folder / "undisturbed-stores"), time.monotonic() - run.begin


def prepare_killed(place: Path, seed: int, folder: Path) -> Trial:
    """Killed one to five times, started again each time by one or two processes: no byte is another one."""
    draw, trial = random.Random(seed), Trial()
    expected, seconds = undisturbed(place, folder)
    stores = folder / "stores"
    done = 0
    for _ in range(draw.randrange(1, 6)):
        workers = draw.choice([1, 1, 2])
        targeted = draw.random() < 0.5
        run = start(place, stores, workers, at_call(draw.randrange(250)) if targeted else None)
        if not targeted:
            run.wait(draw.uniform(0.0, seconds), until=lambda: False)
            run.send(signal.SIGKILL, draw.choice([None, [0]]))
        assert run.wait(120), run.output()
        assert set(run.codes.values()) <= {0, -9}, f"{run.codes}: {run.output()}"
        trial.count("kills", sum(code == -9 for code in run.codes.values()))
        parts = len(list(stores.glob("*/part-*.json")))
        assert parts >= done or list(stores.glob("*/manifest.json")), (
            f"{done} parts were finished, {parts} are left"
        )
        done = parts
    run = start(place, stores, draw.choice([1, 2]))
    assert run.wait(120), run.output()
    assert set(run.codes.values()) == {0}, f"{run.codes}: {run.output()}"
    found = contents(stores)
    assert found.keys() == expected.keys(), f"{sorted(found.keys() ^ expected.keys())}"
    assert found == expected, f"{[name for name in found if found[name] != expected[name]]} differ"
    return trial
