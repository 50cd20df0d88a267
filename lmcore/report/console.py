"""What a run prints: a live display on a terminal, plain lines elsewhere, and a log file for every rank.

Without a terminal that can move its cursor (a pipe, a file, Slurm, a notebook, ``TERM=dumb``, CI) every line is printed
in full, without control characters. On a terminal all bars and numbers are in one display that is redrawn twice a second;
lines are printed above it and stay. If the output fails (a closed pipe, a full disk), printing stops with a note in
``train.log``; it never ends the program.

    >>> console = Console()
    >>> console.line("step 1/4000 loss 9.0108")
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lmcore.disk import DISK
from lmcore.humanize import CONTROL, amount, columns, duration, one_line, printable, short
from lmcore.report.redact import hide_values, redact

REFRESHES_PER_SECOND = 2
PLAIN_TASK_SECONDS = 30.0
"""How often a long task (tokenizing, evaluating) prints its progress without a terminal."""


# ---- commands that can be pasted


def shell_quote(word: str) -> str:
    """Quote ``word`` as one word for a POSIX shell; with control characters as ``$'...'`` (bash, zsh, ksh), on one line."""
    if not CONTROL.search(word) and "\n" not in word and "\t" not in word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return "$'" + CONTROL.sub(lambda match: _dollar_escape(match.group()), escaped) + "'"


def _dollar_escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


MODULES = {
    "lmcore": "lmcore",
    "accelerate": "accelerate.commands.accelerate_cli",
    "torchrun": "torch.distributed.run",
}
"""Programs that are installed in an environment, and the modules that they run."""


def shell_command(*words: str | os.PathLike[str]) -> str:
    """A command line for the user's shell, with every word quoted as needed.

    The first word may be ``python`` or one of :data:`MODULES`. It is replaced by the program of the running environment: with
    its path if the shell would not find it (``.venv/bin/lmcore``), or as a module of the interpreter if the environment
    has no such script.

        >>> shell_command("lmcore", "generate", "runs/my run")
        "lmcore generate 'runs/my run'"
    """
    program, *rest = [os.fspath(word) for word in words]
    module = MODULES.get(program)
    if (program != "python" and module is None) or _is_on_path(program):
        start = [program]
    elif os.access(script := Path(sys.executable).with_name(program), os.X_OK):
        start = [_path_from_here(script)]
    else:
        start = ["python" if _is_on_path("python") else _path_from_here(Path(sys.executable))]
        start += ["-m", module] if module else []
    return " ".join(map(shell_quote, [*start, *rest]))


def training_command(*words: str | os.PathLike[str]) -> str:
    """:func:`shell_command` for training with these options, started like this process: by the same launcher with the same
    options, or by python."""
    script = sys.argv[0] if sys.argv[0].endswith(".py") else "train_lm.py"
    if not any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")):
        return shell_command("python", script, *words)
    from lmcore.process import command_line_above  # lazily: it imports psutil, which the help does not need

    launcher = launcher_of(command_line_above(script)) or ["accelerate", "launch"]
    return shell_command(*launcher, *([] if launcher[0] == "lmcore" else [script]), *words)


def launcher_of(words: Sequence[str]) -> list[str]:
    """A launcher's command line up to its script, as a user would type it; empty if it is not a known launcher.

    >>> launcher_of(["/usr/bin/python", "/venv/bin/accelerate", "launch", "--config_file", "accelerate_configs/ddp.yaml"])
    ['accelerate', 'launch', '--config_file', 'accelerate_configs/ddp.yaml']
    """
    rest = list(words)
    if rest and Path(rest[0]).name.startswith("python"):
        del rest[0]
    if rest[:1] == ["-m"]:
        if rest[1:2] == ["lmcore.engine.launcher"]:
            return ["lmcore", "train", *_chosen_by_hand(rest[2:])]
        known = rest[1:2] and rest[1].startswith(("accelerate.", "torch.distributed."))
        return ["python", *rest] if known else []
    program = Path(rest[0]).name if rest else ""
    return [program, *rest[1:]] if program in ("accelerate", "accelerate-launch", "torchrun") else []


def _chosen_by_hand(words: Sequence[str]) -> list[str]:
    """The options of ``lmcore train`` that result in these options of ``accelerate launch``, without those that it would choose
    itself."""
    names = {"--num_processes": "--processes"}
    options = dict(zip(words[::2], words[1::2]))
    if Path(file := options.get("--config_file", "")).parent.name == "accelerate_configs":
        options["--config_file"] = Path(file).stem
        several = "--num_processes" in options
        if Path(file).stem in (("cpu_2",) if several else ("cpu", "gpu")):
            del options["--config_file"]
    return [word for name, value in options.items() for word in (names.get(name, name), value)]


def _path_from_here(path: Path) -> str:
    """The path relative to the working directory if it is inside; otherwise unchanged."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _is_on_path(program: str) -> bool:
    """Whether the shell would find this program in the environment of the running interpreter."""
    found = shutil.which(program)
    return found is not None and Path(found).parent == Path(sys.executable).parent


