"""What the user wrote under ``data.train`` -> the files of each source.

Comes in: paths, globs, folders, ``stdlib``, ``hf://...`` or mappings. Goes out: one :class:`Source`
for each, its files sorted by relative path. What always holds: no file is in two places (also not by a link);
every refusal names the value and the remedy.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
import statistics
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcore.data.text import formats
from lmcore.data.text.compression import CODECS, chunks, encoding_is_wide
from lmcore.errors import RequestError

HUB = "hf://"
FOREIGN_SUFFIXES = (".bin", ".idx", ".npy", ".ds", ".index")
"""Files of tokens that other programs wrote: passed on by :func:`resolve`, never read as text."""
UNITS = ("auto", "line", "paragraph", "file")

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
_PROSE = frozenset([".txt", ".text", ".log", ".tex", ".srt", ".eml"])
_CODE = frozenset(
    re.findall(
        r"\S+",
        """
        .py .pyi .c .h .cc .cpp .cxx .hh .hpp .cu .cs .java .kt .scala .go .rs .rb .php .pl .pm .lua .jl .r .m
        .swift .js .jsx .mjs .ts .tsx .vue .sh .bash .zsh .ps1 .sql .hs .ml .mli .ex .exs .erl .clj .el .lisp
        .scm .f90 .f .asm .s .v .vhd .dart .nim .zig .css .scss .html .htm .xml .md .markdown .rst .adoc .org
        .yaml .yml .toml .ini .cfg .cmake
        """,
    )
)
_SMALL_FILE_BYTES = 2**20
_STDLIB_WITHOUT = frozenset(
    ["test", "tests", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo", "__pycache__"]
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of the corpus.

    ``paths`` are absolute (or ``hf://...``); ``relative_paths`` are the same
    files as the user sees them, below the folder that was named: they do not change when the corpus is moved.
    ``unit`` is never ``auto`` here; ``unit_reason`` says how it was decided. ``ignored`` counts the files of
    named folders that are of no known kind.
    """

    name: str
    paths: tuple[str, ...]
    relative_paths: tuple[str, ...] = ()
    weight: float | None = None
    text_field: str = "text"
    unit: str = "line"
    unit_reason: str = ""
    encoding: str = "utf-8"
    ignored: int = 0


def file_kind(path: str) -> str | None:
    """``jsonl``, ``json``, ``parquet``, ``csv``, ``tsv``, or ``None`` for plain text; by the file's name."""
    return _KINDS.get(_suffix(path))


def _suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in CODECS else suffix


def resolve(
    entries: str | Iterable[str | Mapping[str, Any]],
    *,
    text_field: str = "text",
    unit: str = "auto",
    encoding: str = "utf-8",
) -> list[Source]:
    """One :class:`Source` for each entry; the keyword arguments are the defaults of entries that do not say.

    An entry is a path, a folder (all files of known kinds in it, hidden ones aside; or a token store), a glob
    (``**`` for any depth; all files that match), ``stdlib`` (the Python standard library's own source),
    ``hf://name`` (passed on), or a mapping with ``path`` or ``paths`` and ``weight``, ``name``,
    ``text_field``, ``unit``, ``encoding``.

    Raises:
        RequestError: no such file, a glob or folder without files, the same file twice, an unknown encoding
            or unit, a text field that the first records do not have.
    """
    sources: list[Source] = []
    owners: dict[str, str] = {}
    for entry in [entries] if isinstance(entries, str) else entries:
        source = _source(entry, text_field, unit, encoding)
        for path in source.paths:
            real = os.path.realpath(path)
            if not path.startswith(HUB) and owners.setdefault(real, path) is not path:
                raise RequestError(f"{path} is in the corpus twice (also as {owners[real]}): give it once")
        taken = [other.name for other in sources]
        if source.name in taken:
            if isinstance(entry, Mapping) and entry.get("name"):
                raise RequestError(f"two sources are called {source.name!r}: give each its own name")
            names = (f"{source.name}-{number}" for number in itertools.count(2))
            source = _renamed(source, next(name for name in names if name not in taken))
        sources.append(source)
    return sources


def _renamed(source: Source, name: str) -> Source:
    return Source(**{**source.__dict__, "name": name})


