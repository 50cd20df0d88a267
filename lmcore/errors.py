"""The two ways in which lmcore refuses to go on, and the exit codes that scripts may lean on.

A person reads these messages: each says the value, the reason and the remedy, in one line. ``train_lm.py`` and
``python -m lmcore`` print the line without a traceback (``--debug`` shows it) and leave with the code below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_FINISHED = 0
"""The run has reached its end and the last checkpoint is verified."""
EXIT_REQUEST = 2
"""A wrong request; nothing was changed (2 is what argparse uses for a wrong command line)."""
EXIT_FAULT = 70
"""A numerical or data fault that policy ends (EX_SOFTWARE of sysexits.h)."""
EXIT_SAVED = 75
"""Saved at a signal or deadline: start me again (EX_TEMPFAIL of sysexits.h)."""


class RequestError(Exception):
    """What the user asked for cannot be done; nothing was changed. Exit code 2."""

    exit_code = EXIT_REQUEST


class FaultError(Exception):
    """A numerical or data fault that policy ends; the evidence is kept. Exit code 70."""

    exit_code = EXIT_FAULT


@contextmanager
def one_line_errors(program: str = "train_lm.py", *, show_traceback: bool = False) -> Iterator[None]:
    """Inside, a :class:`RequestError` or :class:`FaultError` becomes one line on standard error and its exit code.

    Of several ranks only rank 0 prints. ``show_traceback``: raise it instead, for whoever looks for a bug.
    """
    try:
        yield
    except (RequestError, FaultError) as error:
        if show_traceback:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