# ---- streams that never end a program


class SafeStream:
    """A text stream that drops what it cannot write instead of raising.

    Characters that its encoding does not have are written as escapes (``\\u3042``). After the first failure (a closed pipe,
    a full disk) nothing more is written; :attr:`failure` says why. ``change`` is applied to every text that is written;
    ``unfiltered`` is the same stream without it, for a display that moves the cursor on purpose.
    """

    def __init__(self, stream: TextIO, change: Callable[[str], str] | None = None) -> None:
        self._stream = stream
        self.unfiltered: SafeStream = self._unwrapped(stream) if change else self
        self._change = change
        self._failure: str | None = None

    @staticmethod
    def _unwrapped(stream: TextIO) -> SafeStream:
        return stream.unfiltered if isinstance(stream, SafeStream) else SafeStream(stream)

    @property
    def failure(self) -> str | None:
        """Why nothing is written any more, or ``None``."""
        return self.unfiltered._failure

    def write(self, text: str) -> int:
        if self._change:
            return self.unfiltered.write(self._change(text))
        if self._failure is None:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError as error:
                    self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError) as error:  # ValueError: the file object is closed
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._change:
            self.unfiltered.flush()
        elif self._failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failure = f"{type(error).__name__}: {error}"
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            return
        if descriptor in (1, 2):
            # Data left in buffers would fail again when the interpreter exits, and change the exit code.
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), descriptor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


