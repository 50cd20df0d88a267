"""Detects edits of a text that do not change the fingerprint of its token store.

The fingerprint contains the size of each file and a hash of samples (:mod:`lmcore.data.store.samples`), so that a start does
not read terabytes. Replacing a word by one of the same length between two samples changes neither. Therefore each
machine stores, next to the results of comparing the store (:mod:`lmcore.data.store.verification`), the size, times and
inode of each file of more than 1 MiB and a hash of its whole content. If size, times or inode differ later, the file is
hashed again. A file that was only touched, copied or moved has the same hash, and gives no note.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmcore.data.store.manifest import MANIFEST
from lmcore.data.store.samples import WHOLE_BYTES, state_of
from lmcore.data.store.verification import BACKGROUND_BYTES, file_hash, file_state, remembered
from lmcore.data.text import remote
from lmcore.data.text.documents import Source
from lmcore.data.text.sources import HUB
from lmcore.errors import RequestError

_KEY = "text"
_THREADS = 8


def refuse_edited_text(
    folder: Path,
    source: Source,
    *,
    built: bool,
    note: Callable[[str], None],
    most_bytes: int = BACKGROUND_BYTES,
) -> None:
    """Compare the files of a source with their state when its store was built, or first opened on this machine.

    Args:
        folder: folder of the finished store.
        built: the store was just built by this process: all files are hashed, which takes a fraction of the time of
            tokenizing them.
        note: called with one line for files that were written since and cannot be compared, because no hash is known or
            more than ``most_bytes`` would have to be read.

    Raises:
        RequestError: the content of a file has changed; the message names it.
    """
    large = _large_files(source)
    if not large:
        return
    with remembered(folder) as memory:
        mark = file_state(folder / MANIFEST)  # changes if the store was built again or copied here
        known = _known(memory, mark)
        changed = [name for name, (_, state) in large.items() if known.get(name, [None])[0] != state]
        wanted = [name for name in changed if built or known.get(name, [None, None])[1]]
        hashes = _hashes({name: large[name] for name in wanted}, most_bytes)
        unknown: list[str] = []
        for name in changed:
            path, before = large[name][0], known.get(name)
            if before is None:
                continue
            if not before[1] or not hashes.get(name):
                unknown.append(path)
            elif before[1] != hashes[name]:
                raise RequestError(
                    f"{path} was edited since its token store {folder} was built, without a change of its size: remove the "
                    f"store to build it again, or give the edited file another name"
                )
        if unknown:
            also = f" and {len(unknown) - 1} more files" if unknown[1:] else ""
            note(
                f"{unknown[0]}{also} of the token store {folder}: written since; size and samples are as they were, what is "
                "between these is not compared (remove the store to build it again)"
            )
        kept = {name: known[name] for name in large if name in known}
        kept |= {name: [large[name][1], hashes.get(name)] for name in changed}
        memory[_KEY] = {"built": mark, "files": kept}


def edited_files(folder: Path, source: Source, *, most_bytes: int = BACKGROUND_BYTES) -> set[str]:
    """The files of a source whose tokens must not be reused from an older store, although size and samples are unchanged.

    They were written since then, and their content differs or cannot be compared."""
    large = _large_files(source)
    if not large:
        return set()
    with remembered(folder, write=False) as memory:
        known = _known(memory, file_state(folder / MANIFEST))
    changed = {name: found for name, found in large.items() if name in known and known[name][0] != found[1]}
    hashes = _hashes({name: found for name, found in changed.items() if known[name][1]}, most_bytes)
    return {path for name, (path, _) in changed.items() if (hashes.get(name) or "") != known[name][1]}


def _large_files(source: Source) -> dict[str, tuple[str, list[int]]]:
    """Name -> (path, state) of the large files, which enter the fingerprint by samples only."""
    states = {
        name: (path, state_of(path)[:4])  # without the device number, which may change with each mount
        for name, path in zip(unique_names(source.relative_paths or source.paths), source.paths)
        if not path.startswith(HUB) and not remote.is_remote(path)
    }
    return {name: found for name, found in states.items() if found[1][0] > WHOLE_BYTES}


def _known(memory: dict[str, Any], mark: list[int]) -> dict[str, Any]:
    """What is stored about the text of the store with this manifest: {name: [state, hash]}."""
    there = memory.get(_KEY)
    if isinstance(there, dict) and there.get("built") == mark and isinstance(there.get("files"), dict):
        known: dict[str, Any] = there["files"]
        return known
    return {}


def _hashes(files: dict[str, tuple[str, list[int]]], most_bytes: int) -> dict[str, str | None]:
    """Hashes of files by their names; empty if this would read more than ``most_bytes``."""
    if sum(state[0] for _, state in files.values()) > most_bytes:
        return {}
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(_hash_of, (path for path, _ in files.values()))))


def unique_names(names: Sequence[str]) -> list[str]:
    """Make the relative paths of the files of a source unique by numbers: two of its folders may have files of equal names.

    >>> unique_names(["a.txt", "b.txt", "a.txt"])
    ['a.txt', 'b.txt', 'a.txt (2)']
    """
    times: Counter[str] = Counter()
    found: dict[str, None] = {}
    for name in names:
        times[name] += 1
        unique = name if times[name] == 1 else f"{name} ({times[name]})"
        while unique in found:  # another file already has this name
            times[name] += 1
            unique = f"{name} ({times[name]})"
        found[unique] = None
    return list(found)


def _hash_of(path: str) -> str | None:
    try:
        return file_hash(path)
    except OSError:
        return None  # reading the text reports the error
