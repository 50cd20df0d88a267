"""Entries of ``data.train`` (paths, globs, folders, ``stdlib``, ``hf://...``, mappings) -> the files of each source.

Files are sorted by their path below the given folder. No file may be in two sources, not even by a link. A folder
is walked once even if several links lead to it. Run folders, token stores, checkpoints and exports inside are not read as
text.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import itertools
import os
import re
import stat
import statistics
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lmcore.conventions import SOURCE_KEYS
from lmcore.data.text import formats, listing, remote
from lmcore.data.text.compression import CODECS, SURROGATE, Damage, chunks, compression_of, encoding_is_wide
from lmcore.data.text.signatures import HEAD_BYTES, signature
from lmcore.errors import RequestError
from lmcore.humanize import amount, did_you_mean
from lmcore.names import MAX_NAME_BYTES
from lmcore.storage import is_url

HUB = "hf://"
FOREIGN_SUFFIXES = (".bin", ".idx", ".npy", ".ds", ".index")
"""Endings of token files of other programs: :func:`resolve_sources` passes them on, they are never read as text."""
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
_SYSTEM_FOLDERS = ("/proc", "/sys", "/dev")
"""Folders without text files; some of their files never end."""
_RUN_FILES = frozenset([
    "status.json", "metrics.jsonl", "config.yaml", "train.log", "report.html", "comparison.html", "plan.json", "stores.json",
    "checkpoints", "tokenizer", "export", "logs", "profile", "sample",
    "tensorboard", "wandb", "mlruns", "dvclive", "swanlog", "swanlab", "aim", "trackio",
])  # fmt: skip
"""What a run and its trackers write to the run folder (hidden files are never read)."""
_DATASET_FILES = frozenset(["dataset_info.json", "state.json", "dataset_dict.json"])
"""What ``datasets.save_to_disk`` writes next to its Arrow files; these would be read as records."""
_A_RUN = "the files of a run"
_SPLITS = "the splits of data.valid_fraction"
_SPLIT_NAME = re.compile(
    r"(?<![a-z])(?:(train)(?:ing)?|val|valid|validation|dev|eval|test)(?![a-z])", re.IGNORECASE
)
"""Matches the split in the file name of a dataset: data/train-00000-of-00002.parquet, Stories-valid.txt."""


Entry = str | Mapping[str, Any] | tuple[str, ...]
"""A path, glob, folder or name; a mapping with options; or files that were named one by one."""
_E = TypeVar("_E", bound=Entry)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of the corpus.

    Attributes:
        paths: absolute paths, or one ``hf://...``.
        relative_paths: the same files relative to the given folder; they do not change when the corpus is moved.
        unit: ``line``, ``paragraph`` or ``file``; ``unit_reason`` says how it was decided.
        ignored: number of files of unknown kinds in the given folders.
        notes: lines for the user: what was left out, and what was read although it was probably not meant.
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
    notes: tuple[str, ...] = ()


def file_kind(path: str) -> str | None:
    """``jsonl``, ``json``, ``parquet``, ``csv``, ``tsv``, or ``None`` for plain text, by the file name."""
    return _KINDS.get(_suffix(path))


def is_plain_text(source: Source) -> bool:
    """Whether any file of the source is plain text, to which its unit applies."""
    return bool(_plain(source.paths))


def _plain(paths: Iterable[str]) -> list[str]:
    return [
        p for p in paths if not file_kind(p) and not p.startswith(HUB) and not p.endswith(FOREIGN_SUFFIXES)
    ]


@functools.lru_cache(maxsize=2**18)
def _suffix(path: str) -> str:
    """``.txt`` of ``a.TXT`` and of ``a.txt.gz``; empty for ``a`` and ``.a``."""
    names = path.rpartition("/")[2].lower().lstrip(".").split(".")
    if len(names) > 1 and f".{names[-1]}" in CODECS:
        names.pop()
    return f".{names[-1]}" if len(names) > 1 else ""


def resolve_sources(
    entries: str | Iterable[str | Mapping[str, Any]],
    *,
    text_field: str = "text",
    unit: str = "auto",
    encoding: str = "utf-8",
    join_files: bool = False,
) -> list[Source]:
    """The sources that the entries name.

    Args:
        entries: each is a path, a folder (all files of known kinds in it except hidden ones; or a token store), a
            glob (``**`` for any depth; all files that match), ``stdlib`` (the Python standard library's own source),
            ``hf://name`` (passed on), or a mapping with ``path`` or ``paths`` and ``weight``, ``name``,
            ``text_field``, ``unit``, ``encoding``.
        text_field, unit, encoding: defaults for entries that do not set them.
        join_files: files that are named one by one form one source, so that a glob gives the same source whether or not
            the shell has expanded it. A mapping is always a source of its own.

    Raises:
        RequestError: no such file, a glob or folder without files, the same file twice, an unknown encoding or unit,
            a text field that the first records do not have.

    Example:
        >>> [source] = resolve_sources(["corpus/*.txt"])
        >>> source.name, source.relative_paths
        ('corpus', ('a.txt', 'b.txt'))
    """
    listed: list[Entry] = [entries] if isinstance(entries, str) else list(entries)
    asked = repr((listed, text_field, unit, encoding, join_files))
    work = functools.partial(_resolve, listed, text_field, unit, encoding, join_files)
    return list(listing.once(("sources", asked), work))


def _resolve(
    listed: list[Entry], text_field: str, unit: str, encoding: str, join_files: bool
) -> tuple[Source, ...]:
    sources: list[Source] = []
    owners: dict[tuple[int, int], str] = {}
    taken: set[str] = set()
    entries, notes = _joined(listed) if join_files else (listed, [])
    for entry in entries:
        source = _source(entry, text_field, unit, encoding)
        for path in source.paths:
            identity = file_identity(path)
            if identity in owners:
                raise RequestError(
                    f"{path} is in the corpus twice (also as {owners[identity]}): give it once"
                )
            if identity is not None:
                owners[identity] = path
        if source.name in taken:
            if isinstance(entry, Mapping) and entry.get("name"):
                raise RequestError(f"two sources are called {source.name!r}: give each its own name")
            names = (f"{source.name}-{number}" for number in itertools.count(2))
            source = replace(source, name=next(name for name in names if name not in taken))
        taken.add(source.name)
        sources.append(source)
    if notes:
        sources[0] = replace(sources[0], notes=tuple(dict.fromkeys([*notes, *sources[0].notes])))
    return tuple(sources)


def file_identity(path: str) -> tuple[int, int] | None:
    """(device, inode) of a file, following links; ``None`` if there is no such file."""
    found = listing.stat(path)
    return None if found is None else (found.st_dev, found.st_ino)


def without_run_files(entries: Sequence[_E], store_dir: str | None = None) -> tuple[list[_E], list[str]]:
    """The entries without what runs have written next to the text, and notes about what was left out.

    When a shell expands ``folder/*``, it includes these files, and the same command must still resume the run. If no text
    file is named, or no text file would be left, nothing is left out: then the entries are taken as intended.

    Args:
        store_dir: folder of the token stores of runs. A store in it, next to a text file, contains the same text again.
    """
    files = [entry for entry in entries if isinstance(entry, str) and _is_text_file(entry)]
    text, notes = _without_run_files([_absolute(file) for file in files])
    if not text:
        return list(entries), []
    kept, beside = set(text), set(map(os.path.dirname, text))
    left_out: set[str] = {file for file in files if _absolute(file) not in kept}
    for entry in entries:
        if isinstance(entry, str) and (note := _note_of_training_folder(entry, beside, store_dir)):
            left_out.add(entry)
            notes.append(note)
    rest = [entry for entry in entries if not (isinstance(entry, str) and entry in left_out)]
    return rest, list(dict.fromkeys(notes))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _joined(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """The entries with all files that were named one by one joined into one entry, at the place of the first; and notes."""
    entries, notes = without_run_files(entries)
    files = [entry for entry in entries if isinstance(entry, str) and _is_text_file(entry)]
    text = [_absolute(file) for file in files]
    if len(files) < 2 or len(set(text)) < len(files):
        return entries, notes
    joined = _pattern_of(text) or tuple(text)
    chosen = set(files)
    rest = [entry for entry in entries if not (isinstance(entry, str) and entry in chosen)]
    first = entries.index(files[0])
    return [*rest[:first], joined, *rest[first:]], notes


def _note_of_training_folder(entry: str, beside: Collection[str], store_dir: str | None) -> str | None:
    """A note if a folder inside one of the folders ``beside`` contains only what a training run has written."""
    path = _absolute(entry)
    if is_url(entry) or os.path.dirname(path) not in beside or not os.path.isdir(path):
        return None
    kept, notes = _without_run_files([path])
    if not kept:
        return notes[0]
    with contextlib.suppress(OSError):  # opening it reports the error
        if _is_token_store(os.listdir(path)):
            if store_dir is not None and os.path.realpath(os.path.dirname(path)) == os.path.realpath(
                os.path.expanduser(store_dir)
            ):
                return f"left out: {path}, a token store of data.store_dir"
            return None  # the user may want to train on its tokens
    walk = _Walk(path)
    if any(map(_is_known, walk.files())) or not walk.notes:
        return None
    return f"left out: {path}, nothing but what a training has written"


def _is_known(path: str) -> bool:
    return _suffix(path) in _PROSE or _suffix(path) in _CODE or file_kind(path) is not None


def _is_text_file(entry: str) -> bool:
    if is_url(entry):
        return False  # shells do not expand globs of URLs
    path = os.path.expanduser(entry)
    found = listing.stat(path)
    return not path.endswith(FOREIGN_SUFFIXES) and found is not None and stat.S_ISREG(found.st_mode)


def _common_folder(files: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(_absolute(file)) for file in files])


def _pattern_of(files: Sequence[str]) -> str | None:
    """The glob that a shell would expand to exactly these files, if there is one."""
    folder = _common_folder(files)
    relative = [os.path.relpath(_absolute(file), folder) for file in files]
    names = [os.path.basename(path) for path in relative]
    before = _common_start(names)
    after = _common_start([name[len(before) :][::-1] for name in names])[::-1]
    suffix = after[after.find(".") :] if "." in after else ""
    depths = {path.count(os.sep) for path in relative}
    folders = "*/" * depths.pop() if len(depths) == 1 else "**/"
    for pattern in (f"*{suffix}", f"{glob.escape(before)}*{suffix}"):
        whole = os.path.join(folder, folders + pattern)
        if set(_glob(whole)[0]) == {os.path.join(folder, path) for path in relative}:
            return whole
    return None


def _common_start(words: Sequence[str]) -> str:
    low, high = min(words), max(words)
    return low[: next((index for index, one in enumerate(low) if one != high[index]), len(low))]


def _source(entry: Entry, text_field: str, unit: str, encoding: str) -> Source:
    folder = None
    if isinstance(entry, tuple):
        folder = _common_folder(entry)
        options: dict[str, Any] = {"paths": entry, "name": _name(folder)}
    elif isinstance(entry, str | os.PathLike):
        options = {"path": entry}
    elif isinstance(entry, Mapping):
        options = dict(entry)
    else:
        raise RequestError(f"a source is a path, a glob, a folder or a mapping with 'path', not {entry!r}")
    for key in options:
        if key not in SOURCE_KEYS:
            raise RequestError(
                f"unknown option {key!r} of a source; choose from {', '.join(SOURCE_KEYS)}"
                f"{did_you_mean(str(key), SOURCE_KEYS)}"
            )
    patterns = [p for key in ("path", "paths") for p in _as_list(options.get(key))]
    if not patterns:
        raise RequestError(f"a source without a path: {options!r}")
    unit = options.get("unit") or unit
    encoding = options.get("encoding") or encoding
    text_field = options.get("text_field") or text_field
    weight = options.get("weight")
    if unit not in UNITS:
        raise RequestError(
            f"unknown unit {unit!r}; choose from {', '.join(UNITS)}{did_you_mean(str(unit), UNITS)}"
        )
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 < weight < float("inf")):
        raise RequestError(f"the weight of {patterns[0]} must be a positive number, not {weight!r}")
    encoding = _checked_encoding(encoding)
    name = _checked_name(options["name"]) if options.get("name") else _name(str(patterns[0]))
    files: dict[str, str] = {}
    ignored = 0
    notes: list[str] = []
    for pattern in patterns:
        if not isinstance(pattern, str | os.PathLike):
            raise RequestError(f"a path must be a text, not {pattern!r}")
        named = os.fspath(pattern)
        found = listing.once(("files", named), functools.partial(_expand, named))
        ignored += found.ignored
        notes += found.notes
        for path, relative in found.files:
            files.setdefault(path, relative if folder is None else _below(path, folder))
    ordered = sorted(files.items(), key=lambda item: (item[1], item[0]))
    paths = tuple(path for path, _ in ordered)
    notes += _splits_note(relative for _, relative in ordered)
    chosen, reason = (unit, "as asked") if unit != "auto" else _auto_unit(paths, encoding)
    source = Source(
        name=name,
        paths=paths,
        relative_paths=tuple(_utf8_name(relative) for _, relative in ordered),
        weight=None if weight is None else float(weight),
        text_field=text_field,
        unit=chosen,
        unit_reason=reason,
        encoding=encoding,
        ignored=ignored,
        notes=tuple(dict.fromkeys(notes)),
    )
    _check_field(source, own=bool(options.get("text_field")))
    return source