def protect_output() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` safe, and ``sys.stdin`` empty if it is closed. Call this first in a program.

    A closed descriptor is opened on ``/dev/null``; otherwise the next opened file would get its number and the messages for
    it. Both streams then never raise, and do not pass control characters from text, names or model output. They are line
    buffered, also into a pipe or a file, because the last line of a refusal is its reason.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # open() returns the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for the life of the process
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(line_buffering=True)
        if not isinstance(stream, SafeStream):
            # Error messages quote their input, which may include secrets.
            change = printable if name == "stdout" else lambda text: printable(hide_values(text))
            setattr(sys, name, SafeStream(stream, change))


def is_interactive(stream: Any) -> bool:
    """Whether ``stream`` is an interactive terminal that can move its cursor.

    ``LMCORE_CONSOLE=rich`` or ``plain`` overrides. A notebook cell runs on a pseudo-terminal but keeps every line that was
    ever drawn, so it is plain.
    """
    environment = os.environ
    forced = environment.get("LMCORE_CONSOLE", "")
    if forced in ("rich", "plain"):
        return forced == "rich"
    try:
        terminal = stream.isatty()
    except (AttributeError, ValueError):  # closed
        return False
    return (
        terminal
        and environment.get("TERM", "dumb") not in ("dumb", "unknown", "")
        and "SLURM_JOB_ID" not in environment
        and "JPY_PARENT_PID" not in environment
        and environment.get("CI", "").lower() in ("", "0", "false")
    )


# ---- the display


@dataclass
class _Task:
    description: str
    total: float | None
    unit: str
    done: float = 0
    text: str = ""
    also: str = ""
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)
    first: tuple[float, float] | None = None
    """(time, done) of the first update, so that the rate does not include what an earlier start had done."""


class Console:
    """Writes lines, tables and progress bars to one stream. Create it on rank 0 only."""

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        self.stream = (
            SafeStream(stream).unfiltered if not isinstance(stream, SafeStream) else stream.unfiltered
        )
        self.interactive = is_interactive(self.stream)
        self.cells: Sequence[tuple[str, str]] = ()
        """Names and numbers below the bars."""
        self._tasks: dict[int, _Task] = {}
        self._next = 0
        self._rich: Any = None
        self._live: Any = None
        if self.interactive:
            import rich.console  # lazily: a redirected run does not need rich

            self._rich = rich.console.Console(file=self.stream, highlight=False, force_terminal=True)  # type: ignore[arg-type]

    @property
    def failure(self) -> str | None:
        """Why nothing is printed any more, or ``None``."""
        return self.stream.failure

    def line(self, text: str, *, style: str = "") -> None:
        """Print one permanent line; on a terminal above the display."""
        if self._rich is not None:
            from rich.text import Text

            self._rich.print(Text(printable(text), style=style), soft_wrap=True)
        else:
            self.stream.write(one_line(text) + "\n")
            self.stream.flush()

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values in two columns; the values are never truncated."""
        if self._rich is not None:
            from rich.text import Text

            words = Text(printable(title), style="table.title")  # rich would parse a string as markup
            self._rich.print(self._grid(rows, title=words, title_justify="left"))
            return
        width = max((columns(name) for name, _ in rows), default=0)
        self.line(title)
        for name, value in rows:
            self.line(f"  {name}{' ' * (width - columns(name))}  {value}")

    def panel(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print the results at the end of a run."""
        if self._rich is None or not rows:
            self.table(title, rows)
            return
        from rich.panel import Panel
        from rich.text import Text

        self._rich.print(
            Panel(
                self._grid(rows),
                title=Text(printable(title)),
                title_align="left",
                border_style="green",
                expand=False,
            )
        )

    @staticmethod
    def _grid(rows: Sequence[tuple[str, str]], **options: Any) -> Any:
        from rich.table import Table
        from rich.text import Text

        grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0), **options)
        # Names must fold as well, if half of the terminal is too narrow for them: otherwise no width is left for the value.
        grid.add_column(style="cyan", overflow="fold")
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(printable(name)), Text(printable(value)))
        return grid

    def add(self, description: str, total: float | None, unit: str = "") -> int:
        """Add a bar; with ``total`` None its end is unknown. Returns its key."""
        key, self._next = self._next, self._next + 1
        self._tasks[key] = _Task(one_line(description), total, unit)
        if self._rich is not None and self._live is None:
            self._live = _make_live(self._rich, self._display_lines)
            self._live.start()
        return key

    def update(
        self,
        key: int,
        done: float,
        text: str | None = None,
        *,
        total: float | None = None,
        also: str | None = None,
        quiet: bool = False,
    ) -> None:
        """Set a bar to ``done``, with a new ``total`` if given; ``also`` is text after the bar's own.

        ``text`` replaces all of its text; with ``quiet`` no plain line is printed (the caller prints its own).
        """
        task = self._tasks[key]
        if task.first is None or done < task.done or total not in (None, task.total):
            task.first = time.monotonic(), done
        task.done = done
        task.total = task.total if total is None else total
        task.also = task.also if also is None else also
        if text is not None:
            task.text = text
        if self._rich is None and not quiet and time.monotonic() - task.printed >= PLAIN_TASK_SECONDS:
            task.printed = time.monotonic()
            self.line(f"{task.description}: {_progress(task)}, {duration(task.printed - task.started)}")

    def remove(self, key: int) -> None:
        """Remove a bar."""
        self._tasks.pop(key, None)
        if not self._tasks:
            self.close()

    def close(self) -> None:
        """Remove the display; lines can still be printed."""
        self._tasks.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _display_lines(self, width: int) -> list[Any]:
        """The display as lines of at most ``width`` columns: a bar for each task, then the numbers."""
        from rich.text import Text

        lines = []
        for task in list(self._tasks.values()):
            words = task.text or _progress(task)
            space = min(40, width - columns(task.description) - columns(words) - 2)
            line = Text(f"{task.description} ", style="bold")
            if space >= 8 and task.total:
                full = round(space * min(1.0, task.done / task.total))
                line.append("━" * full, style="green").append("━" * (space - full), style="bright_black")
                line.append(" ")
            lines.append(line.append(words, style="none"))
        lines += [Text(printable(line)) for line in self._cell_lines(width)]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def _cell_lines(self, width: int) -> list[str]:
        """The numbers in as few lines as the width allows; a cell is never broken."""
        lines: list[str] = []
        for name, value in self.cells:
            cell = f"{name} {value}"
            if lines and columns(lines[-1]) + 3 + columns(cell) <= width:
                lines[-1] += f" · {cell}"
            else:
                lines.append(cell)
        return lines


def _make_live(console: Any, lines: Callable[[int], list[Any]]) -> Any:
    """rich's Live with a fix: it also erases its last frame completely after the terminal has become narrower."""
    from rich.control import Control
    from rich.live import Live
    from rich.segment import ControlType

    class Frame:
        columns = 0
        widths: Sequence[int] = ()

        def __rich_console__(self, console: Any, options: Any) -> Any:
            # One column stays empty: a line that fills the last column wraps in some terminals.
            texts = lines(max(8, options.max_width - 1))
            self.columns, self.widths = options.max_width, [text.cell_len for text in texts]
            yield from texts

    class Display(Live):
        def process_renderables(self, renderables: Any) -> Any:
            drawn = super().process_renderables(renderables)
            columns = self.console.width
            if frame.widths and columns < frame.columns:
                # The terminal has wrapped the lines of the last frame: erase as many rows as they take now.
                rows = sum(max(1, -(-width // columns)) for width in frame.widths)
                erase = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2))
                drawn[0] = Control(
                    ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *(erase * (rows - 1))
                )
            return drawn

    frame = Frame()
    return Display(
        frame,
        console=console,
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,  # only the lines above and the panel at the end stay
        redirect_stdout=True,
        redirect_stderr=True,
    )


def _progress(task: _Task) -> str:
    """``1.2M/10.8M bytes 11%, 640k/s, left 0:00:15, 1,204 documents``, without what is not known."""
    unit = f" {task.unit}" if task.unit else ""
    if not task.total:
        return f"{short(task.done)}{unit}" + (f", {task.also}" if task.also else "")
    words = [f"{short(task.done)}/{short(task.total)}{unit} {100 * task.done / task.total:.0f}%"]
    begun, already = task.first or (task.started, 0)
    rate = (task.done - already) / max(time.monotonic() - begun, 1e-9)
    if rate > 0 and task.done < task.total:
        words += [f"{short(rate)}/s", f"left {duration((task.total - task.done) / rate)}"]
    return ", ".join([*words, task.also] if task.also else words)


# ---- the messages of a rank


class RankLog:
    """Messages of one rank: rank 0 prints them and writes ``train.log``; the others only write ``logs/rank-*.log``.

    Secrets are hidden (:mod:`lmcore.report.redact`). If a stream or log file cannot be written, nothing is raised; lost lines
    are reported where that is still possible.
    """

    def __init__(self, run_dir: Path, rank: int, stream: TextIO | None = None) -> None:
        self.rank = rank
        self._console = Console(stream) if rank == 0 else None
        self._path = run_dir / "train.log" if rank == 0 else run_dir / "logs" / f"rank-{rank:05d}.log"
        self._log_file: TextIO | None = None  # opened at the first line: most ranks never write one
        self._lost_lines = 0
        self._warned: set[str] = set()
        self._handler: logging.Handler | None = None
        self._lock = threading.RLock()  # trackers write from their own threads

    def note(self, text: str) -> None:
        """One line."""
        self._say(text)

    def warn_once(self, text: str) -> None:
        """A warning; repeated ones are printed only once."""
        with self._lock:
            if text not in self._warned:
                self._warned.add(text)
                self._say(f"warning: {text}", style="yellow")

    def error(self, text: str) -> None:
        """A fault, which every rank also prints on standard error."""
        text = redact(text)
        self.log(f"error: {text}")
        if self._console is not None and self._console.interactive:
            self._console.line(f"error: {text}", style="bold red")
        else:
            prefix = "" if self.rank == 0 else f"[rank {self.rank}] "
            errors = SafeStream(sys.stderr)
            errors.write(f"{prefix}error: {one_line(text)}\n")
            errors.flush()

    def _say(self, text: str, *, style: str = "", names_decide: bool = True) -> None:
        hide = redact if names_decide else hide_values
        with self._lock:
            text = hide(text)
            if self._console is not None:
                self._console.line(text, style=style)
            self.log(text, names_decide=names_decide)

    def log(self, text: str, *, names_decide: bool = True) -> None:
        """One line for the file only.

        Args:
            names_decide: hide what follows the name of a secret. Not for samples, in which "--password" is only a prompt.
        """
        with self._lock:
            failure = None if self._console is None else self._console.failure
            if failure and failure not in self._warned:
                self._warned.add(failure)
                self._write_line(f"standard output is gone ({failure}): the run goes on, see this file")
            self._write_line(text, redact if names_decide else hide_values)

    def _write_line(self, text: str, hide: Callable[[str], str] = redact) -> None:
        try:
            if self._log_file is None:
                DISK.makedirs(self._path.parent)
                self._log_file = open(self._path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            if self._lost_lines:
                self._log_file.write(f"{now()} {amount(self._lost_lines, 'line')} missing here\n")
            self._log_file.write(f"{now()} {hide(one_line(text))}\n")
            self._log_file.flush()
        except OSError as error:
            self._drop_log_file()
            self._lost_lines += 1
            if self._lost_lines == 1 and self._console is not None:
                self._console.line(
                    f"warning: {self._path} cannot be written ({error.strerror}): lines are lost"
                )
        else:
            self._lost_lines = 0

    def _drop_log_file(self) -> None:
        """Close the file without raising: a file that cannot be written would raise again when it is closed."""
        if self._log_file is not None:
            with contextlib.suppress(OSError):  # the caller has counted the lost line
                self._log_file.close()
            self._log_file = None

    def capture_logging(self, level: int = logging.WARNING) -> None:
        """Pass log messages of other libraries, and Python's warnings, to :meth:`warn_once`."""
        log = self

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                try:
                    text = record.getMessage()
                except (
                    Exception
                ):  # wrong arguments for its text, or a broken __str__: formatting runs the library's code
                    text = f"{record.msg} {record.args}"
                log.warn_once(f"{record.name}: {text.strip()}")

        self._handler = Handler(level)
        logging.getLogger().addHandler(self._handler)
        logging.captureWarnings(True)

    def close(self) -> None:
        """Close the display and the file, and stop capturing log messages."""
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            logging.captureWarnings(False)
            self._handler = None
        if self._console is not None:
            self._console.close()
        with self._lock:
            self._drop_log_file()


def now() -> str:
    """The local time, formatted for logs."""
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def silence_other_bars() -> None:
    """Switch off the progress bars of other libraries, because a terminal can have only one display.

    Call this before transformers, datasets and huggingface_hub are imported; it also works for those already imported.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    # Each library reads its variable at import. If it is already imported, use its own function.
    for module, switch in (
        ("transformers.utils.logging", "disable_progress_bar"),
        ("datasets.utils.logging", "disable_progress_bar"),
        ("huggingface_hub.utils", "disable_progress_bars"),
    ):
        if module in sys.modules:
            getattr(sys.modules[module], switch, lambda: None)()
