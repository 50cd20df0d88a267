"""The two kinds of errors that end a run with one line, and the exit codes for scripts.

Each message gives the value, the reason and the remedy in one line. ``train_lm.py`` and ``python -m lmcore`` print
the line without a traceback (``--debug`` shows it) and exit with one of the codes below.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lmcore.humanize import printable

EXIT_FINISHED = 0
"""The run reached its end and the last checkpoint is verified."""
EXIT_CRASHED = 1
"""Python's own exit code for an uncaught exception."""
EXIT_REQUEST = 2
"""A wrong request; nothing was changed (argparse also uses 2 for a wrong command line)."""
EXIT_FAULT = 70
"""A numerical, data or disk fault ended the run (EX_SOFTWARE of sysexits.h)."""
EXIT_STUCK = 71
"""Another rank is dead or stuck; this rank ended itself so that the launcher can restart all ranks."""
EXIT_SAVED = 75
"""The run saved a checkpoint at a signal or deadline and can be started again (EX_TEMPFAIL of sysexits.h)."""

EXIT_INTERRUPTED = 128 + int(signal.SIGINT)
"""Ctrl-C when there was nothing to save: the number that shells give to an end by this signal."""

QUIET_LAUNCHER = "LMCORE_QUIET_LAUNCHER"
"""Environment variable, set where the launcher adds no output of its own (:mod:`lmcore.engine.launcher`)."""

LAUNCHERS_TRACEBACK = (
    "the traceback beside this line is the launcher's own; `lmcore train` starts the same run without it"
)


class RequestError(Exception):
    """What the user asked for cannot be done; nothing was changed. Exit code 2."""

    exit_code = EXIT_REQUEST


class FaultError(Exception):
    """A numerical, data or disk fault that ends the run; the evidence is kept. Exit code 70."""

    exit_code = EXIT_FAULT


class DivergedError(FaultError):
    """``guard.*`` ends the run: loss or gradients are no longer finite, or have moved too far from their past values."""


_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
"""Errors whose cause is the disk, not the request."""


def of_disk(error: OSError) -> RequestError | FaultError:
    """The error for a path that could not be read or written: code 70 if its disk is full or broken, else 2.

    >>> print(of_disk(OSError(errno.ENOSPC, "No space left on device", "runs/a")))
    runs/a: No space left on device
    """
    place = error.filename2 or error.filename
    where = "" if place is None else f"{printable(os.fsdecode(place))}: "
    kind = FaultError if error.errno in _DISK_FAULTS else RequestError
    return kind(f"{where}{error.strerror or error}")


def require_docstrings(optimize: int | None = None) -> None:
    """Refuse an interpreter that strips docstrings (``python -OO``): transformers reads its own docstrings on import.

    Raises:
        RequestError: docstrings are stripped.
    """
    if (sys.flags.optimize if optimize is None else optimize) > 1:
        raise RequestError(
            "python -OO (or PYTHONOPTIMIZE=2) strips docstrings, and transformers cannot be imported without its own: use -O or "
            "neither"
        )


def require_output() -> None:
    """Raise ``FaultError`` if standard output is incomplete, as on a full disk. A closed pipe (`... | head`) is not an error."""
    sys.stdout.flush()
    lost = getattr(sys.stdout, "failure", None)
    if lost and not lost.startswith("BrokenPipeError"):
        raise FaultError(f"standard output is not complete ({lost})")


def require_readable_arguments(argv: Sequence[str] | None = None, encoding: str | None = None) -> None:
    """Refuse arguments that Python could not decode because the system encoding is not UTF-8.

    Args:
        argv: default: the arguments of the process.
        encoding: default: the system encoding, as set by the locale and ``PYTHONUTF8``.

    Raises:
        RequestError: an argument could not be decoded; the message gives the remedy.
    """
    encoding = encoding or sys.getfilesystemencoding()
    for word in sys.argv[1:] if argv is None else argv:
        if encoding != "utf-8" and any("\udc80" <= character <= "\udcff" for character in word):
            text = os.fsencode(word).decode(errors="replace")
            raise RequestError(
                f"{text[:60]!r} cannot be read: Python takes arguments for {encoding} here (by PYTHONUTF8 and the locale); "
                "export PYTHONUTF8=1"
            )


