"""What describes a token store on the disk, read as data of a stranger: every field is checked before it is used.

``manifest.json`` describes the store, ``part-000000.json`` one part of it. Both are JSON of version 1; a part's
description is repeated in the manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

from lmcore.errors import RequestError
from lmcore.names import confined

MANIFEST = "manifest.json"
STORE_VERSION = 1
_COUNTS = ("tokens", "documents", "bytes", "bad", "records")


def fingerprint_of(identity: dict[str, Any]) -> str:
    """Of a store: 32 hex digits over all that its tokens depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store.

    Raises:
        RequestError: there is none, it is damaged, of another version, or names files outside of ``folder``.
    """
    path = folder / MANIFEST
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
    for name in ("tokens", "documents"):
        if manifest[name] != sum(part[name] for part in parts):
            _damaged(path, name)
    return manifest


def read_part(path: Path) -> dict[str, Any]:
    """The description of one part of a store that may not be finished.

    Raises:
        RequestError: it is damaged.
        OSError: it cannot be read.
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
    return value if isinstance(value, dict) else _damaged(path, "not an object")


def _check_part(path: Path, folder: Path, part: dict[str, Any]) -> None:
    _check_counts(path, part, _COUNTS)
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
