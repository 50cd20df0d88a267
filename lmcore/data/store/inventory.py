"""Lists the token stores in a folder and the runs that use them, and removes stores.

Each run lists the stores that it opens in ``stores.json`` in its folder. Runs of version 0.1.0 did not; for them the
training stores are found from the newest checkpoint.

Example::

    for store in list_stores("token_stores", runs=["runs"]):
        if not store.used_by and not store.is_being_built:
            remove_store(store)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lmcore.data.store.claims import STALE_SECONDS
from lmcore.data.store.manifest import MANIFEST, read_manifest
from lmcore.data.store.remote import local_store_dir
from lmcore.disk import DISK
from lmcore.errors import RequestError

USES = "stores.json"


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """One folder of a token store.

    Attributes:
        n_tokens: ``None`` if the store is not finished or is damaged; ``reason`` then says which.
        n_bytes: size on disk; hard links to parts of another store are counted in both.
        used_by: folders of the runs that use the store.
    """

    folder: Path
    n_tokens: int | None
    n_bytes: int
    used_by: tuple[Path, ...]
    is_being_built: bool = False
    reason: str = ""


def record_use(run_dir: Path, stores: Iterable[Path]) -> None:
    """Write the list of the stores that a run has opened to its folder."""
    DISK.write_json(run_dir / USES, sorted({str(folder.resolve()) for folder in stores}))


def stores_of(run_dir: Path) -> set[str]:
    """The folders of the stores that a run has listed as opened; empty if it has no list."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if not (run_dir / USES).is_file():  # opening a FIFO would block
            return set()
        value = json.loads((run_dir / USES).read_bytes())
        return {one for one in value if isinstance(one, str)} if isinstance(value, list) else set()
    return set()


def stores_trained_on(run_dir: Path, store_dir: str | Path) -> set[str]:
    """Names of the folders in ``store_dir`` that a run was trained on, by the fingerprint in its newest checkpoint.

    For a run that has lost its own list (:func:`stores_of`).
    """
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        states = (path for path in (run_dir / "checkpoints").glob("step-*/state.json") if path.is_file())
        newest = max(states, key=lambda path: path.parent.name)
        fingerprint = str(json.loads(newest.read_bytes())["cursor"]["fingerprint"])
        hashes = set(re.findall(r":([0-9a-f]{16})\b", fingerprint))
        names = {path.name for path in local_store_dir(store_dir).iterdir() if path.name[-16:] in hashes}
        # If documents are split into head and tail, the tail is validation text, which no cursor contains.
        return names | {name.replace("-head-", "-tail-") for name in names}
    return set()


def list_stores(store_dir: str | Path, *, runs: Iterable[str | Path] = ("runs",)) -> list[StoreInfo]:
    """Every store in ``store_dir``, sorted by name, with the runs in the folders ``runs`` that use it.

    Raises:
        RequestError: the folder does not exist.
    """
    store_dir = Path(store_dir)
    if not store_dir.is_dir():
        raise RequestError(f"no folder {store_dir}: give the folder of the token stores (data.store_dir)")
    users = list(_runs(runs))
    found = []
    for folder in sorted(path for path in store_dir.iterdir() if path.is_dir()):
        # Unlike Path.exists, os.path.exists is false if this user may not read the folder
        if not any(os.path.exists(folder / name) for name in (MANIFEST, "plan.json")):
            continue  # not a token store
        n_tokens, reason = None, "not finished"
        mark = ""
        if (folder / MANIFEST).exists():
            try:
                manifest = read_manifest(folder)
                n_tokens, reason = manifest["tokens"], ""
                mark = f"{manifest['name']}:{manifest['fingerprint'][:16]}"
            except RequestError as error:
                reason = str(error)
        real = str(folder.resolve())
        found.append(
            StoreInfo(
                folder=folder,
                n_tokens=n_tokens,
                n_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
                used_by=tuple(
                    run for run, (stores, state) in users if real in stores or (mark and mark in state)
                ),
                is_being_built=_is_claimed(folder),
                reason=reason,
            )
        )
    return found


def remove_store(store: StoreInfo) -> None:
    """Remove the folder of a store. The corpus is kept, and a run that needs the store builds it again.

    Raises:
        RequestError: the store is being built, or cannot be removed.
    """
    if store.is_being_built:
        raise RequestError(f"{store.folder} is being built: wait for it, or stop it first")
    try:
        # The manifest first: without it the store counts as unfinished, and is not opened after a kill in between.
        if (store.folder / MANIFEST).exists():
            DISK.unlink(store.folder / MANIFEST)
        DISK.remove_tree(store.folder)
    except OSError as error:
        raise RequestError(f"{store.folder} cannot be removed: {error.strerror or error}") from error


def _runs(places: Iterable[str | Path]) -> Iterator[tuple[Path, tuple[set[str], str]]]:
    """(run folder, (the stores that it lists, the state of its newest checkpoint as text)) of each run."""
    for place in map(Path, places):
        for run in [place, *sorted(place.glob("*"))] if place.is_dir() else []:
            named = stores_of(run)
            states = sorted(path for path in run.glob("checkpoints/step-*/state.json") if path.is_file())
            state = ""
            with contextlib.suppress(OSError):
                state = states[-1].read_text(errors="replace") if states else ""
            if named or state:
                yield run, (named, state)


def _is_claimed(folder: Path) -> bool:
    """Whether a process is working on the store, which then has a claim with a heartbeat."""
    for claim in folder.glob("*.claim"):
        with contextlib.suppress(OSError):
            if time.time() - claim.stat().st_mtime < STALE_SECONDS:
                return True
    return False
