"""What a person sees while a run goes on: one calm display on a terminal, one plain line at a time elsewhere.

Comes in: lines, tables, progress. Goes out: text on a stream. What always holds: without a terminal that can
move its cursor (redirected, Slurm, ``TERM=dumb``, CI) there are no control characters, no colour and no
wrapping, each line is complete and flushed; with one, everything lives in a single display that is redrawn
twice a second, and permanent lines are printed above it.

    >>> console = Console(interactive=False)
    >>> console.line("step 1/4000 loss 9.0108")
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lmcore.humanize import duration, short
from lmcore.report.redact import redact

REFRESHES_PER_SECOND = 2
PLAIN_TASK_SECONDS = 30.0
"""Without a terminal a long sub-task (tokenizing, evaluating) says how far it is this often."""

STEP_CELLS = frozenset(
    (
        "loss",
        "smoothed",
        "lr",
        "norm",
        "tok/s",
        "per device",
        "MFU",
        "memory",
        "wait",
        "skipped",
        "non-finite",
    )
)
"""The names that :func:`step_cells` may give."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u2028\u2029]")


def is_interactive(stream: TextIO) -> bool:
    """A terminal that can move its cursor, with a person before it. ``LMCORE_CONSOLE=rich|plain`` decides
    otherwise.
    """
    forced = os.environ.get("LMCORE_CONSOLE", "")
    if forced in ("rich", "plain"):
        return forced == "rich"
    environment = os.environ
    return (
        stream.isatty()
        and environment.get("TERM", "dumb") not in ("dumb", "unknown", "")
        and "SLURM_JOB_ID" not in environment
        and environment.get("CI", "").lower() in ("", "0", "false")
    )


def one_line(text: str) -> str:
    """``text`` as one line without control characters; line breaks become visible as ``\\n``."""
    text = text.replace("\r\n", "\n").replace("\n", "\\n").replace("\t", "    ")
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


def printable(text: str) -> str:
    """``text`` with its line breaks, without the characters that could move a cursor or ring a bell."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def step_cells(record: dict[str, Any], smoothed: float, world_size: int) -> dict[str, str]:
    """What a person wants to know of a train record, in words; what is not known is left out."""
    rate, norm = record["tokens_per_second"], record["grad_norm"]
    cells = {
        "loss": f"{record['loss']:.4f}",
        "smoothed": f"{smoothed:.4f}",
        "lr": f"{record['lr']:.2e}",
        "norm": None if norm is None else f"{norm:.3g}",
        "tok/s": short(rate),
        "per device": None if world_size == 1 else short(rate / world_size),
        "MFU": f"{100 * record['mfu']:.1f}%" if "mfu" in record else None,
        "memory": f"{record['memory_bytes'] / 2**30:.2f} GiB",
        "wait": f"{100 * record['data_wait']:.1f}%",
        "skipped": str(record["skipped_steps"]) if "skipped_steps" in record else None,
        "non-finite": str(record["nonfinite_losses"]) if "nonfinite_losses" in record else None,
    }
    return {name: value for name, value in cells.items() if value is not None}


@dataclass
class _Task:
    description: str
    total: float | None
    unit: str
    done: float = 0
    text: str = ""
    also: str = ""
    started: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    first: tuple[float, float] | None = None
    """(time, done) of the first update: what an earlier start had done already is no rate."""


class Console:
    """One stream, written by one process. Build it on rank 0 only."""

    def __init__(self, *, interactive: bool | None = None, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.interactive = is_interactive(self.stream) if interactive is None else interactive
        self.cells: Sequence[tuple[str, str]] = ()
        self._tasks: dict[int, _Task] = {}
        self._next = 0
        self._rich: Any = None
        self._live: Any = None
        if self.interactive:
            import rich.console  # lazily: a redirected run does not need rich

            self._rich = rich.console.Console(file=self.stream, highlight=False, force_terminal=True)

    def line(self, text: str, *, style: str = "") -> None:
        """One permanent line; above the display on a terminal."""
        if self._rich is not None:
            from rich.text import Text

            self._rich.print(Text(printable(text), style=style), soft_wrap=True)
        else:
            self.stream.write(one_line(text) + "\n")
            self.stream.flush()

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Names and values in two columns; the values are never cut."""
        if self._rich is not None:
            from rich.table import Table
            from rich.text import Text

            table = Table(
                title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
            )
            table.add_column(style="cyan", no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in rows:
                table.add_row(Text(printable(name)), Text(printable(value)))
            self._rich.print(table)
            return
        width = max((len(name) for name, _ in rows), default=0)
        self.line(title)
        for name, value in rows:
            self.line(f"  {name:<{width}}  {value}")

    def panel(self, title: str, rows: Sequence[tuple[str, str]], *, good: bool = True) -> None:
        """The last word of a run."""
        if self._rich is None:
            self.table(title, rows)
            return
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(printable(name)), Text(printable(value)))
        self._rich.print(
            Panel(grid, title=title, title_align="left", border_style="green" if good else "red")
        )

    # The display: tasks (bars) and cells (numbers).

    def add(self, description: str, total: float | None, unit: str = "") -> int:
        """A new bar; ``total`` None draws a moving one. Returns its key."""
        key, self._next = self._next, self._next + 1
        self._tasks[key] = _Task(description, total, unit)
        if self._rich is not None and self._live is None:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render,
                console=self._rich,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,  # what stays is the lines above and the panel at the end
                redirect_stdout=True,
                redirect_stderr=True,
            )
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
        """Move a bar to ``done``, of another ``total`` if given; ``also``: further words behind its own.

        ``text`` stands in place of them all; ``quiet`` never prints a plain line (the caller prints its own).
        """
        task = self._tasks[key]
        if task.first is None or done < task.done or total not in (None, task.total):
            task.first = time.monotonic(), done
        task.done = done
        task.total = task.total if total is None else total
        task.also = task.also if also is None else also
        if text is not None:
            task.text = text
        if self._rich is None and not quiet and time.monotonic() - task.said >= PLAIN_TASK_SECONDS:
            task.said = time.monotonic()
            self.line(f"{task.description}: {_progress(task)}, {duration(task.said - task.started)}")

    def remove(self, key: int) -> None:
        self._tasks.pop(key, None)
        if not self._tasks:
            self.close()

    def close(self) -> None:
        """Take the display down; lines may still be printed."""
        self._tasks.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bars = Table.grid(padding=(0, 1, 0, 0), expand=True)
        bars.add_column(no_wrap=True)
        bars.add_column(ratio=1, min_width=8)
        bars.add_column(no_wrap=True, overflow="ellipsis")
        for task in list(self._tasks.values()):
            total = None if not task.total else float(task.total)
            bar = ProgressBar(total=total, completed=min(task.done, total or task.done), pulse=total is None)
            bars.add_row(Text(task.description, style="bold"), bar, Text(task.text or _progress(task)))
        return Group(bars, *[Text(line, no_wrap=True) for line in self._cell_lines(self._rich.width)])

    def _cell_lines(self, width: int) -> list[str]:
        """The numbers, packed into as few lines as the width allows; never broken inside a cell."""
        lines: list[str] = []
        for name, value in self.cells:
            cell = f"{name} {value}"
            if lines and len(lines[-1]) + 3 + len(cell) <= width:
                lines[-1] += f" · {cell}"
            else:
                lines.append(cell)
        return lines


