"""The descriptions of a token store on disk. They are untrusted: every field is checked before it is used.

``manifest.json`` describes the store, ``part-000000.json`` one part of it. Both are JSON of version 1 and contain a hash
of all other fields (those of earlier releases do not, and are read without it). The descriptions of all parts are
repeated in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lmcore.errors import RequestError
from lmcore.names import confined

MANIFEST = "manifest.json"
STORE_VERSION = 1
HASH = "hash"
_COUNTS = ("tokens", "documents", "bytes", "bad", "records")
_LATER_COUNTS = ("record_bytes", "empty", "bad_bytes", "bad_places", "bad_unknown")
"""Counts that stores of earlier releases do not have."""


def fingerprint_of(identity: dict[str, Any]) -> str:
    """The fingerprint of a store: 32 hex digits of a hash of everything that its tokens depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` with a hash of all its other fields, as it is written to disk."""
    plain = {key: value for key, value in content.items() if key != HASH}
    text = json.dumps(plain, sort_keys=True).encode()
    return plain | {HASH: hashlib.blake2b(text, digest_size=16).hexdigest()}


def encoded(value: Any) -> bytes:
    """JSON as it is written to the files of a store."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store.

    Raises:
        RequestError: it does not exist, is damaged, has another version, or names files outside of ``folder``.
    """
    path = folder / MANIFEST
    refuse_special_files(folder)
    try:
        manifest = _mapping(path)
    except FileNotFoundError:
        raise RequestError(
            f"{folder} holds no finished token store (no {MANIFEST}): `python -m lmcore prepare` finishes it"
        ) from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    if manifest.get("version") != STORE_VERSION:
        raise RequestError(
            f"{folder} is a token store of version {manifest.get('version')!r}, this is version "
            f"{STORE_VERSION}: remove the folder, and it is built again"
        )
    identity, parts = manifest.get("identity"), manifest.get("parts")
    if not isinstance(identity, dict) or not isinstance(identity.get("tokenizer"), str):
        _damaged(path, "identity")
    if not isinstance(identity.get("split"), list) or not identity["split"]:
        _damaged(path, "identity.split")
    files = identity.get("files")
    if not isinstance(files, list) or not all(isinstance(row, list) and len(row) == 3 for row in files):
        _damaged(path, "identity.files")
    if manifest.get("fingerprint") != fingerprint_of(identity):
        _damaged(path, "fingerprint")
    if not isinstance(manifest.get("name"), str):
        _damaged(path, "name")
    if manifest.get("dtype") not in ("<u2", "<u4"):
        _damaged(path, "dtype")
    _check_counts(path, manifest, (*_COUNTS, "part_bytes"))
    if not isinstance(parts, list):
        _damaged(path, "parts")
    for part in parts:
        if not isinstance(part, dict):
            _damaged(path, "parts")
        _check_part(path, folder, part)
    for name in _COUNTS:
        if manifest[name] != sum(part[name] for part in parts):
            _damaged(path, name)
    return manifest


def refuse_special_files(folder: Path) -> None:
    """Refuse a folder with a FIFO or a device, which would block a process that opens it.

    Raises:
        RequestError: there is one; the message names it.
    """
    names = []
    with contextlib.suppress(OSError):  # the folder does not exist
        names = os.listdir(folder)
    for name in names:
        with contextlib.suppress(OSError):  # another rank has just removed the file
            mode = os.stat(folder / name).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RequestError(f"{folder / name} is neither a file nor a folder: remove it")


def read_part(path: Path) -> dict[str, Any]:
    """The description of one part of a store that may not be finished.

    Raises:
        RequestError: the description is damaged.
        OSError: the description cannot be read.
    """
    part = _mapping(path)
    _check_part(path, path.parent, part)
    return part


def _mapping(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        _damaged(path, str(error) if isinstance(error, ValueError) else "too deep")
    if not isinstance(value, dict):
        _damaged(path, "not an object")
    if value.pop(HASH, None) not in (None, sealed(value)[HASH]):
        _damaged(path, "it does not match its own hash")
    return value


def _check_part(path: Path, folder: Path, part: dict[str, Any]) -> None:
    _check_counts(path, part, (*_COUNTS, *(name for name in _LATER_COUNTS if name in part)))
    if not isinstance(part.get("file"), str):
        _damaged(path, "file")
    confined(folder, f"{part['file']}.bin")
    confined(folder, f"{part['file']}.ends")
    if part.get("ends_dtype") not in ("<u4", "<u8"):
        _damaged(path, "ends_dtype")
    for name in ("key", "bin_hash", "ends_hash"):
        if not isinstance(part.get(name), str):
            _damaged(path, name)
    records = part.get("bad_records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        _damaged(path, "bad_records")


def _check_counts(path: Path, value: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        number = value.get(name)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
            _damaged(path, name)


def _damaged(path: Path, what: str) -> NoReturn:
    raise RequestError(
        f"{path} is damaged ({what[:200]}): remove the folder {path.parent}, and it is built again"
    )
