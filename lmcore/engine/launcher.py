"""accelerate's launcher without its own traceback; ``lmcore train`` starts ``python -m lmcore.engine.launcher ARGUMENTS``.

A run says in one line why it ended. ``accelerate launch`` then adds its own traceback, of 10 lines for one process and
45 for several, turns every exit code into 1, and does not wait at Ctrl-C while the run is saving. This launcher returns the
exit code of the run, adds no output, and waits.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from lmcore.errors import BEFORE_THE_FIRST_STEP, EXIT_STUCK, QUIET_LAUNCHER, end_at_interrupt, end_interrupted
from lmcore.humanize import message_of


def exit_code_of(codes: Sequence[int]) -> int:
    """The exit code of a run from those of its failed processes, the first failure first.

    The code of a process that failed by itself takes precedence over one that ended because of it (by a signal, or with 71).

    >>> exit_code_of([-15, 71, 2])
    2
    >>> exit_code_of([-9])
    137
    """
    own = [code for code in codes if code > 0]
    code = next((one for one in own if one != EXIT_STUCK), (own or list(codes) or [1])[0])
    return code if code > 0 else 128 - code


def why_unreadable(config_file: Path) -> str | None:
    """Why ``accelerate launch`` cannot read this configuration; ``None`` if it can."""
    from accelerate.commands.config.config_args import load_config_from_file  # takes a second

    try:
        load_config_from_file(str(config_file))
    except Exception as error:  # a ValueError, a TypeError or one of the YAML reader
        return message_of(error)
    return None


_run_has_begun = threading.Event()


def _watch_for_the_run(script: str) -> None:
    """Set ``_run_has_begun`` when a process is started whose command contains this script."""

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and script in details[1]:
            _run_has_begun.set()

    sys.addaudithook(hook)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    """At Ctrl-C let the run save and end, and the launcher after it. Before the run has started, end the launcher."""
    children = psutil.Process().children()
    # If the run has started but has no process left, it has already ended at the same Ctrl-C and printed its message.
    if not children and not _run_has_begun.is_set():
        end_interrupted(f"lmcore train: {BEFORE_THE_FIRST_STEP}")
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            # A single process gets Ctrl-C from the terminal; several are each in a session of their own and do not.
            if os.getpgid(child.pid) != os.getpgrp():
                child.send_signal(number)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop accelerate's list of the defaults that it chose: the run shows what it uses."""
    return not record.getMessage().startswith("The following values were not passed to")


def main(arguments: list[str]) -> int:
    """Launch the run and return its exit code."""
    end_at_interrupt(f"lmcore train: {BEFORE_THE_FIRST_STEP}")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # ``lmcore train`` has blocked it
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    importlib.import_module("torch.distributed.run")  # now, because its import sets the levels of its loggers
    for name in ("multiprocessing.api", "agent.server.api"):  # they report what is handled here
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    logging.getLogger("accelerate.commands.launch").addFilter(_is_news)
    asked = launch_command_parser().parse_args(arguments)
    _watch_for_the_run(asked.training_script)
    signal.signal(signal.SIGINT, _on_interrupt)  # not SIG_IGN, which the run would inherit
    # With several processes torch's launcher would handle SIGINT itself, and end with an exception instead of the run's code.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGHUP,SIGQUIT")
    os.environ[QUIET_LAUNCHER] = "1"
    try:
        launch_command(asked)
    except subprocess.CalledProcessError as error:  # one process
        return exit_code_of([error.returncode])
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        return exit_code_of([failure.exitcode for failure in failures])
    except SignalException as error:  # forwarded to the processes, which have ended
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
