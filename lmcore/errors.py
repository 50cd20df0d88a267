"""The two kinds of errors that end a run with one line, and the exit codes for scripts.

A person reads these messages: each says the value, the reason and the remedy, in one line. ``train_lm.py`` and
``python -m lmcore`` print the line without a traceback (``--debug`` shows it) and leave with the code below.
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
"""The run has reached its end and the last checkpoint is verified."""
EXIT_CRASHED = 1
"""Python's own exit code of an exception."""
EXIT_REQUEST = 2
"""A wrong request; nothing was changed (2 is what argparse uses for a wrong command line)."""
EXIT_FAULT = 70
"""A numerical or data fault that policy ends (EX_SOFTWARE of sysexits.h)."""
EXIT_STUCK = 71
"""Another rank is dead or stuck; this one ended itself so that the launcher can start all of them again."""
EXIT_SAVED = 75
"""Saved at a signal or deadline: start me again (EX_TEMPFAIL of sysexits.h)."""

EXIT_INTERRUPTED = 128 + int(signal.SIGINT)
"""Ctrl-C where there was nothing to save, as shells number the end by this signal."""

QUIET_LAUNCHER = "LMCORE_QUIET_LAUNCHER"
"""Environment variable: the launcher adds nothing to what a run says (:mod:`lmcore.engine.launcher`)."""

LAUNCHERS_TRACEBACK = (
    "the traceback beside this line is the launcher's own; `lmcore train` starts the same run without it"
)


class RequestError(Exception):
    """What the user asked for cannot be done; nothing was changed. Exit code 2."""

    exit_code = EXIT_REQUEST


class FaultError(Exception):
    """A numerical or data fault that policy ends; the evidence is kept. Exit code 70."""

    exit_code = EXIT_FAULT


class DivergedError(FaultError):
    """The loss or the gradients are not finite any more, or too far from what they were, and ``guard.*`` ends the run."""


_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
"""The request was right, the disk was not."""


def of_disk(error: OSError) -> RequestError | FaultError:
    """The one line for a place that could not be read or written: code 70 where its disk is full or broken, else 2.

    >>> print(of_disk(OSError(errno.ENOSPC, "No space left on device", "runs/a")))
    runs/a: No space left on device
    """
    place = error.filename2 or error.filename
    where = "" if place is None else f"{printable(os.fsdecode(place))}: "
    kind = FaultError if error.errno in _DISK_FAULTS else RequestError
    return kind(f"{where}{error.strerror or error}")


def require_docstrings(optimize: int | None = None) -> None:
    """Refuse an interpreter that strips docstrings (``python -OO``): transformers reads its own when it is imported.

    Raises:
        RequestError: they are stripped.
    """
    if (sys.flags.optimize if optimize is None else optimize) > 1:
        raise RequestError(
            "python -OO (or PYTHONOPTIMIZE=2) strips docstrings, and transformers cannot be imported without its own: use -O or "
            "neither"
        )


def require_readable_arguments(argv: Sequence[str] | None = None, encoding: str | None = None) -> None:
    """Refuse arguments that this Python cannot read because it takes the text of the system for something else than UTF-8.

    Args:
        argv: default: those of the process.
        encoding: default: that of the system, as the locale and ``PYTHONUTF8`` have it.

    Raises:
        RequestError: with the remedy.
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
    """Inside, a :class:`RequestError` or :class:`FaultError` becomes one line on standard error and its exit code.

    Of several ranks only rank 0 prints; if it has not come to an end within :data:`RANK_0_SECONDS`, this one does.
    ``show_traceback``: raise it instead, for debugging.
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
"""How long the other ranks wait for rank 0 to come to the same error: with the first rank that ends torch's launcher
ends all others, and rank 0, should it be slower, without a word."""


def _rank_0_stays_silent(code: int) -> bool:
    """Wait; then whether rank 0 of this machine has not ended in time. If it has, the launcher ends this process meanwhile."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(code))
    rank, here, all_ranks = (
        os.environ.get(name, "0") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    )
    time.sleep(RANK_0_SECONDS + 0.3 * int(rank))  # one after the other: the first to speak ends them all
    return here == all_ranks  # on other machines nobody knows whether rank 0 has spoken


def _speaks() -> bool:
    """Rank 0 speaks for all; so does a rank that no launcher can have numbered, for which nobody else would."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    known = all(text.isdecimal() and len(text) < 10 for text in (rank, size))
    return not (known and 0 < int(rank) < int(size))


def launcher_adds_traceback() -> bool:
    """Whether this process was started by ``accelerate launch`` or ``torchrun``, which show where they themselves raise."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return launched and QUIET_LAUNCHER not in os.environ


BEFORE_THE_FIRST_STEP = "interrupted before the first step: nothing to save"


def end_at_interrupt(line: str, *, only_in_imports: bool = False) -> None:
    """From here on Ctrl-C ends this process with ``line``, until something else takes SIGINT. Main thread only.

    Python's own handler raises ``KeyboardInterrupt`` wherever the program is. Inside an import that is a traceback through
    files that the user has never seen, or is printed as "Exception ignored" and lost. Importing torch takes seconds.

    Args:
        only_in_imports: elsewhere ``KeyboardInterrupt`` is raised as usual, for a program that cleans up after itself.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # started in the background of a script (ignored), or taken already
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
    """By the signal itself, so that a shell script with this command in it ends too."""
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
    """The reason, for the table that torch's launcher prints in the end.

    Format of the file: https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"py_callstack": message, "timestamp": str(int(time.time()))}
    # As a whole: the launcher ends the other ranks while they write theirs, and fails on a file that is not JSON.
    # A write that fails is no matter: the message is on the screen already.
    aside = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)
        os.replace(aside, path)