@contextmanager
def one_line_errors(program: str = "train_lm.py", *, show_traceback: bool = False) -> Iterator[None]:
    """Context manager that turns a :class:`RequestError` or :class:`FaultError` into one line on stderr and its exit code.

    With several ranks only rank 0 prints. Another rank prints if rank 0 has not ended within :data:`RANK_0_SECONDS`.
    With ``show_traceback`` the error is raised instead, for debugging.
    """
    try:
        yield
    except (RequestError, FaultError) as error:
        if show_traceback:
            raise
        _tell_launcher(f"{program}: {error}")
        if not _speaks() and not _rank_0_stays_silent(error.exit_code):
            raise SystemExit(error.exit_code) from None
        print(f"{program}: {error}", file=sys.stderr)
        if launcher_adds_traceback():
            print(f"({LAUNCHERS_TRACEBACK})", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


RANK_0_SECONDS = 5.0
"""How long other ranks wait for rank 0 to reach the same error. When the first rank ends, torch's launcher ends all
others, and a slower rank 0 would be ended before it could print."""


def _rank_0_stays_silent(code: int) -> bool:
    """Wait for rank 0, whose end makes the launcher end this process; then return whether this rank must print instead."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(code))
    rank, here, all_ranks = (
        os.environ.get(name, "0") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    )
    # Staggered: the first rank that prints and exits ends all others.
    time.sleep(RANK_0_SECONDS + 0.3 * int(rank))
    return here == all_ranks  # with several machines it is not known whether rank 0 has printed


def _speaks() -> bool:
    """Whether this process prints the error: rank 0, or a process whose RANK and WORLD_SIZE are not valid."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    known = all(text.isdecimal() and len(text) < 10 for text in (rank, size))
    return not (known and 0 < int(rank) < int(size))


def launcher_adds_traceback() -> bool:
    """Whether the launcher of this process (``accelerate launch`` or ``torchrun``) adds a traceback of its own."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return launched and QUIET_LAUNCHER not in os.environ


BEFORE_THE_FIRST_STEP = "interrupted before the first step: nothing to save"


def end_at_interrupt(line: str, *, only_in_imports: bool = False) -> None:
    """Make Ctrl-C end this process with ``line``, until another handler for SIGINT is set. Main thread only.

    Python's own handler raises ``KeyboardInterrupt`` wherever the program is. Inside an import this prints a traceback
    through files that the user has never seen, or "Exception ignored", and the interrupt is lost. Importing torch takes
    seconds.

    Args:
        only_in_imports: raise ``KeyboardInterrupt`` as usual outside of imports, for a program that cleans up after itself.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored (started in the background of a script), or another handler is set already
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if only_in_imports and not _importing(frame):
            raise KeyboardInterrupt
        if os.getpid() == process and os.environ.get("RANK", "0") == "0":
            end_interrupted(line)
        _end_by_interrupt()

    signal.signal(signal.SIGINT, handle)


def end_interrupted(line: str) -> NoReturn:
    """End this process as Ctrl-C does, after ``line`` on standard error."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # the signal may have come inside a write
        sys.stdout.flush()
    explanation = f"\n({LAUNCHERS_TRACEBACK})" if launcher_adds_traceback() else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}{explanation}\n".encode())
    _end_by_interrupt()


def _end_by_interrupt() -> NoReturn:
    """End by the signal itself, so that a shell script that runs this command ends too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(EXIT_INTERRUPTED)  # the signal is blocked


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _tell_launcher(message: str) -> None:
    """Write the reason to the file from which torch's launcher fills the table that it prints at the end.

    Format of the file: https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"py_callstack": message, "timestamp": str(int(time.time()))}
    # Written atomically: the launcher may end a rank during its write, and fails on a file that is not valid JSON.
    # A failed write does no harm: the message is printed as well.
    aside = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)
        os.replace(aside, path)
