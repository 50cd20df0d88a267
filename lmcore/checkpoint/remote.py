"""Checkpoints in a bucket: ``checkpoints/step-00001000/`` holds the same files there as on the disk.

A checkpoint exists in the bucket only if its manifest does, which is uploaded last and removed first. Its step is written
to ``checkpoints/index.json`` before the manifest, so that a stale listing cannot hide it: a reader tries the manifest of
every step in the index or the listing. Nothing is renamed. If a checkpoint is damaged, or newer than the one being resumed,
its manifest is moved to ``<n>.damaged.json`` or ``<n>.abandoned.json`` in the same folder.

Example::

    remote = RemoteCheckpoints(Store("s3://bucket/runs/demo"), scratch=Path("runs/demo/.bucket"))
    remote.put(Path("runs/demo/checkpoints/step-00001000"))
    remote.fetch(1000, Path("elsewhere/checkpoints"))
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, final

from lmcore.checkpoint.manifest import MANIFEST, Damaged, digest, read_manifest, step_name
from lmcore.disk import DISK, Disk
from lmcore.errors import RequestError
from lmcore.storage import READS, Store, sealed

FOLDER: Final = "checkpoints"
INDEX: Final = f"{FOLDER}/index.json"
DOWNLOADS: Final = 4
"""How many files of a checkpoint are downloaded in parallel."""
_MANIFEST_NAME: Final = re.compile(rf"{FOLDER}/step-(\d{{8,15}})/{re.escape(MANIFEST)}")


@final
class RemoteCheckpoints:
    """The checkpoints below one URL.

    Args:
        store: the store of the run folder that contains ``checkpoints``.
        scratch: a local folder for manifests, so that they are read and checked like those on the disk.
        note: called with a line for each checkpoint that is set aside.
        read_only: skip a damaged manifest, with a line, instead of setting it aside.
    """

    def __init__(
        self, store: Store, *, scratch: Path, note: Callable[[str], None] = print, read_only: bool = False
    ) -> None:
        self.store, self._scratch, self._note, self._read_only = store, scratch, note, read_only
        self._index: set[int] = set()

    def manifests(self) -> dict[int, dict[str, Any]]:
        """Step -> manifest of every checkpoint that exists, in the order of the steps. One request per checkpoint.

        A damaged manifest is set aside, with a line.
        """
        steps = set(self._read_index())
        for name in self.store.names(FOLDER):
            if match := _MANIFEST_NAME.fullmatch(name):
                steps.add(int(match[1]))
        found: dict[int, dict[str, Any]] = {}
        for step in sorted(steps):
            try:
                found[step] = self.manifest(step)
            except FileNotFoundError:
                continue
            except Damaged as damage:
                if self._read_only:
                    self._note(
                        f"checkpoint {step_name(step)} of {self.store.url} is damaged ({damage}); skipped"
                    )
                else:
                    self.set_aside(step, "damaged", str(damage))
        self._index = set(found)
        return found

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of one checkpoint.

        Raises ``FileNotFoundError``, ``Damaged``, or ``RequestError`` (an unsupported format version).
        """
        return self._manifest_and_bytes(step)[0]

    def _manifest_and_bytes(self, step: int) -> tuple[dict[str, Any], bytes]:
        for _ in range(READS - 1):
            with contextlib.suppress(Damaged):  # it may have been damaged in transit: read it again
                return self._read_manifest(step)
        return self._read_manifest(step)

    def _read_manifest(self, step: int) -> tuple[dict[str, Any], bytes]:
        data = self.store.read(self._name(step, MANIFEST))
        folder = self._scratch / step_name(step)
        DISK.makedirs(folder)
        try:
            DISK.write_file(folder / MANIFEST, data, durable=False)
            return read_manifest(folder), data
        finally:
            DISK.remove_quietly(folder)

    def put(self, folder: Path, *, before_commit: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Upload a committed checkpoint: its files, then its manifest. Returns the manifest.

        Args:
            before_commit: called before the manifest is uploaded; if it raises, no checkpoint is left in the bucket.

        Raises:
            Damaged: the checkpoint is not complete (retention may have removed it meanwhile).
            StoreError: it could not be uploaded.
        """
        manifest = read_manifest(folder)
        step, files = int(manifest["step"]), manifest["files"]
        try:
            before = self.manifest(step)
        except (FileNotFoundError, Damaged, RequestError):
            before = {}
        if before.get("files") != files:
            # Until the new manifest is there, this step has no checkpoint, so old and new files are never mixed.
            self.store.remove(self._name(step, MANIFEST))
            self._write_index(self._index | {step})
            for name in sorted(files):
                try:
                    self.store.upload(folder / name, self._name(step, name))
                except FileNotFoundError:
                    raise Damaged(f"{name} is missing") from None
        before_commit()
        if before != manifest:
            self.store.write(self._name(step, MANIFEST), (folder / MANIFEST).read_bytes())
        self._index.add(step)
        return manifest

    def fetch(self, step: int, folder: Path, *, disk: Disk = DISK) -> Path:
        """Download a checkpoint into ``folder/step-…`` by the same protocol as a save, and verify every byte.

        Raises:
            Damaged: the files in the bucket differ from the manifest, even after they were read again.
            FileNotFoundError: there is no such checkpoint.
        """
        manifest, data = self._manifest_and_bytes(step)
        aside, target = folder / f".{step_name(step)}.tmp", folder / step_name(step)
        disk.makedirs(folder)
        disk.remove_quietly(aside)
        disk.mkdir(aside)

        def get(name: str) -> str | None:
            wanted = manifest["files"][name]
            for _ in range(READS):
                try:
                    self.store.download(self._name(step, name), aside / name)
                except FileNotFoundError:
                    return f"{name} is missing"
                if digest(aside / name) == wanted["sha256"]:
                    return None
            return f"the content of {name} has changed"

        with ThreadPoolExecutor(DOWNLOADS) as pool:
            problems = [problem for problem in pool.map(get, sorted(manifest["files"])) if problem]
        if problems:
            disk.remove_quietly(aside)
            raise Damaged(problems[0])
        disk.fsync_tree(aside)
        disk.write_file(aside / MANIFEST, data)
        disk.fsync_dir(aside)
        disk.rename(aside, target)
        disk.fsync_dir(folder)
        return target

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first."""
        try:
            files = self.manifest(step)["files"]
        except (FileNotFoundError, Damaged, RequestError):
            files = {}
        self.store.remove(self._name(step, MANIFEST))
        self._index.discard(step)
        names = {self._name(step, name) for name in files}
        for name in sorted(names | set(self.store.names(f"{FOLDER}/{step_name(step)}"))):
            self.store.remove(name)

    def set_aside(self, step: int, suffix: str, why: str) -> None:
        """Keep the files, but not as a checkpoint: the manifest gets another name."""
        try:
            try:
                data = self._manifest_and_bytes(step)[1]
            except (Damaged, RequestError):  # keep its bytes as they are
                data = self.store.read(self._name(step, MANIFEST))
        except FileNotFoundError:
            return
        number = 1
        while not self.store.create(self._name(step, f"{number}.{suffix}.json"), data):
            number += 1
        self.store.remove(self._name(step, MANIFEST))
        self._index.discard(step)
        self._note(
            f"checkpoint {self.store.url_of(f'{FOLDER}/{step_name(step)}')} is {why}; set aside as {number}.{suffix}.json"
        )

    @staticmethod
    def _name(step: int, name: str) -> str:
        return f"{FOLDER}/{step_name(step)}/{name}"

    def _read_index(self) -> list[int]:
        try:
            steps = self.store.read_sealed(INDEX)["steps"]
            return [step for step in steps if type(step) is int]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError):  # damaged: only the listing is left
            self._note(
                f"{self.store.url_of(INDEX)} is damaged; the checkpoints are found by the listing alone"
            )
            return []

    def _write_index(self, steps: set[int]) -> None:
        self.store.write(INDEX, sealed({"steps": sorted(steps)}))