def _source(entry: str | Mapping[str, Any], text_field: str, unit: str, encoding: str) -> Source:
    options: dict[str, Any] = {"path": entry} if isinstance(entry, str) else dict(entry)
    known = ("path", "paths", "weight", "name", "text_field", "unit", "encoding")
    for key in options:
        if key not in known:
            raise RequestError(
                f"a source has no option {key!r}{_nearest(str(key), known)}: {', '.join(known)}"
            )
    patterns = [p for key in ("path", "paths") for p in _as_list(options.get(key))]
    if not patterns:
        raise RequestError(f"a source without a path: {options!r}")
    unit = options.get("unit") or unit
    encoding = options.get("encoding") or encoding
    text_field = options.get("text_field") or text_field
    weight = options.get("weight")
    if unit not in UNITS:
        raise RequestError(f"unit {unit!r} is not known{_nearest(unit, UNITS)}: {', '.join(UNITS)}")
    if weight is not None and not (isinstance(weight, int | float) and weight > 0):
        raise RequestError(f"the weight of {patterns[0]} must be a positive number, not {weight!r}")
    encoding = _checked_encoding(encoding)
    files: dict[str, str] = {}
    ignored = 0
    for pattern in patterns:
        found, others = _expand(str(pattern))
        ignored += others
        for path, relative in found:
            files.setdefault(path, relative)
    ordered = sorted(files.items(), key=lambda item: (item[1], item[0]))
    paths = tuple(path for path, _ in ordered)
    chosen, reason = (unit, "as asked") if unit != "auto" else _auto_unit(paths, encoding)
    source = Source(
        name=str(options.get("name") or _name(str(patterns[0]))),
        paths=paths,
        relative_paths=tuple(relative for _, relative in ordered),
        weight=None if weight is None else float(weight),
        text_field=text_field,
        unit=chosen,
        unit_reason=reason,
        encoding=encoding,
        ignored=ignored,
    )
    _check_field(source)
    return source


def _as_list(value: Any) -> Sequence[Any]:
    return [] if value is None else [value] if isinstance(value, str | os.PathLike) else list(value)


