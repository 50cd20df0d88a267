"""Which process builds which part of a token store, and how a part is built.

A part is complete or does not exist. A claim only avoids duplicate work (two processes that build the same part write the
same bytes); that of a dead process is taken over, and a failure is written to a file that every process checks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np

from lmcore.data.store.claims import Claim, aside, claimed, now_of, raise_failure, write_failure
from lmcore.data.store.manifest import encoded, sealed
from lmcore.data.store.remote import RemoteFolder
from lmcore.data.text import documents as text
from lmcore.data.text import hub, split
from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError
from lmcore.humanize import amount

BATCH_CHARACTERS = 1 << 20
"""Text that is encoded in one call: enough to keep the tokenizer's threads busy, little enough to keep memory constant."""
COUNTS = (
    *("tokens", "documents", "bytes"),  # on the side of the split that the store keeps
    *("records", "record_bytes", "empty"),  # over all documents that were read
    # Bad or lost documents, and the number of places at which their number is unknown.
    *("bad", "bad_bytes", "bad_places", "bad_unknown"),
)
"""The counts of each part."""
KEPT_BAD_RECORDS = 100
"""The most bad records of one part that are saved with their place; all are counted."""


class EncodesBatches(Protocol):
    """The required interface of a tokenizer (:class:`lmcore.data.tokenizer.tokenizer.Tokenizer`)."""

    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]: ...


@final
@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the parts of one store are, over all processes and ranks."""

    read_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    bad: int
    parts: int
    total_parts: int

    def words(self) -> str:
        """The counts of documents, tokens and bad records, in words."""
        bad = f", {amount(self.bad, 'bad record')}" if self.bad else ""
        return f"{amount(self.documents, 'document')}, {amount(self.tokens, 'token')}{bad}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a process needs to build any part of a store."""

    source: text.Source
    tokenizer: EncodesBatches
    folder: Path
    parts: tuple[text.Part, ...]
    eos: bool
    split: split.Split
    on_error: str
    dtype: str
    keys: tuple[str, ...]
    remote: RemoteFolder | None = None
    """The store in a bucket of which ``folder`` is a copy, if any."""

    def look(self, *, now: bool = False) -> None:
        """Fetch the descriptions of parts that other machines have built."""
        if self.remote is not None:
            keys = {part_file(part.index): key for part, key in zip(self.parts, self.keys)}
            self.remote.look(keys, now=now)


def part_file(index: int) -> str:
    return f"part-{index:06d}"


def is_done(job: Job, index: int) -> bool:
    return (job.folder / f"{part_file(index)}.json").exists()


def commit(path: Path, data: bytes) -> None:
    """Write a file atomically and durably; several processes may write the same one."""
    DISK.write_file(aside(path), data)
    DISK.rename(aside(path), path)
    DISK.fsync_dir(path.parent)


# ---- who builds which part ----


def build_all(job: Job, processes: int, worker: int, progress: Callable[[Progress], None] | None) -> None:
    """Return when every part exists, whichever process built it."""
    report = _Reporter(job, progress)
    job.look(now=True)
    pending = [part.index for part in job.parts if not is_done(job, part.index)]
    processes = min(processes, len(pending))
    started = now_of(job.folder)
    if processes <= 1:
        _build_pending(job, started, worker, report)
        return
    payload = pickle.dumps((job, started))
    children = [_start_child(payload, worker * processes + number) for number in range(processes)]
    try:
        while any(child.poll() is None for child in children):
            time.sleep(0.2)
            report()
            for child in children:
                if child.poll():
                    raise_failure(job.folder, started)
                    raise FaultError(
                        f"a tokenizing process ended with code {child.returncode}"
                        f"{' (out of memory?): lower data.processes' if child.returncode == -9 else ''}; "
                        f"the finished parts are kept"
                    )
    finally:
        for child in children:
            child.kill()  # safe: a part is complete or does not exist
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
    _build_pending(job, started, worker, report)


_CHILD = "import sys; from lmcore.data.store.workers import child_main; child_main()"