def _progress(task: _Task) -> str:
    """``1.2M/10.8M bytes 11%, 640k/s, left 0:00:15, 1,204 documents``: as much of it as is known."""
    unit = f" {task.unit}" if task.unit else ""
    if not task.total:
        return f"{short(task.done)}{unit}" + (f", {task.also}" if task.also else "")
    words = [f"{short(task.done)}/{short(task.total)}{unit} {100 * task.done / task.total:.0f}%"]
    begun, already = task.first or (task.started, 0)
    rate = (task.done - already) / max(time.monotonic() - begun, 1e-9)
    if rate > 0 and task.done < task.total:
        words += [f"{short(rate)}/s", f"left {duration((task.total - task.done) / rate)}"]
    return ", ".join([*words, task.also] if task.also else words)


class Voice:
    """Words of one rank: rank 0 to the person and into ``train.log``, others into ``logs/rank-*.log``
    only.
    """

    def __init__(self, run_dir: Path, rank: int, *, interactive: bool | None, stream: TextIO | None) -> None:
        self.rank = rank
        self.console = Console(interactive=interactive, stream=stream) if rank == 0 else None
        self._path = run_dir / "train.log" if rank == 0 else run_dir / "logs" / f"rank-{rank:05d}.log"
        self._log: TextIO | None = None  # opened by the first word: most ranks never say one
        self._said: set[str] = set()
        self._handler: logging.Handler | None = None
        # Trackers and other threads speak too.
        self._lock = threading.RLock()

    def note(self, text: str) -> None:
        """One line."""
        with self._lock:
            if self.console is not None:
                self.console.line(text)
            self.log(text)

    def warn_once(self, text: str) -> None:
        """A warning, said once however often it is true."""
        with self._lock:
            if text in self._said:
                return
            self._said.add(text)
            if self.console is not None:
                self.console.line(f"warning: {text}", style="yellow")
            self.log(f"warning: {text}")

    def error(self, text: str) -> None:
        """A fault: every rank says it on standard error too."""
        self.log(f"error: {text}")
        if self.console is not None and self.console.interactive:
            self.console.line(f"error: {text}", style="bold red")
        else:
            who = "" if self.rank == 0 else f"[rank {self.rank}] "
            sys.stderr.write(f"{who}error: {one_line(text)}\n")
            sys.stderr.flush()

    def log(self, text: str) -> None:
        """One line for the file only."""
        with self._lock:
            if self._log is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._log = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
            self._log.write(f"{now()} {redact(one_line(text))}\n")  # errors quote what they were given
            self._log.flush()

    def capture_logging(self, level: int = logging.WARNING) -> None:
        """Send what other libraries log, and Python's warnings, through :meth:`warn_once`."""
        voice = self

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                voice.warn_once(f"{record.name}: {record.getMessage().strip()}")

        self._handler = Handler(level)
        logging.getLogger().addHandler(self._handler)
        logging.captureWarnings(True)

    def close(self) -> None:
        """Let go of the log, the logging of others and the display."""
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            logging.captureWarnings(False)
            self._handler = None
        if self.console is not None:
            self.console.close()
        with self._lock:
            if self._log is not None:
                self._log.close()
                self._log = None


def now() -> str:
    """Local time, as it stands in logs."""
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def silence_other_bars() -> None:
    """Switch off the progress bars of other libraries: only one display can live on a terminal.

    Call it before transformers, datasets and huggingface_hub are imported; those already here are told too.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    # Each library reads its variable at import; one that is here already has a switch of its own.
    for module, switch in (
        ("transformers.utils.logging", "disable_progress_bar"),
        ("datasets.utils.logging", "disable_progress_bar"),
        ("huggingface_hub.utils", "disable_progress_bars"),
    ):
        if module in sys.modules:
            getattr(sys.modules[module], switch, lambda: None)()
