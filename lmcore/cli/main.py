"""The command ``lmcore`` (also ``python -m lmcore``): everything around a training run.

Each command imports only what it needs, so that ``--help`` appears at once. ``train``, ``prepare``, ``inspect``,
``tokenizer``, ``plan`` and ``size`` accept the options of ``train_lm.py``. Exit codes: 0; 2 for a wrong request, or a file or
folder that cannot be read or written; 70 for a fault of data or disk. Errors are one line without a traceback (``--debug``
shows it).

    lmcore generate runs/demo --prompt 'def '
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from lmcore.disk import require_current_folder
from lmcore.errors import (
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    FaultError,
    RequestError,
    of_disk,
    require_docstrings,
    require_output,
    require_readable_arguments,
)
from lmcore.humanize import did_you_mean
from lmcore.report.console import protect_output

COMMANDS = {
    "train": ("train", "train on all GPUs of this machine, or on the CPU"),
    "inspect": ("data", "show documents, bytes, tokens, broken records and samples of a corpus"),
    "tokenizer": ("data", "train a tokenizer"),
    "prepare": ("data", "build the tokenizer and the token stores of a run, without training"),
    "plan": ("plan", "parameters, steps, memory, time and cost of a run, before it starts"),
    "size": ("size", "choose model, learning rate and batch for a time budget, by short runs here"),
    "generate": ("saved", "generate text with a model"),
    "evaluate": ("saved", "loss, perplexity and bits per byte on a text"),
    "export": ("saved", "write a folder that transformers opens"),
    "report": ("saved", "write report.html for a run, or compare runs"),
    "checkpoints": ("saved", "list and verify the checkpoints of a run"),
    "order": ("data", "show the blocks of positions or of a step"),
    "stores": ("data", "list token stores and the runs that use them, or remove them"),
    "doctor": ("doctor", "check this machine and name the remedy for each problem"),
    "schema": ("options", "print the JSON schema of the configuration, for editors"),
    "completion": ("options", "print a completion script for bash or zsh"),
}
"""Command -> the module of ``lmcore.cli`` with the function of the same name, and a line for the overview."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    protect_output()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return EXIT_FINISHED
    if words[0] == "--version":
        from lmcore import __version__

        print(f"lmcore {__version__}")
        return EXIT_FINISHED
    try:
        require_current_folder()
        require_docstrings()
        require_readable_arguments(words)
        if words[0] not in COMMANDS:
            raise RequestError(
                f"unknown command {words[0]!r}: choose from {', '.join(COMMANDS)}{did_you_mean(words[0], COMMANDS)}"
            )
        if words[0] in ("schema", "completion") and words[1:] in (["-h"], ["--help"]):
            print(
                f"usage: lmcore {words[0]}{' bash|zsh' if words[0] == 'completion' else ''}\n\n{COMMANDS[words[0]][1]}"
            )
            return EXIT_FINISHED
        module = importlib.import_module(f"lmcore.cli.{COMMANDS[words[0]][0]}")
        # train starts another process, which needs the option as well.
        passed_on = ["--debug"] if debug and words[0] == "train" else []
        with _clearing_up() if COMMANDS[words[0]][0] == "saved" else nullcontext():
            code: int | None = getattr(module, words[0])([*words[1:], *passed_on])
        if words[0] not in ("train", "size"):  # these write their results to files
            require_output()
        return code or EXIT_FINISHED
    except (RequestError, FaultError) as error:
        if debug:
            raise
        print(f"lmcore: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:  # no permission, or a file system that is full or read-only
        if debug:
            raise
        failure = of_disk(error)
        print(f"lmcore: {failure}", file=sys.stderr)
        return failure.exit_code


@contextmanager
def _clearing_up() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP end this process by an exception, like Ctrl-C, so that an incomplete export and
    temporary token stores are removed."""

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    # Under nohup SIGHUP is ignored, and must stay ignored.
    taken = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def overview() -> str:
    """The commands, one line each."""
    lines = [f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lmcore COMMAND ... [--debug]",
            "",
            *lines,
            "",
            "lmcore COMMAND --help shows the options of a command.",
        ]
    )
