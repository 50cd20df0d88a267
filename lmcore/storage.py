"""Objects below one URL, in a bucket or any other place that fsspec can open.

Every access to remote storage goes through :class:`Store`, which adds what a run needs to fsspec: retries with growing
waits and one kind of error after them, the name of a missing package, and refusal of credentials in URLs.
The fsspec driver takes credentials and endpoints from the environment (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_CONNECTION_STRING``, ``HF_TOKEN``, ...).

Example::

    store = Store("s3://bucket/runs/demo")
    store.write("status.json", b"{}")
    store.names("checkpoints")
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, final

from lmcore.disk import DISK
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, message_of, one_line

DRIVERS: Final = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "memory": "fsspec",
    "file": "fsspec",
}
"""Scheme of a URL -> the package that fsspec needs for it."""
OLDEST: Final = (2024, 12)
"""Year and month of the first release at which s3fs, gcsfs and adlfs can all create an object only if it does not exist.
Older versions of s3fs silently drop that condition."""
ATTEMPTS: Final = 6
READS: Final = 4
"""How often an object that does not match its hash is read before it counts as damaged: bits may flip in transfer."""
FIRST_WAIT_SECONDS: Final = 0.5
"""The first wait; each further wait is twice as long: 0.5, 1, 2, 4 and 8 s between the six tries."""
_EXCLUSIVE: Final = frozenset({"s3", "gs", "gcs", "az", "abfs", "memory", "file"})
"""Schemes whose store itself can create an object only if it does not exist, without a separate check beforehand."""
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
_FINAL: Final = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    ImportError, NotImplementedError, TypeError, AttributeError,
)  # fmt: skip
"""Errors for which a retry does not help."""

T = TypeVar("T")


class StoreError(OSError):
    """The store does not answer or refuses the call, after all tries."""


class Info(NamedTuple):
    """Size and version of an object. ``version`` changes with the object: its etag, else its time, else its size."""

    n_bytes: int
    version: str


def is_url(text: object) -> bool:
    """Whether a path is a URL for :class:`Store` (``C:`` and ``a:b`` are not).

    >>> is_url("s3://bucket/run"), is_url("runs/demo")
    (True, False)
    """
    return isinstance(text, str) and _URL.match(text) is not None


def check_url(url: str, option: str = "") -> str:
    """Check a URL and return it without a trailing slash.

    Raises:
        RequestError: an unknown scheme, no bucket, or credentials in the URL. Those would be written to config.yaml and
            logs, so they are taken from the environment only; the message does not repeat them.
    """
    before = f"{option}: " if option else ""
    match = _URL.fullmatch(url)
    if match is None:
        raise RequestError(f"{before}{one_line(url)[:200]!r} is not a URL: write s3://bucket/folder")
    scheme, rest = match[1].lower(), match[2]
    if "@" in rest.split("/")[0] or (scheme != "hf" and re.search(r"[?&#]\S*=", rest)):
        raise RequestError(
            f"{before}a {scheme}:// URL with credentials or options in it is refused, because it would be written to "
            "files: give credentials in the environment (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    if scheme not in DRIVERS:
        raise RequestError(
            f"{before}unknown scheme {scheme}://; choose from {', '.join(f'{name}://' for name in DRIVERS)}"
            f"{did_you_mean(scheme, list(DRIVERS))}"
        )
    path = rest.rstrip("/")
    if not path.strip("/"):
        raise RequestError(f"{before}{scheme}:// names no bucket or folder: write {scheme}://bucket/folder")
    if any(part in ("", ".", "..") for part in path.lstrip("/").split("/")):
        raise RequestError(f"{before}{url} has an empty, . or .. part")
    return f"{scheme}://{path}"


def open_filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme, with the cache of listings switched off.

    Raises:
        RequestError: its driver is not installed, or too old.
    """
    import fsspec  # lazily: runs on local disk do not need it

    package = DRIVERS[scheme]
    try:
        filesystem = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        raise RequestError(
            f"{scheme}:// needs the package {package}, which is not installed: pip install {package}"
        ) from None
    if package in ("s3fs", "gcsfs", "adlfs"):
        _refuse_old(scheme, package)
    return filesystem


@functools.cache
def _refuse_old(scheme: str, package: str) -> None:
    found = version(package)
    if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < OLDEST:
        raise RequestError(
            f"{scheme}:// needs {package} {OLDEST[0]}.{OLDEST[1]} or newer (found {found}), with which two runs cannot take "
            f"one run folder: pip install --upgrade {package}"
        )