def _splits_note(relative_paths: Iterable[str]) -> list[str]:
    """A note if files of a training split come with files of validation or test splits that are named alike.

    This happens with a copy of a Hub dataset. Source code is not checked: there train.py and test.py are one program."""
    training: dict[str, str] = {}
    others: dict[str, str] = {}
    for path in relative_paths:
        split = _SPLIT_NAME.search(path)
        if split and (file_kind(path) or _suffix(path) in _PROSE):
            rest = re.sub(r"\d+", "", path[: split.start()] + "*" + path[split.end() :])
            (training if split[1] else others).setdefault(rest, path)
    for rest in sorted(training.keys() & others.keys()):
        return [
            f"several splits are read as one text, {others[rest]} like {training[rest]}: to keep them apart, give each "
            "its own glob (such as --data.train 'FOLDER/**/*train*' --data.valid 'FOLDER/**/*valid*')"
        ]
    return []


def _as_list(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _utf8_name(name: str) -> str:
    """A file name with bytes that are not UTF-8 escaped, so that it can be written to JSON and UTF-8 files."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _checked_name(name: Any) -> str:
    """The name, if it is valid as a single folder name.

    Raises:
        RequestError: it is a path, begins with a dot, is too long, or has control characters.
    """
    given = str(name)
    if given in (".", "..") or re.search(r"[/\\]", given) or not given.isprintable() or given.startswith("."):
        raise RequestError(
            f"the name of a source becomes a folder name: {given!r} must be without / and \\, without control "
            "characters, and must not begin with a dot"
        )
    if len(given.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise RequestError(
            f"the name of a source may have {MAX_NAME_BYTES} bytes, {given[:40]!r}... has more: shorten it"
        )
    return given


def _checked_encoding(encoding: Any) -> str:
    try:
        wide = encoding_is_wide(encoding)
        decoder = codecs.getincrementaldecoder(encoding)(SURROGATE)
        # Not every codec is a text encoding, and some support only their own error handlers.
        if decoder.decode("a\n".encode(encoding), True) != "a\n":
            raise LookupError
        if not wide:
            b"\xff".decode(encoding, SURROGATE)
    except (LookupError, UnicodeError, TypeError, ValueError):
        raise RequestError(
            f"encoding {encoding!r} is not known: utf-8, cp932 (Shift-JIS), euc_jp, utf-16, latin-1, ..."
        ) from None
    # A byte order mark is removed in any case, and only plain utf-8 can be cut into parts.
    return "utf-8" if encoding.lower().replace("_", "-") in ("utf-8-sig", "utf8") else str(encoding)


# ---- entries to files ----


@dataclass(frozen=True)
class _Found:
    """Files as [(absolute path, path below the given folder)], and what was left out."""

    files: list[tuple[str, str]]
    ignored: int = 0
    notes: tuple[str, ...] = ()


def _expand(pattern: str) -> _Found:
    if not pattern.strip():
        raise RequestError("a path must not be empty: the current folder is '.'")
    if pattern == "stdlib":
        return _Found(_stdlib())
    if pattern == "-":
        raise RequestError(
            "'-' (standard input) is not a corpus, because a resume and a second epoch could not read it again:"
            " write it to a file (`... > corpus.txt`; compressed files are read as they are) and name that file"
        )
    if pattern.startswith(HUB):
        return _Found([(pattern, pattern)])
    if is_url(pattern):
        return _objects(pattern)
    if "\0" in pattern:
        raise RequestError(f"{pattern!r} is not a path: it has a NUL character")
    path = _absolute(pattern)
    try:
        if os.path.isdir(path):
            return _folder(path, pattern)
        if os.path.isfile(path):
            return _Found([(_checked_content(_readable(path)), os.path.basename(path))])
        if glob.has_magic(pattern):
            return _matches(pattern)
        if os.path.exists(path):
            raise RequestError(
                f"{pattern} is not a regular file and cannot be read twice: write its text to a file"
            )
        if os.path.islink(path):
            raise RequestError(f"{pattern} is a link to {os.readlink(path)}, which is not there")
        folder, name = os.path.split(path)
        siblings = os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise RequestError(f"{pattern} cannot be read: {error.strerror or error}") from None
    near = did_you_mean(name, siblings, cutoff=0.7)  # 0.7, so that an equal ending such as .txt is not enough
    raise RequestError(f"no such file or folder: {pattern}{near}")


def _objects(pattern: str) -> _Found:
    """The objects that a URL names; in a folder, only those of known kinds."""
    found = remote.expand(pattern)
    named = glob.has_magic(pattern) or found[0][0] == pattern
    kept = [(url, name) for url, name in found if named or _is_known(name)]
    if not kept:
        raise RequestError(
            f"{pattern} has no object of a known kind (.txt, .jsonl, .parquet, ...); it has {len(found)} like "
            f"{found[0][1]}: a glob such as '{pattern.rstrip('/')}/**' takes every object"
        )
    if tokens := next((url for url, _ in kept if url.endswith(FOREIGN_SUFFIXES)), None):
        raise RequestError(f"{tokens} holds tokens: token stores are read from a local disk; download it")
    return _Found(kept, len(found) - len(kept))


def _folder(path: str, pattern: str) -> _Found:
    names = os.listdir(path)
    parts = sorted(name for name in names if name.endswith(".bin"))
    if parts and "manifest.json" in names:  # a token store: its tokens, in order
        return _Found([(_readable(os.path.join(path, name)), name) for name in parts])
    walk = _Walk(path)
    everything = list(walk.files())
    notes = walk.notes + _note_of_missing(walk.missing)
    found = [path for path in everything if _is_known(path)]
    arrow = next((file for file in everything if file.endswith(".arrow")), None)
    if arrow is not None and {os.path.basename(file) for file in found} <= _DATASET_FILES:
        raise RequestError(
            f"{pattern} is a dataset of datasets.save_to_disk, whose Arrow files ({os.path.basename(arrow)}) are not read: "
            "write it as parquet, load_from_disk(FOLDER).to_parquet(FILE), each split by itself"
        )
    if not found:
        example = (
            f"; it has {amount(len(everything), 'file')} like {os.path.relpath(everything[0], path)}"
            if everything
            else ""
        )
        left_out = f" ({notes[0]})" if notes else ""
        raise RequestError(
            f"folder {pattern} has no file of a known kind (.txt, .jsonl, .parquet, ...){example}{left_out}: a glob"
            f" such as '{pattern.rstrip('/')}/**' takes every file"
        )
    files = [(_readable(p), _below(p, path)) for p in found]
    return _Found(files, len(everything) - len(found), tuple(notes))


def _note_of_missing(links: Sequence[str]) -> list[str]:
    """A note about links without a target.

    A disk that is not mounted, or files that were not fetched, must not silently make the corpus smaller."""
    if not links:
        return []
    more = f", and {amount(len(links) - 1, 'other link')} without a target" if links[1:] else ""
    return [f"left out: {links[0]}, a link to {os.readlink(links[0])}, which is not there{more}"]


def _matches(pattern: str) -> _Found:
    matches, notes, root = _glob(pattern)
    found = [path for path in matches if os.path.isfile(path)]
    notes += _note_of_missing([path for path in matches if os.path.islink(path) and not os.path.exists(path)])
    if not found:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.scandir(root).close()  # raises if the folder may not be listed; glob takes it for empty
        only = f" (only folders: {os.path.basename(matches[0])}, ...; '**' goes into them)" if matches else ""
        left_out = f" ({notes[0]})" if notes else ""
        raise RequestError(
            f"no file matches {pattern!r}{only}{left_out}; the current folder is {os.getcwd()}"
        )
    return _Found([(_readable(path), _below(path, root)) for path in found], 0, tuple(notes))


def _glob(pattern: str) -> tuple[list[str], list[str], str]:
    """(absolute paths, notes, the folder above the first wildcard). With ``**`` each folder is walked once."""
    parts = _absolute(pattern).split(os.sep)
    root, first = os.sep, 1
    while first < len(parts) - 1:
        below = os.path.join(root, parts[first])
        # A folder may have brackets in its own name
        if glob.has_magic(parts[first]) and not os.path.isdir(below):
            break
        root, first = below, first + 1
    rest = parts[first:]
    if "**" not in rest:
        matches = [os.path.join(root, path) for path in glob.glob(os.path.join(*rest), root_dir=root)]
        return *_without_run_files(matches), root
    walk = _Walk(root)
    found = [path for path in walk.files() if remote.matches_glob(_below(path, root).split(os.sep), rest)]
    return found, walk.notes + _note_of_missing(walk.missing), root


def _without_run_files(paths: list[str]) -> tuple[list[str], list[str]]:
    """The paths without what a training run has written next to the text, and notes.

    A run folder may be the folder of the text, and ``folder/*`` must give the same text at the next start."""
    written: dict[str, frozenset[str]] = {}
    notes: list[str] = []
    for folder in dict.fromkeys(map(os.path.dirname, paths)):
        try:
            what, names = _written_by_training(os.listdir(folder))
        except OSError:
            what, names = "", frozenset()
        written[folder] = names if what in (_A_RUN, _SPLITS) else frozenset()
        if written[folder]:
            notes.append(f"left out: {folder}, {what}")
    kept = [path for path in paths if os.path.basename(path) not in written[os.path.dirname(path)]]
    return kept, notes if len(kept) < len(paths) else []


def _below(path: str, folder: str) -> str:
    """The path relative to a parent folder, both absolute (os.path.relpath takes ten times as long)."""
    return path[len(folder.rstrip(os.sep)) + 1 :]


def _readable(path: str) -> str:
    if not os.access(path, os.R_OK):
        raise RequestError(f"{path} may not be read by this user (chmod u+r)")
    return path


def _checked_content(path: str) -> str:
    """Refuse (``RequestError``) an individually named file that is not text. In folders and globs it is a bad record."""
    if path.endswith(FOREIGN_SUFFIXES):
        return path
    with open(path, "rb") as file:
        head = next(chunks(file, compression_of(path)), b"")
    if isinstance(head, Damage) or (head.startswith(b"PAR1") and file_kind(path) == "parquet"):
        return path  # reading it reports the error
    if what := signature(head[:HEAD_BYTES], path):
        raise RequestError(f"{path} is not text but {what}")
    return path


class _Walk:
    """The regular files below a folder, except hidden ones and Python's caches.

    Links are followed, but each folder is walked once: first all folders under their own names, then those that are only
    reachable by links. System folders, and what a training run has written, are left out and listed in ``notes``. Links
    without a target, or in a cycle, are in ``missing``.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.notes: list[str] = []
        self.missing: list[str] = []
        self._seen: set[tuple[int, int]] = set()
        # Text may be in /dev/shm: a folder that is named may be read, but a walk from outside does not enter these folders.
        real = os.path.realpath(root)
        self._system = [f for f in _SYSTEM_FOLDERS if not real.startswith(f + "/")]

    def files(self) -> Iterator[str]:
        folders = [(self.root, os.path.realpath(self.root))]
        links: list[str] = []
        while folders or links:
            folder, real = folders.pop() if folders else (links[0], os.path.realpath(links.pop(0)))
            below: list[str] = []
            for entry in self._entries(folder, real):
                try:
                    if entry.is_file():
                        yield entry.path
                    elif entry.is_dir():
                        (links if entry.is_symlink() else below).append(entry.path)
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        self.missing.append(entry.path)
                except OSError:  # a cycle of links
                    self.missing.append(entry.path)
            folders += [(path, os.path.join(real, os.path.basename(path))) for path in reversed(below)]

    def _entries(self, folder: str, real: str) -> list[os.DirEntry[str]]:
        """The readable entries of a folder; empty if it was walked before."""
        identity = file_identity(folder)
        if identity is None or identity in self._seen:
            return []
        self._seen.add(identity)
        if any(real == system or real.startswith(system + "/") for system in self._system):
            self.notes.append(f"left out: {folder}, a folder of the system")
            return []
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            self.notes.append(f"left out: {folder}, which cannot be read ({error.strerror or error})")
            return []
        what, written = _written_by_training([entry.name for entry in entries])
        if what:
            self.notes.append(f"left out: {folder}, {what}")
        return [
            entry
            for entry in entries
            if not (entry.name.startswith(".") or entry.name == "__pycache__" or entry.name in written)
        ]


def _is_token_store(names: Iterable[str]) -> bool:
    """Whether these are the files of a token store, finished or not."""
    there = set(names)
    parts = any(re.fullmatch(r"part-\d+\.(bin|ends|json|claim)", name) for name in there)
    return (parts and not there.isdisjoint(["manifest.json", "plan.json"])) or there == {"plan.json"}


def _written_by_training(names: Sequence[str]) -> tuple[str, frozenset[str]]:
    """(what the folder is, which of its names are not text), if a training run has written to the folder."""
    there = frozenset(names)
    if _is_token_store(there):
        return "a token store", there
    if {"manifest.json", "state.json"} <= there:
        return "a checkpoint", there
    if "tokenizer_config.json" in there or {"config.json", "model.safetensors"} <= there:
        return "a tokenizer or a model", there
    splits = frozenset(name for name in there if re.fullmatch(r"split-[0-9a-f]{16}\.json", name))
    # After `lmcore prepare` there is stores.json, but no status.json
    if there & {"status.json", "stores.json"} and len(there & _RUN_FILES) > 1:
        return _A_RUN, _RUN_FILES | splits
    return (_SPLITS if splits else ""), splits


def _stdlib() -> list[tuple[str, str]]:
    """The source files of the standard library: about 12 MB of Python on every machine, without a download."""
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
    """A name of a source for metrics and folders: the last part of its path before the first wildcard or suffix."""
    fixed = pattern.removeprefix(HUB).rstrip("/")
    while glob.has_magic(os.path.basename(fixed)):
        stem = re.split(r"[*?\[]", os.path.basename(fixed))[0].strip("._- ")
        fixed = os.path.join(os.path.dirname(fixed), stem) if stem else os.path.dirname(fixed)
    base = os.path.basename(os.path.abspath(fixed) if fixed in ("", ".", "..") else fixed)
    name = re.sub(r"[^\w.-]+", "-", base.split(".")[0] or base).strip("-") or "source"
    return name.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore")


# ---- checks of the first file ----


def _auto_unit(paths: Sequence[str], encoding: str) -> tuple[str, str]:
    """(unit, reason) by the rule of ``unit: auto``, see :mod:`lmcore.data.text.documents`."""
    plain = _plain(paths)
    if not plain:
        return "line", "auto: no plain text files"
    if 2 * sum(_suffix(p) in _CODE for p in plain) > len(plain):
        return "file", "auto: mostly source code or markup"
    if len(plain) > 1 and statistics.median(map(_size, plain)) <= _SMALL_FILE_BYTES:
        return "file", f"auto: {len(plain)} files, the median at most 1 MiB"
    head: list[bytes] = []
    try:
        with remote.open_file(plain[0]) as file:
            for piece in chunks(file, compression_of(plain[0])):
                head.append(piece if isinstance(piece, bytes) else b"")
                if sum(map(len, head)) >= _SMALL_FILE_BYTES:
                    break
    except OSError as error:
        raise RequestError(f"{plain[0]} cannot be read: {error.strerror or error}") from None
    text = b"".join(head)[:_SMALL_FILE_BYTES].decode(encoding, "replace")
    if _has_paragraphs(text.split("\n")):
        return "paragraph", f"auto: blank lines in {os.path.basename(plain[0])}"
    return "line", f"auto: no blank lines in {os.path.basename(plain[0])}"


def _size(path: str) -> int:
    found = listing.stat(path)
    # A file that has vanished since it was listed is reported when it is read
    return 0 if found is None else found.st_size


def _has_paragraphs(lines: Sequence[str]) -> bool:
    """Whether there is a blank line between two others."""
    last = next((index for index in range(len(lines) - 1, 0, -1) if lines[index].strip()), 0)
    return any(not lines[i].strip(" \t\r") and lines[i - 1].strip() for i in range(1, last))


def _check_field(source: Source, own: bool) -> None:
    """Raise ``RequestError``, before anything is built, if the first records do not have the text field.

    Args:
        own: the entry itself has set the field, so that data.text_field does not apply to it.
    """
    path = next((p for p in source.paths if file_kind(p)), None)
    if path is None:
        return
    kind = file_kind(path) or ""
    try:
        names = formats.field_names(path, kind, source.encoding)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    if names and source.text_field not in names:
        near = did_you_mean(source.text_field, names)
        remedy = formats.wrong_separator(names, kind) or (
            f"set text_field of this source{near}"
            if own
            else f"set data.text_field, or for this source alone '{{path: ..., text_field: NAME}}'{near}"
        )
        raise RequestError(
            f"{path}: the records have no field {source.text_field!r}, but {', '.join(map(repr, names[:12]))}: {remedy}"
        )
    if names.count(source.text_field) > 1:
        raise RequestError(f"{path}: {formats.several_columns(names, source.text_field)}")
