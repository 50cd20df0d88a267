"""Sums over time -> console, ``train.log``, ``metrics.jsonl``, trackers.

Comes in: what each step did, as device tensors and host numbers; evaluations, events, samples, notes. Goes
out: what a person sees (:mod:`lmcore.report.console`), the record of the run (:mod:`lmcore.report.metrics`) and what
trackers get. What always holds: the logged loss is the exact mean over all tokens of all ranks since the
last line; the device is asked for numbers only when a line is due; the time of evaluating and saving is not
step time; only rank 0 speaks, other ranks write into ``logs/rank-*.log``.

    >>> with Report("runs/demo", every=100) as report:
    ...     report.begin(step=0, total_steps=4000)
    ...     report.step(step=1, epoch=0.0, tokens=8192, position=8, loss_sum=loss_sum, count=count, lr=3e-4)
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lmcore.humanize import duration, short
from lmcore.report.console import STEP_CELLS, Voice, now, silence_other_bars, step_cells
from lmcore.report.meters import PeakMemory, Sums, Timer, Totals
from lmcore.report.metrics import MetricsFile, read_metrics, versions
from lmcore.report.redact import redact

if TYPE_CHECKING:  # torch costs seconds to import, and this room only calls methods of tensors it is handed
    from torch import Tensor

__all__ = ["Report", "read_metrics", "silence_other_bars"]

DISPLAY_SECONDS = 0.25
SMOOTHING = 0.9
"""Weight of the past in the smoothed loss of the display; the record holds the exact means."""


class Report:
    """The voice of a run. Every rank builds one and calls the same methods; each says who speaks."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        every: int | Callable[[int], bool] | None = 100,
        interactive: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """
        Args:
            run_dir: the run folder; created if missing.
            every: a line and a record every so many steps, or a function of the step; ``None``: never. The
                first step of a run and the last one are always logged.
            interactive: ``None`` finds out whether a person sits before the stream (``is_interactive``).
            stream: standard output by default.
        """
        self.run_dir = Path(run_dir)
        self.rank = rank
        self.world_size = world_size
        self.every = every
        self.is_main = rank == 0
        if self.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self._voice = Voice(self.run_dir, rank, interactive=interactive, stream=stream)
        self._console = self._voice.console
        self.note = self._voice.note
        """One line for the person and for ``train.log``; on other ranks into their own file only."""
        self.warn_once = self._voice.warn_once
        self.error = self._voice.error
        self.capture_logging = self._voice.capture_logging
        self._file = MetricsFile(self.run_dir / "metrics.jsonl") if self.is_main else None
        self._start_rows: dict[str, str] = {}
        self._bar: int | None = None
        self._trackers: Any = None
        self._reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self._memory = PeakMemory()
        self._flops_per_token: float | None = None
        self._peak_flops: float | None = None
        self._total_steps: int | None = None
        self._interval, self._epoch = Sums(), Sums()
        self._timer = Timer()
        self._tokens_logged = 0
        self._smoothed = 0.0
        self._smoothing_weight = 0.0
        self.logged: dict[str, float | None] = {}
        """Of the last line about training (rank 0): what a checkpoint can be the best by."""
        self._drawn = 0.0
        self._cells: dict[str, str] = {}
        self._rates: list[float] = []

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- words

    def start(self, rows: Sequence[tuple[str, str]], *, title: str = "lmcore") -> None:
        """The table of what is about to happen; it is also kept with the ``start`` or ``resume`` event."""
        self._start_rows = dict(rows)
        if self._console is None:
            return
        self._console.table(title, rows)
        for name, value in rows:
            self._voice.log(f"{name}: {value}")

    def end(
        self,
        title: str,
        rows: Sequence[tuple[str, str]],
        *,
        commands: Sequence[tuple[str, str]] = (),
        good: bool = True,
    ) -> None:
        """The last panel: results, where the model is, and the commands to go on with."""
        if self._console is None:
            return
        self._console.close()
        self._bar = None
        self._console.panel(title, rows, good=good)
        width = max((len(name) for name, _ in commands), default=0)
        for name, command in commands:  # outside of the frame: a broken line could not be copied
            self._console.line(f"  {name:<{width}}  {command}")
        self._voice.log(title)
        for name, value in [*rows, *commands]:
            self._voice.log(f"{name}: {value}")

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file({**record, "time": time.time()})

    # ---- time

    def pause(self) -> AbstractContextManager[None]:
        """What runs inside is not step time. Pauses may lie inside each other."""
        return self._timer.pause()

    @contextmanager
    def task(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[Callable[..., None]]:
        """A bar of its own in the same display; yields ``advance(n=1)`` (adds) or ``advance(done=n)`` (sets),
        each with ``total`` and ``also`` (further words) where they have changed.
        """
        key = self._console.add(description, total, unit) if self._console is not None else -1
        position = 0.0

        def advance(n: float = 1, *, done: float | None = None, **known: Any) -> None:
            nonlocal position
            position = position + n if done is None else done
            if self._console is not None:
                self._console.update(key, position, **known)

        try:
            with self.pause():
                yield advance
        finally:
            if self._console is not None:
                self._console.remove(key)

    # ---- steps

    def begin(
        self,
        *,
        step: int = 0,
        total_steps: int | None = None,
        tokens: int = 0,
        reduce: Callable[[Tensor], Tensor] | None = None,
        trackers: Any = None,
        flops_per_token: float | None = None,
        peak_flops_per_device: float | None = None,
        device: Any = None,
        bytes_before: int = 0,
    ) -> None:
        """Right before the loop: the timers start.

        Args:
            step, tokens: what is already done (resume).
            reduce: sums a tensor over ranks; collective, called on every rank when a line is due.
            trackers: :class:`lmcore.report.trackers.Trackers` on rank 0, or ``None``.
            flops_per_token, peak_flops_per_device: for the share of the device's peak (MFU); unknown: left
                out.
            bytes_before: resident memory of the process before it built its model.
        """
        self._memory = PeakMemory(device, bytes_before)
        self._total_steps = total_steps
        self._tokens_logged = tokens
        self._trackers = trackers
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops_per_device
        if reduce is not None:
            self._reduce = reduce
        self._timer.start()
        if self._console is not None and self._bar is None:
            self._bar = self._console.add("train", total_steps, "steps")
            self._console.update(self._bar, step, quiet=True)

    def step(
        self,
        *,
        step: int,
        epoch: float,
        tokens: int,
        position: int,
        loss_sum: Tensor,
        count: Tensor | int,
        lr: float,
        norm: Tensor | float | None = None,
        applied: Tensor | bool | None = None,
        wait_seconds: float = 0.0,
        due: bool | None = None,
    ) -> dict[str, Any] | None:
        """Add a step; every rank, every step. Collective when a line is due.

        Args:
            step: updates done, this one included (the first is 1); ``tokens`` and ``position`` likewise.
            loss_sum, count: sums of this rank's micro-batches; tensors stay on the device.
            norm: gradient norm of the update. applied: whether the update reached the weights.
            wait_seconds: how long the step waited for its data.
            due: instead of what ``every`` says; must be equal on all ranks. The first and the last step of
                a run are always logged.

        Returns:
            The record that was written, on rank 0 and when one was due.
        """
        self._interval.add(loss_sum, count, applied)
        self._epoch.add(loss_sum, count, applied)
        self._timer.step(wait_seconds)
        if due is None:
            due = self._is_due(step)
        due = due or step in (1, self._total_steps)
        record = self._record(step, epoch, tokens, position, lr, norm) if due else None
        self._draw(step, epoch, tokens, force=due)
        return record

    def _is_due(self, step: int) -> bool:
        if callable(self.every):
            return self.every(step)
        return bool(self.every) and step % int(self.every or 1) == 0

    def _record(
        self, step: int, epoch: float, tokens: int, position: int, lr: float, norm: Tensor | float | None
    ) -> dict[str, Any] | None:
        totals = self._interval.total(self._reduce, is_main=self.is_main)
        self._interval.zero()
        # Reading the sums has waited for the device: only now is the time of the interval known.
        seconds, waited, steps = self._timer.interval()
        rate = (tokens - self._tokens_logged) / seconds if seconds > 0 else math.nan
        self._tokens_logged = tokens
        if not self.is_main:
            return None
        loss = totals.loss
        record: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": epoch,
            "tokens": tokens,
            "position": position,
            "loss": loss,
            "lr": lr,
            "grad_norm": None if norm is None else float(norm),
            "tokens_per_second": rate,
            "data_wait": waited / seconds if seconds > 0 else 0.0,
            "step_seconds": seconds / steps,
            "memory_bytes": self._memory.peak_bytes,
            "tensor_bytes": self._memory.tensor_bytes,
            "train_seconds": self.train_seconds,
        }
        if self._flops_per_token and self._peak_flops:
            record["mfu"] = rate * self._flops_per_token / (self._peak_flops * self.world_size)
        if totals.nonfinite:
            # Counted per rank: a step in which one of eight ranks saw NaN counts once.
            record["nonfinite_losses"] = int(totals.nonfinite)
        if totals.skipped:
            record["skipped_steps"] = round(totals.skipped / self.world_size)
        if math.isfinite(loss):
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
            self._smoothing_weight = SMOOTHING * self._smoothing_weight + (1 - SMOOTHING)
        self.logged = {"train/loss": loss, "train/grad_norm": record["grad_norm"]}
        if math.isfinite(rate):
            self._rates.append(rate)
        self._write(record)
        if self._trackers is not None:
            self._trackers.log("train", {k: v for k, v in record.items() if k not in ("kind", "step")}, step)
        self._say_step(record)
        return record

    def _say_step(self, record: dict[str, Any]) -> None:
        smoothed = self._smoothed / self._smoothing_weight if self._smoothing_weight else math.nan
        step = record["step"]
        cells = step_cells(record, smoothed, self.world_size)
        held = {name: value for name, value in self._cells.items() if name not in STEP_CELLS}
        self._cells = {**cells, **held}
        share = f"/{self._total_steps} {100 * step / self._total_steps:.1f}%" if self._total_steps else ""
        words = " ".join(f"{name} {value}" for name, value in cells.items())
        where = f"step {step}{share} epoch {record['epoch']:.3f} tokens {short(record['tokens'])}"
        text = f"{where} {words} eta {self._eta(step)}"
        self._voice.log(text)
        if self._console is not None and not self._console.interactive:
            self._console.line(f"{now()} {text}")

    def _draw(self, step: int, epoch: float, tokens: int, *, force: bool) -> None:
        if self._console is None or self._bar is None or not self._console.interactive:
            return
        now = time.monotonic()
        if not force and now - self._drawn < DISPLAY_SECONDS:
            return
        self._drawn = now
        cells = {"epoch": f"{epoch:.3f}", "tokens": short(tokens), **self._cells}
        self._console.cells = [(name, value) for name, value in cells.items() if value]
        share = f"/{self._total_steps:,} {100 * step / self._total_steps:.0f}%" if self._total_steps else ""
        text = f"{step:,}{share} {duration(self.train_seconds)} left {self._eta(step)}"
        self._console.update(self._bar, step, text, quiet=True)

    def _eta(self, step: int) -> str:
        per_step = self._timer.seconds_per_step
        if per_step is None or self._total_steps is None:
            return "?"
        return duration(per_step * (self._total_steps - step))

    # ---- numbers of the run so far

    @property
    def train_seconds(self) -> float:
        """Seconds spent in steps, over all restarts; evaluating and saving not included."""
        return self._timer.total_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the logged intervals of this process."""
        return statistics.median(self._rates) if self._rates else None

    # ---- other records

    def evaluation(
        self,
        *,
        set: str,
        step: int,
        epoch: float,
        tokens: int,
        loss: float,
        perplexity: float,
        bits_per_byte: float | None,
        **more: Any,
    ) -> None:
        """The result on one held-out set; ``set`` is its name, or ``test`` or ``test/NAME``.

        Trackers get it as ``valid/loss``, ``valid/NAME/loss``, ``test/loss`` or ``test/NAME/loss``.
        """
        if not self.is_main:
            return
        values = {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
        where = {"set": set, "step": step, "epoch": epoch, "tokens": tokens}
        self._write({"kind": "eval", **where, **values, **more})
        if self._trackers is not None:
            group = set if set.partition("/")[0] in ("valid", "test") else f"valid/{set}"
            self._trackers.log(group, {"epoch": epoch, **values}, step)
        self._cells[set] = f"{loss:.4f}"
        bits = "" if bits_per_byte is None else f" bits/byte {bits_per_byte:.4f}"
        self.note(f"step {step} {set} loss {loss:.4f} perplexity {perplexity:.4g}{bits}")

    def epoch(
        self, *, epoch: int, step: int, valid_loss: float | None = None, valid_step: int | None = None
    ) -> float | None:
        """At the end of an epoch; collective. Returns the exact mean training loss of the epoch (rank 0).
        ``valid_loss`` is the last one that is known, that of ``valid_step``."""
        totals = self._epoch.total(self._reduce, is_main=self.is_main)
        self._epoch.zero()
        if not self.is_main:
            return None
        loss = totals.loss
        valid = {"valid_loss": valid_loss, "valid_step": None if valid_loss is None else valid_step}
        self._write({"kind": "epoch", "epoch": epoch, "step": step, "train_loss": loss, **valid})
        if self._trackers is not None:
            values = {"train_loss": loss} | ({} if valid_loss is None else {"valid_loss": valid_loss})
            self._trackers.log("epoch", values, epoch)
        words = "" if valid_loss is None else f" valid loss {valid_loss:.4f}"
        words += f" (of step {valid_step})" if words and valid_step not in (None, step) else ""
        self.note(f"epoch {epoch} ended at step {step}: train loss {loss:.4f}{words}")
        return loss

    def event(self, event: str, *, step: int | None = None, **fields: Any) -> None:
        """Something happened: start, resume, checkpoint, skip, rewind, signal, end. Recorded, not said."""
        if not self.is_main:
            return
        record = {"kind": "event", "event": event, **({} if step is None else {"step": step})}
        if event in ("start", "resume"):
            record |= {"rows": self._start_rows, "command": sys.argv, "versions": versions()}
        record |= fields
        self._write(redact(record))  # the command line is in it, and words of errors
        if event == "checkpoint" and step is not None:
            self._cells["checkpoint"] = f"{step:,}"

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """What the model writes; (prompt, continuation) pairs."""
        if not self.is_main:
            return
        for prompt, text in samples:
            self._write({"kind": "sample", "step": step, "set": prompt, "prompt": prompt, "text": text})
            self.note(f"sample at step {step}:")
            for line in f"{prompt}{text}".split("\n"):
                self.note(f"  | {line}")
        if self._trackers is not None:
            self._trackers.text("samples", "\n\n".join(f"{p}{t}" for p, t in samples), step)

    # ---- resume

    def state(self) -> dict[str, Any]:
        """Collective: what :meth:`load_state` needs to go on with the same means. JSON."""
        return {
            "interval": asdict(self._interval.total(self._reduce, is_main=self.is_main)),
            "epoch": asdict(self._epoch.total(self._reduce, is_main=self.is_main)),
            "smoothed": [self._smoothed, self._smoothing_weight],
            "logged": self.logged,
            "train_seconds": self.train_seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; before the first step."""
        for sums, name in ((self._interval, "interval"), (self._epoch, "epoch")):
            sums.load(Totals(**state[name]) if self.is_main else None)
        self._smoothed, self._smoothing_weight = state["smoothed"]
        self.logged = state.get("logged", {})
        self._timer.total_seconds = state["train_seconds"]

    def rewind(self, *, step: int, state: dict[str, Any]) -> None:
        """Training goes on from an earlier checkpoint, whose :meth:`state` this is; the time spent stays
        spent.
        """
        spent = self.train_seconds
        self.load_state({**state, "train_seconds": spent})
        self.event("rewound", step=step)
        self._timer.start()

    def close(self) -> None:
        """Take the display down and close the files; of a run that fails, the trackers get what they were told."""
        if self._trackers is not None:
            self._trackers.close()
        self._voice.close()
        self._bar = None
        if self._file is not None:
            self._file.close()