@final
class Store:
    """The objects below one URL. Names are relative to it, separated by slashes. Safe to use from several threads and
    after a fork.

    Args:
        url: such as ``s3://bucket/runs/demo``.
        attempts: total number of tries of a failing call.
        sleep: called with the seconds to wait between two tries.

    Raises:
        RequestError: see :func:`check_url`; or the driver is not installed.
    """

    def __init__(
        self, url: str, *, attempts: int = ATTEMPTS, sleep: Callable[[float], Any] = time.sleep
    ) -> None:
        self.url = check_url(url)
        self.scheme, _, self._root = self.url.partition("://")
        self.exclusive = self.scheme in _EXCLUSIVE
        """Whether :meth:`create` is atomic in the store itself."""
        self._attempts, self._sleep = attempts, sleep
        open_filesystem(self.scheme)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def _fs(self) -> Any:
        return open_filesystem(self.scheme)  # fsspec caches one instance for each process

    def path(self, name: str = "") -> str:
        """The path by which fsspec knows the object of this name."""
        root = ("/" if self.scheme in ("memory", "file") else "") + self._root.lstrip("/")
        return f"{root}/{name}" if name else root

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    # ---- one object

    def read(self, name: str) -> bytes:
        """The content of an object. Raises ``FileNotFoundError``, or :class:`StoreError`."""
        data: bytes = self._try(f"read {name}", lambda: self._fs.cat_file(self.path(name)))
        return data

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes ``[start, stop)`` of an object. Raises ``FileNotFoundError``, or :class:`StoreError`."""

        def attempt() -> bytes:
            data: bytes = self._fs.cat_file(self.path(name), start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data):,} bytes came instead of {stop - start:,}")
            return data

        return self._try(f"read {name}", attempt)

    def read_sealed(self, name: str) -> dict[str, Any]:
        """Read a JSON object written with :func:`sealed`. One without a hash, from an earlier version, is accepted.

        Raises:
            ValueError: it is damaged, also after it was read again.
            FileNotFoundError, StoreError: as for :meth:`read`.
        """
        for _ in range(READS):
            with contextlib.suppress(ValueError):
                value = json.loads(self.read(name))
                if isinstance(value, dict) and value.pop("sha256", None) in (None, _hash_of(value)):
                    return value
        raise ValueError(f"{self.url_of(name)} is damaged")

    def write(self, name: str, data: bytes) -> None:
        """Replace the object as a whole. Raises :class:`StoreError`."""
        self._try(f"write {name}", lambda: self._write(name, data), absent="there is no such bucket")

    def _write(self, name: str, data: bytes) -> None:
        if self.scheme == "file":  # fsspec's write is not atomic there
            DISK.makedirs(Path(self.path(name)).parent)
            DISK.write_bytes(Path(self.path(name)), data)
        else:
            self._fs.pipe_file(self.path(name), data)
            self._check_size(name, len(data))

    def create(self, name: str, data: bytes) -> bool:
        """Create the object if it does not exist. Returns whether its content is now ``data``.

        If :attr:`exclusive` is false, existence is checked first, and two simultaneous callers may both succeed.
        """

        def attempt() -> bool:
            try:
                if self.scheme == "file":
                    DISK.makedirs(Path(self.path(name)).parent)
                    file = DISK.create(self.path(name), exclusive=True)
                    try:
                        DISK.write(file, data)
                    finally:
                        DISK.close(file)
                else:
                    self._fs.pipe_file(self.path(name), data, mode="create")
            except Exception as error:  # drivers raise errors of their own types
                # Either the object exists (not every store raises FileExistsError), or an earlier try succeeded and its
                # answer was lost, or this try failed. Reading the object tells which.
                try:
                    # Read twice: a bit that flips in transfer must not make our own object look like another's.
                    return any(self._fs.cat_file(self.path(name)) == data for _ in range(2))
                except FileNotFoundError:
                    if isinstance(error, FileExistsError):  # it existed and was removed meanwhile: retry
                        raise OSError("the object was removed meanwhile") from None
                    raise error from None
            return True

        return self._try(f"create {name}", attempt, absent="there is no such bucket")

    def upload(self, path: Path, name: str) -> None:
        """Upload a file and check the size of the object. Raises :class:`StoreError`, or ``OSError`` of the file."""
        size = path.stat().st_size

        def attempt() -> None:
            if self.scheme == "file":
                self._write(name, path.read_bytes())
            else:
                self._fs.put_file(str(path), self.path(name))
            self._check_size(name, size)

        self._try(f"write {name}", attempt, absent="there is no such bucket")

    def _check_size(self, name: str, n_bytes: int) -> None:
        found = int(self._fs.info(self.path(name))["size"])
        if found != n_bytes:
            raise OSError(f"the object has {found:,} bytes after an upload of {n_bytes:,}")

    def download(self, name: str, path: Path) -> None:
        """Download an object into a file. Raises ``FileNotFoundError``, or :class:`StoreError`."""

        def attempt() -> None:
            self._fs.get_file(self.path(name), str(path))

        self._try(f"read {name}", attempt)

    def info(self, name: str) -> Info | None:
        """Size and version of an object; ``None`` if there is none."""
        try:
            found = self._try(f"look up {name}", lambda: self._fs.info(self.path(name)))
        except FileNotFoundError:
            return None
        return None if found.get("type") == "directory" else info_of(found)

    def remove(self, name: str) -> None:
        """Remove an object; a no-op if it does not exist."""

        def attempt() -> None:
            try:
                self._fs.rm_file(self.path(name))
            except FileNotFoundError:
                return

        self._try(f"remove {name}", attempt)

    # ---- listings

    def names(self, folder: str = "") -> list[str]:
        """The names of all objects below a folder, sorted. The store's listing may be slightly out of date."""
        return sorted(name for name, _ in self._find(folder))

    def infos(self) -> dict[str, Info]:
        """Name -> size and version of all objects, from one listing, which may be slightly out of date."""
        return {name: info_of(found) for name, found in self._find("")}

    def _find(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        def attempt() -> dict[str, dict[str, Any]]:
            try:
                found: dict[str, dict[str, Any]] = self._fs.find(self.path(folder), detail=True)
            except FileNotFoundError:
                return {}
            return found

        root = self.path() + "/"
        for path, found in self._try(f"list {folder or 'the folder'}", attempt).items():
            if path.startswith(root):
                yield path[len(root) :], found

    # ---- errors

    def _try(self, what: str, call: Callable[[], T], *, absent: str = "") -> T:
        what = f"{self.url}: cannot {what}"
        try:
            return persistently(call, what, attempts=self._attempts, sleep=self._sleep)
        except FileNotFoundError as error:
            if absent:
                raise StoreError(f"{what}: {absent}") from error
            raise


def sealed(value: Mapping[str, Any]) -> bytes:
    """A JSON object that contains its own hash, for :meth:`Store.read_sealed`."""
    return json.dumps({**value, "sha256": _hash_of(value)}, sort_keys=True).encode() + b"\n"


def _hash_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def info_of(found: dict[str, Any]) -> Info:
    """Size and version from a driver's details; drivers use different names for the etag and the modification time."""
    size = int(found.get("size") or 0)
    for key in ("ETag", "etag", "md5Hash", "content_md5"):
        if found.get(key):
            return Info(size, f"etag:{str(found[key]).strip(chr(34))}")
    for key in ("LastModified", "mtime", "updated", "last_modified", "created"):
        if found.get(key):
            return Info(size, f"time:{found[key]}")
    return Info(size, f"size:{size}")


def persistently(
    call: Callable[[], T],
    what: str,
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], Any] = time.sleep,
) -> T:
    """Return the result of ``call``, retried with doubling waits after transient errors: time-outs, 500, 503, lost connections.

    Drivers raise errors of many types, not all of them an ``OSError``, so every error is retried except those for which a
    retry does not help.

    Raises:
        FileNotFoundError, FileExistsError, RequestError: raised by ``call``, unchanged.
        StoreError: every try failed, or a retry would not help. The message holds ``what`` and the last cause.
    """
    wait = FIRST_WAIT_SECONDS
    for attempt in range(attempts):
        try:
            return call()
        except (FileNotFoundError, FileExistsError, RequestError):
            raise
        except _FINAL as error:
            raise StoreError(f"{what}: {cause_of(error)}") from error
        except Exception as error:
            if attempt + 1 == attempts:
                raise StoreError(f"{what}: {cause_of(error)}") from error
            sleep(wait)
            wait *= 2
    raise AssertionError("attempts must be at least 1")


def cause_of(error: BaseException) -> str:
    """The error in one short line."""
    words = one_line(message_of(error))[:300]
    name = type(error).__name__
    return f"{name}: {words}" if words else name


def cache_dir() -> Path:
    """This user's cache folder: ``$LMCORE_CACHE``, else ``$XDG_CACHE_HOME/lmcore``, else ``~/.cache/lmcore``."""
    chosen = os.environ.get("LMCORE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmcore"


def local_name(url: str) -> str:
    """The folder name for a local copy of a checked URL: its last part and a hash of the whole URL.

    >>> local_name("s3://bucket/runs/demo")
    'demo-18e7410278f5'
    """
    return f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def read_cached(path: Path) -> dict[str, Any] | None:
    """The mapping that :func:`write_cached` wrote to a cache file; ``None`` if the file is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_cached(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a cache file atomically; several processes may do so at once.

    Raises nothing if it cannot be written: the content of a cache can be computed again.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        aside.write_text(json.dumps(value))
        os.replace(aside, path)
