"""``metrics.jsonl``: the record of a run, one JSON object per line.

The file is append-only. Every number keeps all its digits (Python's ``repr``), so that two runs can be compared exactly;
NaN and infinity, which JSON does not have, are written as null. The reader drops what a resume or a rewind discarded. A line
that was cut off by a kill is skipped, and never joined with the next record.

    >>> write = MetricsFile("runs/demo/metrics.jsonl")
    >>> write({"kind": "train", "step": 1, "loss": 9.0108})
    >>> read_metrics("runs/demo/metrics.jsonl", kind="train")[-1]["loss"]
    9.0108
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lmcore.disk import DISK

ABANDONING_EVENTS = frozenset({"start", "resume", "rewound"})
"""Events after which earlier records of later steps are discarded."""
RECORD_KEYS = frozenset(
    {
        "kind",
        "step",
        "epoch",
        "tokens",
        "position",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "data_wait",
        "step_seconds",
        "memory_bytes",
        "tensor_bytes",
        "train_seconds",
        "mfu",
        "nonfinite_losses",
        "skipped_steps",
        "time",
        "set",
    }
)
"""Keys of a train record, which the user's own metrics cannot have."""
WAITING_RECORDS = 100_000
"""How many records wait in memory while the file cannot be written; with more, the oldest are lost."""


class MetricsFile:
    """Appends records. A call never raises ``OSError``: what cannot be written is kept in memory and written later.

    ``unwritten`` is the number of waiting records, ``lost`` the number of dropped ones, and ``problem`` the last error.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises ``OSError`` if the file cannot be opened."""
        self.path = Path(path)
        DISK.makedirs(self.path.parent)
        self._torn = self.path.exists() and self.path.stat().st_size > 0 and self._last_byte() != b"\n"
        # Unbuffered, so that it is known what is in the file after a failed write.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._waiting: deque[bytes] = deque()
        self.lost = 0
        self.problem = ""

    @property
    def unwritten(self) -> int:
        return len(self._waiting)

    def _last_byte(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1)

    def __call__(self, record: dict[str, Any]) -> None:
        """Write one record and pass it to the operating system at once."""
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        self._waiting.append(line.encode("utf-8", "backslashreplace"))
        if len(self._waiting) > WAITING_RECORDS:
            self._waiting.popleft()
            self.lost += 1
        self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                line = self._waiting[0]
                if self._torn:
                    line = b"\n" + line  # so that only the torn line is lost
                written = self._file.write(line) or 0
                if written != len(line):  # the disk became full within the line
                    self._torn = self._torn or written > 0
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._torn = False
                self._waiting.popleft()
        except OSError as error:
            self.problem = error.strerror or str(error)

    def close(self) -> None:
        """Try once more to write the waiting records, and close the file."""
        self._write_waiting()
        with suppress(OSError):
            self._file.close()


def plain(value: Any) -> Any:
    """The value with NaN and infinity replaced by ``None``, which every JSON reader understands (null)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def iterate_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of a run one by one, in the order of the file, without those that the run discarded.

    A ``start``, ``resume`` or ``rewound`` event at step S drops earlier records of steps beyond S; events are always
    kept. Lines that are not records (torn, not a JSON object, a step that is not a number) are skipped. The file is read
    twice and not kept in memory, except for two numbers per such event.

    Args:
        path: ``metrics.jsonl`` or the run folder that holds it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    limits: list[tuple[int, int]] = []  # (line, step): records before that line are kept up to that step
    lines = 0
    with open(path, "rb") as file:
        for line in file:
            lines += 1
            if b'"event"' in line:
                record = _parse(line)
                if record and record["kind"] == "event" and str(record.get("event")) in ABANDONING_EVENTS:
                    step = record.get("step")
                    if type(step) is int:
                        # A later event with a lower step makes earlier limits redundant.
                        while limits and limits[-1][1] >= step:
                            limits.pop()
                        limits.append((lines, step))
    # The steps of the remaining limits increase, so the first limit after a line is the strictest of all that follow.
    ahead = deque(limits)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number > lines:  # appended after the first pass, which has not seen its events
                return
            record = _parse(line)
            if record is None:
                continue
            while ahead and ahead[0][0] <= number:
                ahead.popleft()
            if record["kind"] == "event" or not ahead or record.get("step", 0) <= ahead[0][1]:
                yield record


def read_metrics(path: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """All records of a run as a list; :func:`iterate_metrics` does not keep them in memory.

    Args:
        path: ``metrics.jsonl`` or the run folder that holds it.
        kind: only ``train``, ``eval``, ``epoch``, ``event`` or ``sample`` records.

    If two records have the same kind, set and step, the last one is kept.
    """
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, record in enumerate(iterate_metrics(path)):
        if kind is not None and record["kind"] != kind:
            continue
        key: tuple[Any, ...] = ("event", number)
        if record["kind"] != "event":
            key = (record["kind"], record.get("set"), record.get("step", record.get("epoch")))
        kept.pop(key, None)  # so that the replaced record moves to the end
        kept[key] = record
    return list(kept.values())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    if record["kind"] == "event":
        return record
    counts = [record.get(name, 0) for name in ("step", "tokens", "position")]
    whole = all(type(count) is int and -(2**63) <= count < 2**63 for count in counts)
    named = isinstance(record.get("set", ""), str)
    return record if whole and named else None


def versions() -> dict[str, str]:
    """The versions of Python and the packages that affect what a run computes, without those that are not installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "deepspeed", "sentencepiece", "tokenizers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