def _start_child(payload: bytes, number: int) -> subprocess.Popen[bytes]:
    """Start a tokenizing process.

    Not by a fork, which would lose threads of torch or of a tokenizer in this process. Not by multiprocessing's spawn,
    which would import the main script and so torch again, for seconds."""
    root = str(Path(__file__).resolve().parents[3])
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment.setdefault("RAYON_NUM_THREADS", "1")  # the parallelism comes from processes
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(number), *sys.path], stdin=subprocess.PIPE, env=environment
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code is checked later
        child.stdin.write(len(payload).to_bytes(8, "little") + payload)
        child.stdin.flush()
    return child


def child_main() -> None:
    """The main function of a tokenizing process, which ends with its parent; the parent handles signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    number, sys.path[:] = int(sys.argv[1]), sys.argv[2:]
    job, started = pickle.loads(sys.stdin.buffer.read(size))

    def end_with_parent() -> None:
        sys.stdin.buffer.read(1)  # returns when the parent is gone
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = 0
    try:
        _build_pending(job, started, number, _Reporter(job, None))
    except (RequestError, FaultError, OSError):
        code = 3  # the failure is already saved, and the parent raises it
    os._exit(code)


def _build_pending(job: Job, started: float, number: int, report: _Reporter) -> None:
    """Build one part after another until all exist; each process starts at a different part."""
    count = len(job.parts)
    first = number * 7919 % max(count, 1)  # a prime stride spreads processes over parts without communication
    while True:
        waiting = False
        job.look()
        for step in range(count):
            index = (first + step) % count
            if is_done(job, index):
                continue
            raise_failure(job.folder, started)
            with claimed(job.folder / f"{part_file(index)}.claim") as mine:
                if mine and not is_done(job, index):
                    try:
                        waiting |= not _build_for_all(job, index, mine, report)
                    except (FaultError, RequestError, OSError) as error:
                        write_failure(job.folder, error)
                        raise
                else:
                    waiting = True
        report()
        if not waiting and all(is_done(job, part.index) for part in job.parts):
            return
        time.sleep(0.2)


def _build_for_all(job: Job, index: int, claim: Claim, report: _Reporter) -> bool:
    """Build a part, and upload it if the store is in a bucket. Returns false if another machine is building it."""
    if job.remote is None:
        _build(job, index, claim, report)
        return True
    with job.remote.claimed(part_file(index), job.keys[index]) as mine:
        if mine:
            _build(job, index, claim, report)
            job.remote.put_part(part_file(index))
        return mine


class _Reporter:
    """Adds up the progress of all processes and ranks, from the files in the folder."""

    def __init__(self, job: Job, tell: Callable[[Progress], None] | None) -> None:
        self._job, self._tell = job, tell
        self._finished: dict[int, dict[str, Any]] = {}
        self._last = 0.0

    def __call__(self) -> None:
        if self._tell is None or time.monotonic() - self._last < 0.5:
            return
        self._last = time.monotonic()
        sums = {"bytes": 0, "documents": 0, "tokens": 0, "bad": 0}
        for part in self._job.parts:
            state = self._finished.get(part.index) or self._read(part.index)
            sums["bytes"] += part.n_bytes if "key" in state else int(state.get("bytes", 0))
            for key in ("documents", "tokens", "bad"):
                sums[key] += int(state.get(key, 0))
        self._tell(
            Progress(
                read_bytes=sums["bytes"],
                total_bytes=sum(part.n_bytes for part in self._job.parts),
                documents=sums["documents"],
                tokens=sums["tokens"],
                bad=sums["bad"],
                parts=len(self._finished),
                total_parts=len(self._job.parts),
            )
        )

    def _read(self, index: int) -> dict[str, Any]:
        for suffix in ("json", "claim"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                state = json.loads((self._job.folder / f"{part_file(index)}.{suffix}").read_text())
                if suffix == "json":
                    self._finished[index] = state
                return state
        return {}


# ---- one part ----


def _build(job: Job, index: int, claim: Claim, report: _Reporter) -> None:
    """Tokenize one part; on return it is durable and has its final name."""
    part, name = job.parts[index], part_file(index)
    relative = {piece.path: piece.relative_path for piece in part.pieces}
    bad: list[text.BadRecord] = []
    counts = dict.fromkeys(COUNTS, 0)

    def on_bad(record: text.BadRecord) -> None:
        if record.is_of_the_moment:
            # If it were left out, it would be missing in every later run: the store is named after the files as listed.
            raise FaultError(f"{record}: start again when nothing writes there; the finished parts are kept")
        if job.on_error == "raise":
            raise FaultError(f"{record}: fix the record, or skip bad records with --data.on_error skip")
        counts["bad"] += record.documents
        counts["bad_bytes"] += record.n_bytes
        counts["bad_places"] += 1
        counts["bad_unknown"] += record.at_least
        if len(bad) < KEPT_BAD_RECORDS:
            bad.append(record)

    def on_empty(where: str) -> None:
        counts["empty"] += 1

    unfinished = aside(job.folder / f"{name}.bin")
    digest = hashlib.blake2b(digest_size=16)
    lengths: list[np.ndarray] = []
    file = DISK.create(unfinished)
    try:
        for texts in _batches(job, part, on_bad, on_empty, counts):
            ids = job.tokenizer.encode_batch(texts)
            tokens = _joined(job, ids, part)
            DISK.write(file, tokens.data)
            digest.update(tokens.data)
            lengths.append(np.array([len(one) + job.eos for one in ids], dtype=np.uint64))
            counts["tokens"] += len(tokens)
            counts["documents"] += len(ids)
            done = min(counts["bytes"] / max(part.n_bytes, 1), 0.99)  # estimated from the bytes of text
            claim.state |= {
                "bytes": int(part.n_bytes * done),
                "documents": counts["documents"],
                "tokens": counts["tokens"],
            }
            report()
        DISK.fsync(file)
    except BaseException:
        DISK.remove_quietly(unfinished)
        raise
    finally:
        DISK.close(file)
    ends_dtype = "<u4" if counts["tokens"] < 2**32 else "<u8"
    ends = np.cumsum(np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.uint64)).astype(ends_dtype)
    description = {
        "file": name,
        "key": job.keys[index],
        "pieces": [[piece.relative_path, piece.start, piece.stop] for piece in part.pieces],
        **counts,
        "ends_dtype": ends_dtype,
        "bin_hash": digest.hexdigest(),
        "ends_hash": hashlib.blake2b(ends.data, digest_size=16).hexdigest(),
        "bad_records": [{**asdict(record), "path": relative.get(record.path, record.path)} for record in bad],
    }
    # Missing if another process took the part over, finished it, and cleaned up
    with contextlib.suppress(FileNotFoundError):
        DISK.rename(unfinished, job.folder / f"{name}.bin")
        commit(job.folder / f"{name}.ends", ends.tobytes())
        commit(job.folder / f"{name}.json", encoded(sealed(description)))


def _batches(
    job: Job,
    part: text.Part,
    on_bad: Callable[[text.BadRecord], None],
    on_empty: Callable[[str], None],
    counts: dict[str, int],
) -> Iterator[list[str]]:
    """The texts of the store's side of the split, about :data:`BATCH_CHARACTERS` at a time."""
    texts: list[str] = []
    size = 0
    for document in hub.documents_of(job.source, part, bad=on_bad, empty=on_empty):
        counts["records"] += 1
        counts["record_bytes"] += _utf8_length(document.text)
        kept = split.part_of(document.text, job.split)
        if kept is None:
            continue
        texts.append(kept)
        size += len(kept)
        counts["bytes"] += _utf8_length(kept)
        if size >= BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _utf8_length(value: str) -> int:
    return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))


def _joined(job: Job, ids: list[np.ndarray], part: text.Part) -> np.ndarray:
    """The tokens of all documents of a batch, each with its end token, as they are written to the file."""
    end = [np.array([job.tokenizer.eos_id], dtype=np.int32)] if job.eos else []
    runs = [run for one in ids for run in (one, *end)]
    tokens = np.concatenate(runs) if runs else np.zeros(0, dtype=np.int32)
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < job.tokenizer.vocab_size:
        raise FaultError(
            f"the tokenizer gave the id {int(tokens.max())} for text of {part.path}, but says that it has "
            f"{job.tokenizer.vocab_size} ids"
        )
    return np.ascontiguousarray(tokens, dtype=job.dtype)
