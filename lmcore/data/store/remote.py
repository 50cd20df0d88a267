"""Token stores in a bucket (``data.store_dir`` is a URL): built in parts by many workers, read through local copies.

A store in the bucket has the same files as one on disk. Its manifest is uploaded last: without it the store does not
exist. Each machine keeps a whole copy in the user's cache and trains from it, so that no step waits for the bucket. One
process per machine downloads the files, compares them with the hashes in the manifest, and then renames them.

While a store is being built, each worker uploads its parts, the description last, and downloads those of other workers as
they appear. A claim in the bucket only avoids duplicate work: two workers that build the same part upload the same bytes.

Example::

    folder = RemoteFolder("s3://bucket/stores/wiki-1f0c...", local_store_dir("s3://bucket/stores") / "wiki-1f0c...")
    folder.bring(note=print)          # True: the store is complete there, and now here
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, final

from lmcore.data.store.claims import aside
from lmcore.data.store.manifest import MANIFEST, encoded, read_manifest, read_part, sealed
from lmcore.data.store.verification import file_hash
from lmcore.disk import DISK
from lmcore.errors import FaultError, RequestError
from lmcore.humanize import size
from lmcore.process import is_alive
from lmcore.storage import READS, Store, StoreError, cache_dir, check_url, is_url, local_name

DOWNLOADS: Final = 4
"""Files that one process downloads or uploads at the same time."""
LOOK_SECONDS: Final = 5.0
"""Seconds between two looks for parts that other workers have uploaded."""
BEAT_SECONDS: Final = 15.0
STALE_SECONDS: Final = 90.0
"""If a claim does not change for this long, by the clock of the observer, its machine has vanished."""
_SUFFIXES: Final = (".bin", ".ends")

Part = Mapping[str, Any]


def local_store_dir(store_dir: str | Path) -> Path:
    """The local folder of the stores of ``data.store_dir``: itself or, for a URL, a folder in the cache.

    Raises:
        RequestError: the URL is not valid.
    """
    if not is_url(store_dir):
        return Path(store_dir)
    url = check_url(str(store_dir), "data.store_dir")
    return cache_dir() / "token_stores" / local_name(url)


def read_small(store_dir: str | Path, name: str) -> bytes:
    """A small file next to the stores, from the disk or else from the bucket.

    Raises:
        FileNotFoundError: the file does not exist.
        FaultError: the bucket does not answer.
    """
    try:
        return (local_store_dir(store_dir) / name).read_bytes()
    except FileNotFoundError:
        if not is_url(store_dir):
            raise
    with _faults():
        return Store(str(store_dir)).read(name)


def share_small(store_dir: str | Path, name: str, data: bytes) -> None:
    """Upload a small file next to the stores in a bucket; a no-op for a local folder, or if the file exists.

    Raises:
        FaultError: the bucket does not answer.
    """
    if is_url(store_dir):
        with _faults():
            Store(str(store_dir)).create(name, data)


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise FaultError(f"{error}; what is finished is kept: run the same command again") from error


@final
class RemoteFolder:
    """One token store in a bucket, and its copy in a local folder. It can be pickled.

    Args:
        url: URL of the store.
        local: folder of the copy, which all ranks of a machine share.
    """

    def __init__(self, url: str, local: Path) -> None:
        self.store, self.local = Store(url), local
        self._seen: dict[str, tuple[bytes, float]] = {}
        """Claim of another worker -> its content, and when this content was first seen."""
        self._next_try: dict[str, float] = {}
        self._next_look = 0.0

    @property
    def exists(self) -> bool:
        """Whether the store is complete in the bucket."""
        with _faults():
            return self.store.info(MANIFEST) is not None

    # ---- a complete store

    def bring(self, *, note: Callable[[str], None]) -> bool:
        """Copy the store to the local folder, if it is complete in the bucket. Returns whether it is there now.

        Raises:
            FaultError: an object is damaged or missing (the message names it), or the bucket does not answer.
            RequestError: the manifest is damaged, or of another version or store.
        """
        with self.lock():
            if (self.local / MANIFEST).exists():  # another rank of this machine has downloaded it
                return True
            found = self._read_manifest()
            if found is None:
                return False
            (manifest, data), begin = found, time.monotonic()
            n_bytes = self._bring_parts(manifest["parts"])
            for part in manifest["parts"]:
                DISK.write_file(self.local / f"{part['file']}.json", encoded(sealed(part)), durable=False)
            DISK.fsync_tree(self.local)
            DISK.write_file(aside(self.local / MANIFEST), data)
            DISK.rename(aside(self.local / MANIFEST), self.local / MANIFEST)
            DISK.fsync_dir(self.local)
        note(
            f"token store {self.local.name}: {size(n_bytes)} downloaded from {self.store.url} and verified in "
            f"{time.monotonic() - begin:.1f} s"
        )
        return True

    def _read_manifest(self) -> tuple[dict[str, Any], bytes] | None:
        """The manifest in the bucket and its bytes; ``None`` if it does not exist."""
        for number in range(READS):
            with _faults():
                try:
                    data = self.store.read(MANIFEST)
                except FileNotFoundError:
                    return None
            try:
                return self._checked_manifest(data), data
            except RequestError:
                if number + 1 == READS:
                    raise
        raise AssertionError("READS must be at least 1")

    def _checked_manifest(self, data: bytes) -> dict[str, Any]:
        scratch = self.local.with_name(f".{self.local.name}.{socket.gethostname()}.{os.getpid()}")
        DISK.makedirs(scratch)
        try:
            DISK.write_file(scratch / MANIFEST, data, durable=False)
            manifest = read_manifest(scratch)
        except RequestError as error:
            reason = str(error).replace(str(scratch / MANIFEST), self.store.url_of(MANIFEST))
            reason = reason.replace(str(scratch), self.store.url)
            raise RequestError(reason) from None
        finally:
            DISK.remove_quietly(scratch)
        if not self.local.name.endswith(f"-{manifest['fingerprint'][:16]}"):
            raise RequestError(
                f"{self.store.url_of(MANIFEST)} is of another token store ({manifest['fingerprint'][:16]}): remove the "
                "object, and the store is built again"
            )
        return manifest

    def _bring_parts(self, parts: Sequence[Part]) -> int:
        """Download the files that are not here yet. Returns the number of bytes."""
        wanted = [
            (f"{part['file']}{suffix}", part[f"{suffix[1:]}_hash"])
            for part in parts
            for suffix in _SUFFIXES
            if not (self.local / f"{part['file']}{suffix}").exists()
        ]
        with ThreadPoolExecutor(DOWNLOADS) as pool:  # the first failure is raised
            return sum(pool.map(lambda one: self._bring_file(*one), wanted))

    def _bring_file(self, name: str, digest: str) -> int:
        target = self.local / name
        try:
            for _ in range(READS):
                try:
                    with _faults():
                        self.store.download(name, aside(target))
                except FileNotFoundError:
                    raise self._refusal(name, "is missing") from None
                if file_hash(aside(target)) == digest:
                    n_bytes = aside(target).stat().st_size
                    DISK.rename(aside(target), target)
                    return n_bytes
        finally:
            aside(target).unlink(missing_ok=True)
        raise self._refusal(name, "is damaged or was changed (its hash is not that of its building)")

    def _refusal(self, name: str, what: str) -> FaultError:
        description = f"{name.rpartition('.')[0]}.json"
        (self.local / description).unlink(missing_ok=True)  # otherwise the part would count as built
        return FaultError(
            f"{self.store.url_of(name)} {what}: remove {description} and {MANIFEST} (if it is there) from "
            f"{self.store.url}, and the next start builds this part again"
        )

    def put(self, parts: Sequence[Part], dtype: str, manifest: bytes) -> None:
        """Upload the files of a complete local store that the bucket does not have, the manifest last.

        Raises:
            FaultError: the bucket does not answer.
        """
        with _faults():
            there = self.store.infos()

            def put(part: Part) -> None:
                whole = True
                for suffix, count, item in (
                    (".bin", part["tokens"], dtype),
                    (".ends", part["documents"], part["ends_dtype"]),
                ):
                    whole &= self._has(there, f"{part['file']}{suffix}", count * int(item[2:]))
                if not (whole and f"{part['file']}.json" in there):
                    self._put_part(part["file"])

            with ThreadPoolExecutor(DOWNLOADS) as pool:
                list(pool.map(put, parts))
            self.store.write(MANIFEST, manifest)
            for name in there:
                if name.endswith(".claim"):  # left by workers that vanished
                    self.store.remove(name)

    def _has(self, there: Mapping[str, Any], name: str, n_bytes: int) -> bool:
        # The listing may be out of date: check each object that it does not contain.
        info = there.get(name) or self.store.info(name)
        return info is not None and info.n_bytes == n_bytes

    # ---- a store that is being built

    def agree(self, name: str, data: bytes) -> None:
        """Agree on the content of a small file with all workers, and write it to the local folder. The first worker decides.

        If the local folder has another content of the file, its parts are removed.
        """
        with self.lock(), _faults():
            self.store.create(name, data)
            agreed = self.store.read(name)
            if (self.local / name).exists():
                if (self.local / name).read_bytes() == agreed:
                    return
                DISK.remove_tree(self.local)
                DISK.makedirs(self.local)
            DISK.write_file(aside(self.local / name), agreed)
            DISK.rename(aside(self.local / name), self.local / name)

    def look(self, keys: Mapping[str, str], *, now: bool = False) -> None:
        """Download the descriptions of parts that other workers have uploaded since the last look.

        Args:
            keys: {part: key of its content}; descriptions with another key are ignored.
            now: look even if :data:`LOOK_SECONDS` have not passed.
        """
        if not now and time.monotonic() < self._next_look:
            return
        with _faults():
            for name in self.store.names():
                part = name.removesuffix(".json")
                if part != name and part in keys and not (self.local / name).exists():
                    self._take_description(part, keys[part])
        self._next_look = time.monotonic() + LOOK_SECONDS

    def _take_description(self, part: str, key: str) -> bool:
        """Download the description of a part. Returns whether the bucket has this part."""
        target = self.local / f"{part}.json"
        try:
            data = self.store.read(target.name)
        except FileNotFoundError:
            return False
        try:
            DISK.write_file(aside(target), data)
            described = read_part(aside(target))
            if (described["file"], described["key"]) == (part, key):
                DISK.rename(aside(target), target)
                return True
            return False
        except RequestError:
            return False  # damaged: the part will be built again and replaced
        finally:
            aside(target).unlink(missing_ok=True)

    @contextlib.contextmanager
    def claimed(self, part: str, key: str) -> Iterator[bool]:
        """Context manager with whether this process should build a part: it does not exist and no living worker builds it."""
        name, token = f"{part}.claim", uuid.uuid4().hex
        mine = False
        if time.monotonic() >= self._next_try.get(name, 0.0):
            with _faults():
                mine = not self._take_description(part, key) and self._claim(name, token)
            self._next_try[name] = time.monotonic() + LOOK_SECONDS
        if not mine:
            yield False
            return
        stopped = threading.Event()
        beats = threading.Thread(target=self._beat, args=(name, token, stopped), daemon=True)
        beats.start()
        try:
            yield True
        finally:
            stopped.set()
            beats.join()
            with contextlib.suppress(StoreError):  # the claim becomes stale
                self.store.remove(name)

    def _claim(self, name: str, token: str) -> bool:
        data = _claim_of(token, 0)
        if self.store.create(name, data):
            return True
        try:
            content = self.store.read(name)
        except FileNotFoundError:
            return False  # just removed: the part exists now, or is claimed in the next round
        if _is_of_dead_process(content):
            self.store.write(name, data)
            return True
        before, since = self._seen.get(name, (b"", 0.0))
        if content != before:
            self._seen[name] = content, time.monotonic()
            return False
        if time.monotonic() - since < STALE_SECONDS:
            return False
        self.store.write(name, data)
        return True

    def _beat(self, name: str, token: str, stopped: threading.Event) -> None:
        number = 0
        while not stopped.wait(BEAT_SECONDS):
            number += 1
            with contextlib.suppress(StoreError):  # the next beat may succeed
                self.store.write(name, _claim_of(token, number))

    def put_part(self, part: str) -> None:
        """Upload a part from the local folder, its description last."""
        with _faults():
            self._put_part(part)

    def _put_part(self, part: str) -> None:
        for suffix in (*_SUFFIXES, ".json"):
            self.store.upload(self.local / f"{part}{suffix}", f"{part}{suffix}")

    def bring_parts(self, parts: Sequence[Part]) -> None:
        """Download the parts that other workers have built, once per machine."""
        with self.lock():
            self._bring_parts(parts)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock that one process of this machine can hold at a time; it is released when the process dies."""
        DISK.makedirs(self.local.parent)
        with open(self.local.with_name(f".{self.local.name}.lock"), "w") as file:
            # Without locks two processes may download, which only costs time.
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_EX)
            DISK.makedirs(self.local)
            yield


def _claim_of(token: str, beat: int) -> bytes:
    claim = {"host": socket.gethostname(), "pid": os.getpid(), "token": token, "beat": beat}
    return json.dumps(claim).encode()


def _is_of_dead_process(claim: bytes) -> bool:
    """Whether a claim belongs to a process of this machine that has ended. A wrong true only costs time."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        owner = json.loads(claim)
        return owner["host"] == socket.gethostname() and not is_alive(int(owner["pid"]))
    return False
