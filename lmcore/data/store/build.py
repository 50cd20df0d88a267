"""Documents -> a token store: built once, in parallel, and then only memory-mapped.

* The store depends only on the files, the options and the tokenizer: it is byte for byte the same for any number of
  processes and ranks, and after any number of kills. Its folder is named by a fingerprint of all of these, so that
  different corpora are never mixed; the store of an unchanged corpus is opened at once.
* Each part is written to a temporary file, made durable and renamed, its description last: a part is complete or does not
  exist. A kill costs at most the part that each process was working on.
* Ranks need only a common file system. A part is claimed by a file with a heartbeat; a claim whose owner died is
  taken over; a failure is written to a file that every process checks. No process waits forever.
* Bad records are counted, with their places; the policy is applied before any position exists.
* Existing files are not trusted: parts are compared with their hashes before a store is finished, and again on
  every machine that opens it (:mod:`lmcore.data.store.verification`).

The folder contains ``part-000000.bin`` (little-endian tokens), ``part-000000.ends`` (document ends, counted from the start
of the part), ``part-000000.json`` (its counts and hashes), ..., and ``manifest.json``, which is written last.

Example::

    store = build_store(source, tokenizer, store_dir="token_stores", processes=8)
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmcore.data.store import token_files, verification
from lmcore.data.store.claims import aside, create_once
from lmcore.data.store.edits import edited_files, refuse_edited_text, unique_names
from lmcore.data.store.manifest import (
    MANIFEST,
    STORE_VERSION,
    encoded,
    fingerprint_of,
    read_manifest,
    read_part,
    refuse_special_files,
    sealed,
)
from lmcore.data.store.remote import RemoteFolder, local_store_dir
from lmcore.data.store.samples import samples_of
from lmcore.data.store.store import TokenStore
from lmcore.data.store.workers import (
    COUNTS,
    EncodesBatches,
    Job,
    Progress,
    build_all,
    commit,
    is_done,
    part_file,
)
from lmcore.data.text import documents, hub, listing
from lmcore.data.text.sources import HUB
from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError
from lmcore.humanize import amount
from lmcore.names import MAX_NAME_BYTES
from lmcore.storage import check_url, is_url

__all__ = ["Progress", "TokenStore", "build_store"]


_PLAN = "plan.json"
_PLAN_SECONDS = 5.0
"""If a plan has no content for this long, the process that was writing it has died."""
_LISTED_RECORDS = 100
"""The most bad records that are listed at each start; the manifest has more."""


class NoText(RequestError):
    """A source, or one side of its split, has not a single token."""


def build_store(
    source: documents.Source,
    tokenizer: EncodesBatches,
    *,
    store_dir: str | Path,
    split: tuple[str, float] = ("all", 0.0),
    eos: bool = True,
    processes: int = 1,
    worker: int = 0,
    on_error: str = "raise",
    max_bad_fraction: float = 0.001,
    progress: Callable[[Progress], None] | None = None,
    note: Callable[[str], None] | None = None,
    part_bytes: int | None = None,
) -> TokenStore:
    """Build the token store of a source, or open it if it exists. All ranks may call this together.

    Args:
        store_dir: folder of all stores, on a file system that all ranks share; or a URL, of which each machine has a copy
            (:mod:`lmcore.data.store.remote`).
        split: one side of a split by content (:mod:`lmcore.data.text.split`).
        eos: end each document with ``tokenizer.eos_id``.
        processes: number of tokenizing processes of this rank; 1 tokenizes in this process.
        worker: number of this rank, so that ranks begin at different parts.
        on_error: ``raise`` ends at the first bad record and names its place; ``skip`` leaves bad records out. In both cases
            a file that was written or removed while it was read, and may be good a moment later, ends the build.
        max_bad_fraction: with ``skip``, a larger share of bad records is still an error.
        progress: called about twice a second.
        note: called with lines of text: what differs from the store that was built before, and the bad records.
        part_bytes: size of the text of a part; default: 1 to 64 MiB, by the size of the corpus. It does not change tokens.

    Raises:
        FaultError: bad records that the policy does not allow, or a process was killed.
        RequestError: nothing to read, nowhere to write, or a file was edited in a way that does not change the
            fingerprint (:mod:`lmcore.data.store.edits`).
    """
    note = note or (lambda line: None)
    known = (tokenizer.fingerprint, *getattr(tokenizer, "former_fingerprints", ()))
    if token_files.are_tokens(source.paths):
        if split[0] != "all":
            raise RequestError(
                f"source {source.name!r} is tokens, not text: it cannot be split by its documents"
            )
        return token_files.open_files(
            source.name,
            source.paths,
            source.relative_paths,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_fingerprints=known,
            note=note,
        )
    prefix = folder_prefix(source.name, split)
    identity = identity_of(source, tokenizer, split, eos)
    candidates = [{**identity, "tokenizer": one} for one in known]
    folders = [local_store_dir(store_dir) / f"{prefix}{fingerprint_of(one)[:16]}" for one in candidates]
    folder = next((one for one in folders if _is_finished(one)), folders[0])
    built = False
    if (folder / MANIFEST).exists():
        if worker == 0:
            _keep_in_bucket(store_dir, folder, tokenizer.vocab_size, note)
    else:
        refuse_special_files(folder)
        try:
            brought = _bring(store_dir, folders, note)
            if brought is not None:
                folder = brought
            else:
                remote = _remote(store_dir, folder)
                job = _job(
                    source, tokenizer, folder, identity, split, eos, on_error, note, part_bytes, remote
                )
                _build_and_compare(job, processes, worker, progress, note)
                _finish(job, identity)
                built = True
        except OSError as error:
            # A rank that has finished removes temporary files, even those of a rank that is about to finish.
            done_by_another = isinstance(error, FileNotFoundError) and (folder / MANIFEST).exists()
            if not done_by_another:
                place = "$LMCORE_CACHE" if is_url(store_dir) else "data.store_dir"
                raise RequestError(
                    f"the token store {folder} cannot be written ({error.strerror or error}): free some space, "
                    f"or set {place} to another place; what is finished is kept"
                ) from error
    _tidy(folder)
    store = TokenStore.open(folder)
    store.verify(vocab_size=tokenizer.vocab_size, note=note)
    refuse_edited_text(folder, source, built=built, note=note)
    _enforce(store.manifest, on_error, max_bad_fraction)
    for line in _left_out(store.manifest, folder):
        note(line)
    if store.n_tokens == 0:
        first = next(iter(_bad_records(store.manifest)), None)
        raise NoText(
            f"source {source.name!r} holds no text at all ({amount(len(source.paths), 'file')})"
            f"{f'; the first bad record: {first}' if first else ''}"
        )
    return store


def _is_finished(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).exists()
    except OSError as error:  # a private folder of another user
        raise RequestError(
            f"the token store {folder} cannot be read ({error.strerror or error}): give this user access to it, or set "
            f"data.store_dir to another place"
        ) from error


def _remote(store_dir: str | Path, folder: Path) -> RemoteFolder | None:
    if not is_url(store_dir):
        return None
    return RemoteFolder(f"{check_url(str(store_dir), 'data.store_dir')}/{folder.name}", folder)


def _bring(store_dir: str | Path, folders: list[Path], note: Callable[[str], None]) -> Path | None:
    """The first of these stores that is complete in the bucket, copied to its folder; ``None`` if there is none."""
    for folder in folders:
        remote = _remote(store_dir, folder)
        if remote is not None and remote.bring(note=note):
            return folder
    return None


def _keep_in_bucket(
    store_dir: str | Path, folder: Path, vocab_size: int, note: Callable[[str], None]
) -> None:
    """Upload a store that is complete on disk, if it is missing in the bucket."""
    remote = _remote(store_dir, folder)
    if remote is None:
        return
    try:
        if not remote.exists:
            store = TokenStore.open(folder)
            store.verify(vocab_size=vocab_size)
            note(f"token store {folder.name} is not in {store_dir}: it is uploaded from {folder}")
            remote.put(store.manifest["parts"], store.dtype.str, (folder / MANIFEST).read_bytes())
    except FaultError as fault:  # training needs only the local copy
        note(f"warning: {fault} (training uses the copy in {folder})")


def folder_prefix(name: str, split: tuple[str, float]) -> str:
    """The beginning of the name of a store's folder, which is followed by the fingerprint.

    Raises:
        RequestError: the name of the source is not allowed.
    """
    return f"{_folder_name(name)}-" + ("" if split[0] == "all" else f"{split[0]}-")


def _folder_name(name: str) -> str:
    """The part of a store's folder that comes from the name of its source.

    Raises:
        RequestError: it would lead out of data.store_dir, or be hidden there.
    """
    if not name or name.startswith(".") or set(name) & {"/", os.sep, "\0"} or not name.isprintable():
        raise RequestError(
            f"a source cannot be called {name[:80]!r}: its name is part of a folder's name; give it another with "
            f"--data.train '{{path: ..., name: my_text}}'"
        )
    raw = name.encode("utf-8", "surrogateescape")
    return name if len(raw) <= MAX_NAME_BYTES else raw[:MAX_NAME_BYTES].decode("utf-8", "ignore")


# ---- what a store is made of ----


def identity_of(
    source: documents.Source, tokenizer: EncodesBatches, split: tuple[str, float], eos: bool
) -> dict[str, Any]:
    """Everything that the tokens depend on; its hash is the fingerprint."""
    return {
        "version": STORE_VERSION,
        "name": source.name,
        "tokenizer": tokenizer.fingerprint,
        "eos": eos,
        "split": list(split) if split[0] != "all" else ["all", 0.0],
        "text_field": source.text_field,
        "unit": source.unit,
        "encoding": source.encoding,
        "files": files_of(source),
    }


def files_of(source: documents.Source) -> list[list[Any]]:
    """``[relative path, size, hash]`` of each file, by which a changed text is detected."""
    return listing.once(
        ("samples", source.paths, source.relative_paths), functools.partial(_files_of, source)
    )


def _files_of(source: documents.Source) -> list[list[Any]]:
    samples = iter(samples_of([path for path in source.paths if not path.startswith(HUB)]))
    return [
        [name, 0, hub.fingerprint(path)] if path.startswith(HUB) else [name, *next(samples)]
        for name, path in zip(source.relative_paths or source.paths, source.paths)
    ]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A description of the differences between two identities."""
    words = [
        f"{key} {old.get(key)!r} -> {new[key]!r}" if key != "tokenizer" else "another tokenizer"
        for key in new
        if key != "files" and old.get(key) != new[key]
    ]
    before, after = (
        dict(zip(unique_names([row[0] for row in identity["files"]]), (row[1:] for row in identity["files"])))
        for identity in (old, new)
    )
    groups = {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [name for name in after if name in before and before[name] != after[name]],
    }
    for change, names in groups.items():
        if names:
            words.append(
                f"{amount(len(names), 'file')} {change} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            )
    return "; ".join(words)


def _job(
    source: documents.Source,
    tokenizer: EncodesBatches,
    folder: Path,
    identity: dict[str, Any],
    split: tuple[str, float],
    eos: bool,
    on_error: str,
    note: Callable[[str], None],
    part_bytes: int | None,
    remote: RemoteFolder | None,
) -> Job:
    """Agree on the parts with all other ranks, and reuse unchanged parts of older stores of this source."""
    prefix = folder.name.rpartition("-")[0]
    older = []
    for path in folder.parent.glob(f"{glob.escape(prefix)}-*/{MANIFEST}"):
        with contextlib.suppress(RequestError, OSError):  # skip a store that cannot be used
            manifest = read_manifest(path.parent)
            if manifest["name"] == source.name and manifest["identity"]["split"][0] == split[0]:
                older.append((path.stat().st_mtime, path.parent, manifest))
    older.sort(key=lambda entry: entry[0])
    DISK.makedirs(folder)
    total = sum(size for _, size, _ in identity["files"])
    part_bytes = part_bytes or min(max(1 << (total // 64).bit_length(), 2**20), 2**26)
    if older and not (folder / _PLAN).exists():
        note(f"token store {prefix}: {_changes(older[-1][2]['identity'], identity)}")
        # Cut as before, so that unchanged parts can be reused
        part_bytes = older[-1][2]["part_bytes"] or part_bytes
    if remote is not None:
        remote.agree(_PLAN, encoded({"part_bytes": part_bytes}))
    parts = tuple(hub.parts_of(source, part_bytes=_agreed(folder / _PLAN, part_bytes)))
    options = [
        identity[key] for key in ("version", "tokenizer", "eos", "split", "text_field", "unit", "encoding")
    ]
    # By path, because two folders of one source may have files of equal names.
    files = {path: rest for path, (_, *rest) in zip(source.paths, identity["files"])}
    keys = []
    for part in parts:
        pieces = [[p.relative_path, p.start, p.stop, *files.get(p.path, [])] for p in part.pieces]
        keys.append(hashlib.sha256(json.dumps([options, pieces]).encode()).hexdigest()[:32])
    job = Job(
        source=source,
        tokenizer=tokenizer,
        folder=folder,
        parts=parts,
        eos=eos,
        split=split,
        on_error=on_error,
        dtype="<u2" if tokenizer.vocab_size <= 2**16 else "<u4",
        keys=tuple(keys),
        remote=remote,
    )
    for _, other, manifest in reversed(older):
        _take_over(job, other, manifest)
    return job


def _agreed(plan: Path, part_bytes: int) -> int:
    """The part size on which all ranks agree: the first rank writes its ``part_bytes`` to ``plan``, the others read it."""
    while True:
        with contextlib.suppress(FileExistsError):
            create_once(plan, encoded({"part_bytes": part_bytes}))
        end = time.monotonic() + _PLAN_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, FileNotFoundError):
                agreed = json.loads(plan.read_bytes())["part_bytes"]
                if isinstance(agreed, int) and agreed > 0:
                    return agreed
            time.sleep(0.02)
        plan.unlink(missing_ok=True)


def _take_over(job: Job, other: Path, manifest: dict[str, Any]) -> None:
    """Reuse, by hard links or copies, the parts of another store that hold the same text and were built in the same way."""
    there = {part["key"]: part for part in manifest["parts"]}
    wanted = [
        (part, key) for part, key in zip(job.parts, job.keys) if key in there and not is_done(job, part.index)
    ]
    edited = edited_files(other, job.source) if wanted else set()  # the key has only samples of a large file
    for part, key in wanted:
        name = part_file(part.index)
        if any(piece.path in edited for piece in part.pieces):
            continue
        with contextlib.suppress(OSError):  # the older store was just removed, or the disk is full: build it
            for suffix in (".bin", ".ends"):
                target = job.folder / f"{name}{suffix}"
                _link_or_copy(other / f"{there[key]['file']}{suffix}", target)
            commit(job.folder / f"{name}.json", encoded(sealed({**there[key], "file": name})))


def _link_or_copy(old: Path, new: Path) -> None:
    aside(new).unlink(missing_ok=True)
    try:
        os.link(old, aside(new))
    except FileNotFoundError:
        raise
    except OSError:  # the file system has no hard links
        shutil.copyfile(old, aside(new))
    DISK.rename(aside(new), new)


# ---- the end ----


def _build_and_compare(
    job: Job,
    processes: int,
    worker: int,
    progress: Callable[[Progress], None] | None,
    note: Callable[[str], None],
) -> None:
    """Build every part, and rebuild those that do not match their descriptions.

    Parts of an interrupted run may have been damaged on the disk since then.

    Raises:
        FaultError: parts are damaged repeatedly.
    """
    damage: dict[str, str] = {}
    for _ in range(3):
        build_all(job, processes, worker, progress)
        if (job.folder / MANIFEST).exists():
            return
        parts, damage = [], {}
        for part, key in zip(job.parts, job.keys):
            name = part_file(part.index)
            try:
                described = read_part(job.folder / f"{name}.json")
            except RequestError as error:
                damage[name] = str(error)
                continue
            if (described["key"], described["file"]) != (key, name):
                damage[name] = "it belongs to another store"
            else:
                parts.append(described)
        if job.remote is not None:
            job.remote.bring_parts(parts)
        damage |= verification.find_damage(job.folder, parts, job.dtype)
        if not damage or (job.folder / MANIFEST).exists():
            return
        for name, reason in damage.items():
            note(f"token store {job.folder.name}: {name} is damaged ({reason}): it is built again")
            for suffix in (".json", ".bin", ".ends"):
                (job.folder / f"{name}{suffix}").unlink(missing_ok=True)
    name, reason = next(iter(damage.items()))
    raise FaultError(
        f"{job.folder / name} is damaged each time it is written ({reason}): check the disk, or set data.store_dir to "
        f"another one"
    )


def _finish(job: Job, identity: dict[str, Any]) -> None:
    """Write the manifest. Every rank may do this, because the bytes are the same: it contains no time, place or process."""
    with contextlib.nullcontext() if job.remote is None else job.remote.lock():
        if not (job.folder / MANIFEST).exists():
            _write_manifest(job, identity)


def _write_manifest(job: Job, identity: dict[str, Any]) -> None:
    parts = [read_part(job.folder / f"{part_file(part.index)}.json") for part in job.parts]
    # Parts that were reused from a store of an earlier version do not have all counts.
    totals = {key: sum(part.get(key, 0) for part in parts) for key in COUNTS}
    manifest = {
        "version": STORE_VERSION,
        "name": job.source.name,
        "fingerprint": fingerprint_of(identity),
        "dtype": job.dtype,
        **totals,
        "part_bytes": json.loads((job.folder / _PLAN).read_text())["part_bytes"],
        "identity": identity,
        "parts": parts,
    }
    if job.remote is not None:
        job.remote.put(parts, job.dtype, encoded(sealed(manifest)))
    commit(job.folder / MANIFEST, encoded(sealed(manifest)))


def _tidy(folder: Path) -> None:
    """Remove the temporary files, claims and failures that killed processes have left in a finished store."""
    for pattern in (".*.tmp", ".now.*", "*.claim", "failure.json"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # another process removes it too, or the store is read-only
                DISK.unlink(path)


def _bad_records(manifest: dict[str, Any]) -> Iterator[str]:
    """The bad records that the manifest lists, as lines for the user."""
    for part in manifest["parts"]:
        for record in part["bad_records"]:
            yield str(documents.BadRecord(**record))


def _enforce(manifest: dict[str, Any], on_error: str, max_bad_fraction: float) -> None:
    """Apply the policy on bad records to a finished store; the limit holds for documents and for bytes of text."""
    bad, bad_bytes = manifest["bad"], manifest.get("bad_bytes", 0)
    if not bad:
        return
    total = bad + manifest["records"]
    # Records are larger than their texts, and compressed files are smaller.
    files_bytes = sum(size for _, size, _ in manifest["identity"]["files"])
    total_bytes = max(files_bytes, bad_bytes + manifest.get("record_bytes", 0))
    at_least = "at least " if manifest.get("bad_unknown") else ""
    lost = f"{at_least}{bad:,} of {total:,} documents of {manifest['name']} are bad or lost"
    if bad_bytes:
        lost += f", about {bad_bytes / total_bytes:.2%} of the text"
    first = f"the first: {next(_bad_records(manifest), 'not written down')}"
    if on_error == "raise":
        raise FaultError(f"{lost}; {first}: fix them, or skip bad records with --data.on_error skip")
    if bad > max_bad_fraction * total or bad_bytes > max_bad_fraction * total_bytes:
        raise FaultError(f"{lost}, more than data.max_bad_fraction {max_bad_fraction:g}; {first}")


def _left_out(manifest: dict[str, Any], folder: Path) -> Iterator[str]:
    """Lines for the log about bad records that the policy allowed: their number, and the places of the first ones."""
    if not manifest["bad"]:
        return
    at_least = "at least " if manifest.get("bad_unknown") else ""
    verb = "is" if manifest["bad"] == 1 else "are"
    yield f"{manifest['name']}: {at_least}{amount(manifest['bad'], 'bad record')} {verb} left out"
    records = list(_bad_records(manifest))
    for record in records[:_LISTED_RECORDS]:
        yield f"  {record}"
    if len(records) > _LISTED_RECORDS:
        yield f"  and {len(records) - _LISTED_RECORDS:,} more, in {folder / MANIFEST}"
