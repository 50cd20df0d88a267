"""``metrics.jsonl``: the truth about a run, one JSON object a line.

Comes in: records (dictionaries) in the order in which things happened. Goes out: a file that is only ever
appended to, and a reader. What always holds: every number keeps all its digits (Python's ``repr``), so that
two runs can be compared exactly; a line that a kill has torn is skipped by the reader and never glued to the
next record; after a resume or a rewind the reader keeps what the run went on with and drops what it threw
away.

    >>> write = MetricsFile("runs/demo/metrics.jsonl")
    >>> write({"kind": "train", "step": 1, "loss": 9.0108})
    >>> read_metrics("runs/demo/metrics.jsonl", kind="train")[-1]["loss"]
    9.0108
"""

from __future__ import annotations

import json
import math
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ABANDONING_EVENTS = frozenset({"resume", "rewound"})
"""Events after which the records of later steps belong to a past that was given up."""


class MetricsFile:
    """Appends records; a last line torn by a kill is closed first, so that it spoils nothing but itself."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and self.path.stat().st_size > 0 and self._last_byte() != b"\n"
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        if torn:
            self._file.write("\n")

    def _last_byte(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1)

    def __call__(self, record: dict[str, Any]) -> None:
        """Write one record and hand it to the operating system at once."""
        self._file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, which every reader of JSON understands."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def read_metrics(path: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, in the order of the file, without what the run threw away.

    Args:
        path: ``metrics.jsonl`` or the run folder that holds it.
        kind: only ``train``, ``eval``, ``epoch``, ``event`` or ``sample`` records.

    Of two records of one kind, set and step the last is kept; a ``resume`` or ``rewound`` event at step S
    drops earlier records of steps beyond S (events themselves always stay). Torn lines are skipped.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file):
            record = _parse(line)
            if record is None:
                continue
            if record["kind"] == "event":
                if record.get("event") in ABANDONING_EVENTS and isinstance(record.get("step"), int):
                    step = record["step"]
                    kept = {
                        key: old
                        for key, old in kept.items()
                        if key[0] == "event" or old.get("step", 0) <= step
                    }
                kept["event", number] = record
                continue
            key = (record["kind"], record.get("set"), record.get("step", record.get("epoch")))
            kept.pop(key, None)  # so that the order stays that of the last writing
            kept[key] = record
    return [record for record in kept.values() if kind is None or record["kind"] == kind]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what a run computes; those that are not installed are left
    out.
    """
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "deepspeed", "sentencepiece", "tokenizers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
