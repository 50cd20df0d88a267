"""A run folder in a bucket, for the commands that read one: what they need is downloaded to a copy in the cache."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcore.disk import DISK
from lmcore.errors import RequestError
from lmcore.storage import Store, StoreError, cache_dir, is_url, local_name


def local_copy(path: str, checkpoint: str | None = None, *, note: Callable[[str], None]) -> str:
    """``path`` itself, or for a URL a local folder with the small files of the run and one checkpoint.

    A training that may be running is not affected: the copy is not in the run's local folder, and nothing is written to the
    bucket.

    Args:
        checkpoint: ``None`` for no checkpoint, ``auto`` for the newest good one, ``best``, or a step.

    Raises:
        RequestError: there is no run, or no good checkpoint of that kind, or the store does not answer.
    """
    if not is_url(path):
        return path
    from lmcore.run.bucket import bring_files  # lazily: it imports torch, which a local run may not need

    store = Store(path)
    folder = _own_copy(cache_dir() / "copies" / local_name(store.url))
    try:
        if not bring_files(store, folder):
            raise RequestError(f"{path}: there is no run")
        if checkpoint is not None:
            _bring_checkpoint(store, folder, checkpoint, note)
    except StoreError as error:
        raise RequestError(str(error)) from error
    return str(folder)


_copies: dict[Path, tuple[Path, int]] = {}
"""Folder of a run in the cache -> the copy that this process has, and its lock, which is held until the process ends."""


def _own_copy(folder: Path) -> Path:
    """``folder``, or ``folder-2``, ... while another process reads it: each copy has the one checkpoint that was asked for."""
    if folder in _copies:
        return _copies[folder][0]
    number = 1
    while True:
        copy = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        number += 1
        DISK.makedirs(copy)
        lock = os.open(copy / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            pass  # no locks on this file system: two at once may disturb each other
        _copies[folder] = copy, lock
        return copy


def _bring_checkpoint(store: Store, folder: Path, which: str, note: Callable[[str], None]) -> None:
    from lmcore.checkpoint.manifest import Damaged, step_name, step_of
    from lmcore.checkpoint.reader import best_last, measured_after
    from lmcore.checkpoint.remote import RemoteCheckpoints

    remote = RemoteCheckpoints(store, scratch=folder / ".bucket", note=note, read_only=True)
    there = remote.manifests()
    steps = sorted(there)
    if which.isdecimal() and len(which) < 20:
        steps = [step for step in steps if step == int(which)]
    elif which == "best":
        kept = next((one["keep_best"] for one in reversed(there.values()) if one.get("keep_best")), None)
        metric, mode = (kept["metric"], kept["mode"]) if kept else ("loss", "min")
        values = ((Path(step_name(step)), one["metrics"].get(metric)) for step, one in there.items())
        steps = [step_of(path) for path in best_last(values, mode, after=measured_after(there.values()))]
    for step in reversed(steps):
        here = folder / "checkpoints" / step_name(step)
        try:
            if not _is_copy(here, there[step]):
                DISK.remove_quietly(here)
                remote.fetch(step, here.parent)
            for other in here.parent.iterdir():  # keep only one, so that the newest one is the requested one
                if other != here:
                    DISK.remove_quietly(other)
            return
        except (Damaged, FileNotFoundError) as damage:
            DISK.remove_quietly(here)
            note(f"checkpoint {step_name(step)} of {store.url} is damaged ({damage}); skipped")
    raise RequestError(f"{store.url}: no good checkpoint" + (f" of step {which}" if which.isdigit() else ""))


def _is_copy(here: Path, manifest: dict[str, Any]) -> bool:
    """Whether a folder in the cache is this checkpoint, byte for byte; if it is damaged, the one in the bucket need not be."""
    from lmcore.checkpoint.manifest import Damaged, verify

    try:
        return here.exists() and verify(here, content=True) == manifest
    except (Damaged, RequestError):
        return False
