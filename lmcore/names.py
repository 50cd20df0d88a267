"""Checks of names from options or files that become parts of a path: a path must not lead out of its folder."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Final

from lmcore.errors import RequestError

MAX_NAME_BYTES: Final = 200
"""File systems allow 255; suffixes and temporary names need some of them."""


def safe_name(name: str) -> str:
    """Return ``name`` if it is safe as one part of a path: letters and digits of any script, ``.``, ``_``, ``-``, ``+``, ``=``.

    It must begin with a letter, a digit or ``_``, which excludes hidden files, options and ``..``.

    Raises:
        RequestError: the name is not safe.
    """
    fine = (
        isinstance(name, str)
        and re.fullmatch(r"\w[\w.+=\-]*", name) is not None
        # Else two spellings of a name would be one file on some file systems and two on others
        and unicodedata.normalize("NFC", name) == name
        and name.isprintable()
        and not name.endswith(".")
        and len(name.encode(errors="replace")) <= MAX_NAME_BYTES
    )
    if not fine:
        shown = repr(name)[:80]
        raise RequestError(
            f"{shown} cannot be a name: letters, digits, '.', '_', '-', '+', '=' only, beginning with a "
            f"letter or digit, at most {MAX_NAME_BYTES} bytes"
        )
    return name


def confined(root: Path | str, relative: str) -> Path:
    """Return ``root/relative`` if every part is a :func:`safe_name` and no symbolic link leads out of ``root``.

    Raises:
        RequestError: otherwise.
    """
    parts = relative.split("/") if isinstance(relative, str) else [relative]
    path = Path(root).joinpath(*(safe_name(part) for part in parts))
    real_root, real = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath([real_root, real]) != real_root or real == real_root:
        raise RequestError(f"{relative!r} leads out of {root}")
    return path