def _nearest(word: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, [str(name) for name in names], n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _checked_encoding(encoding: str) -> str:
    try:
        encoding_is_wide(encoding)
    except (LookupError, UnicodeError, TypeError):
        raise RequestError(
            f"encoding {encoding!r} is not known: utf-8, cp932 (Shift-JIS), euc_jp, utf-16, latin-1, ..."
        ) from None
    # A byte order mark is removed anyway, and only plain utf-8 can be cut into parts.
    return "utf-8" if encoding.lower().replace("_", "-") in ("utf-8-sig", "utf8") else encoding


def _expand(pattern: str) -> tuple[list[tuple[str, str]], int]:
    """[(absolute path, relative path)], and the number of files in a folder that are of no known kind."""
    if pattern == "stdlib":
        return _stdlib(), 0
    if pattern == "-":
        raise RequestError(
            "'-' (standard input) is not a corpus, because a resume and a second epoch could not read it again:"
            " write it to a file (`... > corpus.txt`; compressed files are read as they are) and name that file"
        )
    if pattern.startswith(HUB):
        return [(pattern, pattern)], 0
    if re.match(r"[a-z0-9]+://", pattern):
        raise RequestError(
            f"{pattern}: remote files are not read, because a run must be repeatable without the network:"
            " copy or mount them, or give a Hub data set as hf://name"
        )
    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isdir(path):
        everything = list(_walk(path))
        if os.path.join(path, "manifest.json") in everything:  # a token store of ours: its tokens, in order
            parts = [p for p in everything if os.path.dirname(p) == path and p.endswith(".bin")]
            if parts:
                return [(_readable(p), os.path.basename(p)) for p in parts], 0
        found = [p for p in everything if _suffix(p) in _PROSE or _suffix(p) in _CODE or file_kind(p)]
        if not found:
            example = (
                f"; it holds {len(everything)} files like {os.path.relpath(everything[0], path)}"
                if everything
                else ""
            )
            raise RequestError(
                f"folder {pattern} has no file of a known kind (.txt, .jsonl, .parquet, ...){example}: a glob"
                f" such as '{pattern.rstrip('/')}/**' takes every file"
            )
        return [(_readable(p), os.path.relpath(p, path)) for p in found], len(everything) - len(found)
    if os.path.isfile(path):
        return [(_readable(path), os.path.basename(path))], 0
    if glob.has_magic(pattern):
        matches = [os.path.abspath(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True)]
        found = [p for p in matches if os.path.isfile(p)]
        if not found:
            only = (
                f" (only folders: {os.path.basename(matches[0])}, ...; '**' goes into them)"
                if matches
                else ""
            )
            raise RequestError(f"no file matches {pattern!r}{only}; the current folder is {os.getcwd()}")
        root = path
        while glob.has_magic(root):
            root = os.path.dirname(root)
        return [(_readable(p), os.path.relpath(p, root)) for p in found], 0
    if os.path.exists(path):
        raise RequestError(
            f"{pattern} is not a regular file and cannot be read twice: write its text to a file"
        )
    folder, name = os.path.split(path)
    siblings = os.listdir(folder) if os.path.isdir(folder) else []
    raise RequestError(f"no such file or folder: {pattern}{_nearest(name, siblings)}")


def _readable(path: str) -> str:
    if not os.access(path, os.R_OK):
        raise RequestError(f"{path} may not be read by this user (chmod u+r)")
    return path


def _walk(folder: str) -> Iterator[str]:
    """Every file below, links followed, hidden ones and Python's caches aside."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        yield from (os.path.join(here, name) for name in sorted(files) if not name.startswith("."))


def _stdlib() -> list[tuple[str, str]]:
    """The standard library's own source: about 12 MB of Python on every machine, no download."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for here, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _STDLIB_WITHOUT and not f.startswith("."))
        found += [os.path.join(here, name) for name in files if name.endswith(".py")]
    if not found:
        raise RequestError(
            f"the standard library's source is not at {root}: name your own text in data.train"
        )
    return [(path, os.path.relpath(path, root)) for path in found]


def _name(pattern: str) -> str:
    """A name for the metrics: what stands before the first wildcard or suffix."""
    fixed = pattern.removeprefix(HUB).rstrip("/")
    while glob.has_magic(os.path.basename(fixed)):
        stem = re.split(r"[*?\[]", os.path.basename(fixed))[0].strip("._- ")
        fixed = os.path.join(os.path.dirname(fixed), stem) if stem else os.path.dirname(fixed)
    base = os.path.basename(os.path.abspath(fixed) if fixed in ("", ".", "..") else fixed)
    return re.sub(r"[^\w.-]+", "-", base.split(".")[0] or base).strip("-") or "source"


def _auto_unit(paths: Sequence[str], encoding: str) -> tuple[str, str]:
    """The stated rule of ``unit: auto`` (see :mod:`lmcore.data.text.documents`)."""
    plain = [p for p in paths if not file_kind(p) and not p.startswith(HUB)]
    plain = [p for p in plain if not p.endswith(FOREIGN_SUFFIXES)]
    if not plain:
        return "line", "auto: no plain text files"
    if 2 * sum(_suffix(p) in _CODE for p in plain) > len(plain):
        return "file", "auto: mostly source code or markup"
    if len(plain) > 1 and statistics.median(os.path.getsize(p) for p in plain) <= _SMALL_FILE_BYTES:
        return "file", f"auto: {len(plain)} files, the median at most 1 MiB"
    head = b""
    with open(plain[0], "rb") as file:
        for piece in chunks(file, CODECS.get(os.path.splitext(plain[0])[1].lower())):
            head += piece if isinstance(piece, bytes) else b""
            if len(head) >= _SMALL_FILE_BYTES:
                break
    text = head[:_SMALL_FILE_BYTES].decode(encoding, "replace")
    if re.search(r"\S[^\n]*\n[ \t\r]*\n\s*\S", text):
        return "paragraph", f"auto: blank lines in {os.path.basename(plain[0])}"
    return "line", f"auto: no blank lines in {os.path.basename(plain[0])}"


def _check_field(source: Source) -> None:
    """Fail before anything is built if the first records do not have the field at all."""
    path = next((p for p in source.paths if file_kind(p)), None)
    if path is None:
        return
    compression = CODECS.get(os.path.splitext(path)[1].lower())
    names = formats.field_names(path, file_kind(path) or "", compression, source.encoding)
    if names and source.text_field not in names:
        raise RequestError(
            f"{path}: the records have no field {source.text_field!r}"
            f"{_nearest(source.text_field, names)}; it has {', '.join(map(repr, names[:12]))}: set"
            " data.text_field"
        )
