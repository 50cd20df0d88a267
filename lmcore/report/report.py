"""What a run records and shows: steps, evaluations, samples and events go to metrics.jsonl, console and trackers.

Every rank creates a :class:`Report` and calls the same methods; rank 0 writes. The logged loss is the exact mean over all
labels of all ranks since the last log line, never smoothed. Numbers are read from the device only when a line is due, and
the time of evaluating and saving does not count as step time.

    >>> with Report("runs/demo") as report:
    ...     report.begin(step=0, total_steps=4000)
    ...     report.step(step=1, epoch=0.0, tokens=8192, position=8, loss_sum=loss_sum, count=count, lr=3e-4,
    ...                 metrics={"accuracy": (correct, count)}, due=True)
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

from lmcore.disk import DISK
from lmcore.errors import RequestError
from lmcore.humanize import amount, duration, short
from lmcore.report.console import RankLog, now, one_line, silence_other_bars
from lmcore.report.meters import PeakMemory, Sums, Timer, Totals
from lmcore.report.metrics import RECORD_KEYS, MetricsFile, read_metrics, versions
from lmcore.report.redact import redact

if TYPE_CHECKING:  # importing torch takes seconds, and this module only calls methods of given tensors
    from torch import Tensor

    from lmcore.report.meters import Metrics

__all__ = ["Report", "read_metrics", "silence_other_bars"]

DISPLAY_SECONDS = 0.25
PLAIN_STEP_SECONDS = 30.0
"""How often the latest step is printed between two log lines without a terminal; it is not written to metrics.jsonl."""


class Report(RankLog):
    """Records and displays a run. For messages it has ``note``, ``warn_once`` and ``error`` of
    :class:`~lmcore.report.console.RankLog`.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        on_full_disk: str = "continue",
        stream: TextIO | None = None,
    ) -> None:
        """
        Args:
            run_dir: the run folder; created if missing.
            on_full_disk: ``checkpoint.on_full_disk``. If metrics.jsonl cannot be written, ``continue`` keeps its
                records in memory until it can be, ``stop`` also sets :attr:`failed`.
            stream: where rank 0 prints; standard output by default.

        Raises:
            RequestError: the folder cannot be created or written.
        """
        self.run_dir = Path(run_dir)
        self.world_size = self._summed_ranks = world_size
        self.is_main = rank == 0
        self._file: MetricsFile | None = None
        if self.is_main:
            try:
                DISK.makedirs(self.run_dir)
                self._file = MetricsFile(self.run_dir / "metrics.jsonl")
            except OSError as error:
                raise RequestError(
                    f"run_dir {self.run_dir} cannot be written: {error.strerror}; choose another with --run_dir"
                ) from error
        super().__init__(self.run_dir, rank, stream)
        self._stop_on_full_disk = on_full_disk == "stop"
        self._unwritten = 0
        self._start_rows: dict[str, str] = {}
        self._bar: int | None = None
        self._trackers: Any = None
        self._reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self._memory = PeakMemory()
        self._flops_per_token: float | None = None
        self._peak_flops: float | None = None
        self._total_steps: int | None = None
        self._progress: Callable[[int], tuple[float, float]] | None = None
        self._interval, self._epoch = Sums(), Sums()
        self._timer = Timer()
        self._tokens_logged = 0
        self.logged: dict[str, float | None] = {}
        """The numbers of the last log line (on rank 0), as ``train/NAME``, by which the best checkpoint can be chosen."""
        self._evaluations: dict[str, dict[str, Any]] = {}
        self._drawn = self._printed = time.monotonic()
        self._latest: tuple[int, float] | None = None
        self._logged_step = 0
        self._cells: dict[str, str] = {}
        self._held_cells: dict[str, str] = {}
        self._rates: list[float] = []
        self._is_resumed = False
        self._ended: tuple[int, int, float] | None = None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- tables and records

    def start(self, rows: Sequence[tuple[str, str]], *, title: str = "lmcore") -> None:
        """Print the start table; it is also saved with the ``start`` or ``resume`` event."""
        rows = redact(rows)
        self._start_rows = dict(rows)
        if self._console is None:
            return
        self._console.table(title, rows)
        for name, value in rows:
            self.log(f"{name}: {value}")

    def end(
        self,
        title: str,
        rows: Sequence[tuple[str, str]] = (),
        *,
        commands: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Print the last panel: :meth:`results`, then ``rows``; below it ``commands`` (name, command line) to continue with."""
        if self._console is None:
            return
        self._console.close()
        self._bar = None
        rows, commands = redact([*self.results(), *rows]), redact(commands)
        self._console.panel(title, rows)
        width = max((len(name) for name, _ in commands), default=0)
        for name, command in commands:  # outside the frame, because a wrapped line could not be copied
            self._console.line(f"  {name:<{width}}  {command}")
        self.log(title)
        for name, value in [*rows, *commands]:
            self.log(f"{name}: {value}")

    def results(self) -> list[tuple[str, str]]:
        """The results as (name, value): training loss, the loss of every set, time, tokens per second."""
        rows: list[tuple[str, str]] = []
        loss = self.logged.get("train/loss")
        if self._latest is not None and self._latest[0] > self._logged_step:
            rows.append(("training loss", f"{self._latest[1]:.4f}  (step {self._latest[0]:,})"))
        elif loss is not None:
            rows.append(("training loss", f"{loss:.4f}"))
        for name, result in self._evaluations.items():
            bits = result.get("bits_per_byte")
            words = f"{_number(result['loss'])}  perplexity {_number(result['perplexity'], '.4g')}"
            words += "" if bits is None else f"  bits/byte {bits:.4f}"
            rows.append((f"{name} loss", f"{words}  (step {result['step']:,})"))
        if self.train_seconds > 0:
            rows.append(("time in steps", duration(self.train_seconds)))
        if self.tokens_per_second is not None:
            since = " since the resume" if self._is_resumed else ""
            rows.append(("tokens/s", f"{short(self.tokens_per_second)} (median{since})"))
        return rows

    @property
    def failed(self) -> bool:
        """Whether the run must stop because metrics.jsonl cannot be written and ``on_full_disk`` is ``stop``."""
        return self._stop_on_full_disk and self._unwritten > 0

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file({**redact(record), "time": time.time()})
        before, self._unwritten = self._unwritten, self._file.unwritten
        if self._unwritten and not before:
            then = (
                "the run stops; free space, or train on: --checkpoint.on_full_disk continue"
                if self._stop_on_full_disk
                else "the run goes on, and the records are written as soon as that is possible"
            )
            self._say(
                f"warning: {self._file.path} cannot be written ({self._file.problem}): {then}", style="yellow"
            )
        elif before and not self._unwritten:
            lost = f"{amount(self._file.lost, 'record') if self._file.lost else 'no record'} missing"
            self.note(f"{self._file.path} is written again; {lost}")

    # ---- time

    def pause(self) -> AbstractContextManager[None]:
        """In this context time does not count as step time. Pauses may be nested."""
        return self._timer.pause()

    @contextmanager
    def task(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[Callable[..., None]]:
        """Show another bar in the same display. Yields a function: ``advance(n=1)`` adds, ``advance(done=n)`` sets; ``total`` and
        ``also`` (additional text) can be passed when they change.
        """
        key = self._console.add(redact(description), total, unit) if self._console is not None else -1
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
        progress: Callable[[int], tuple[float, float]] | None = None,
        tokens: int = 0,
        reduce: Callable[[Tensor], Tensor] | None = None,
        summed_ranks: int | None = None,
        trackers: Any = None,
        flops_per_token: float | None = None,
        peak_flops_per_device: float | None = None,
        device: Any = None,
        bytes_before: int = 0,
    ) -> None:
        """Call right before the loop; starts the timers.

        Args:
            step, tokens: steps and tokens that are already done (after a resume).
            progress: maps steps done to the completed fraction of the run, and to the number of remaining steps of the
                current length; default: all steps are equally long.
            reduce: sums a tensor over ranks; collective, called on every rank when a line is due.
            summed_ranks: number of ranks whose tensors are summed; default: all.
            trackers: :class:`lmcore.report.trackers.Trackers` on rank 0, or ``None``.
            flops_per_token, peak_flops_per_device: for the share of the device's peak (MFU), which is left out if unknown.
            bytes_before: resident memory of the process before it built its model.
        """
        self._memory = PeakMemory(device, bytes_before)
        self._total_steps, self._progress = total_steps, progress
        self._tokens_logged = tokens
        self._trackers = trackers
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops_per_device
        if reduce is not None:
            self._reduce = reduce
        self._summed_ranks = summed_ranks or self.world_size
        self._timer.start()
        if self._console is not None and self._bar is None:
            self._bar = self._console.add("train", total_steps, "steps")
            self._console.update(self._bar, self._place(step), quiet=True)

    def _share(self, step: int) -> float:
        """The completed fraction of the run."""
        if self._progress is not None:
            return self._progress(step)[0]
        return step / self._total_steps if self._total_steps else 0.0

    def _place(self, step: int) -> int:
        """The position of the bar of all steps."""
        return round(self._share(step) * self._total_steps) if self._total_steps else step

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
        due: bool = False,
        metrics: Metrics | None = None,
    ) -> dict[str, Any] | None:
        """Add a step. Call it on every rank for every step. Collective when a line is due.

        Args:
            step: number of updates including this one (the first is 1); ``tokens`` and ``position`` likewise.
            loss_sum, count: sums over this rank's micro-batches; tensors stay on the device.
            norm: gradient norm of the update.
            applied: whether the update was applied to the weights.
            wait_seconds: how long the step waited for its data.
            due: write a record and a line; must be equal on all ranks. The first and the last step of a run are
                always logged.
            metrics: your own numbers: for each name a number or 0-d tensor of this rank and step, or a tuple (sum, count)
                of two. They are summed over the steps since the last line and over the ranks like the loss, and logged as
                sum / count (a single number has the count 1); tensors stay on the device. Every rank must pass the same
                names. They appear under their names in metrics.jsonl and on the console, and as ``train/NAME`` in the
                trackers.

        Returns:
            The record that was written, on rank 0 if one was due; otherwise ``None``.

        Raises:
            RequestError: a metric has the name of a key of the record, or the ranks pass different names.

        Example:
            ``report.step(..., metrics={"accuracy": (correct, labels), "temperature": 0.7})``
        """
        if metrics and (taken := RECORD_KEYS & metrics.keys()):
            raise RequestError(
                f"metrics: {', '.join(sorted(taken))} is a key of the record itself; choose another name"
            )
        self._interval.add(loss_sum, count, applied, metrics)
        self._epoch.add(loss_sum, count, applied)
        self._timer.step(wait_seconds)
        due = due or step in (1, self._total_steps)
        record = self._record(step, epoch, tokens, position, lr, norm) if due else None
        self._show_latest(step, epoch, tokens, force=due)
        return record

    def latest(self, *, step: int, loss: float) -> None:
        """Show the loss of one step on the display, when the host has it anyway. It is not recorded."""
        self._latest = (step, loss)

    def _record(
        self, step: int, epoch: float, tokens: int, position: int, lr: float, norm: Tensor | float | None
    ) -> dict[str, Any] | None:
        totals = self._interval.total(self._reduce, is_main=self.is_main)
        self._interval.zero()
        # The time of the interval is known only now, because reading the sums has waited for the device.
        seconds, waited, steps = self._timer.interval()
        rate = (tokens - self._tokens_logged) / seconds if seconds > 0 else math.nan
        self._tokens_logged = tokens
        if not self.is_main:
            return None
        record: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": epoch,
            "tokens": tokens,
            "position": position,
            "loss": totals.loss,
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
            # Counted per rank: a step with NaN on one of eight ranks counts once.
            record["nonfinite_losses"] = int(totals.nonfinite)
        if totals.skipped:
            record["skipped_steps"] = round(totals.skipped / self._summed_ranks)
        record |= totals.metric_means
        self._logged_step = step
        self.logged = {
            f"train/{name}": _finite(value)
            for name, value in {
                "loss": totals.loss,
                "grad_norm": record["grad_norm"],
                **totals.metric_means,
            }.items()
        }
        if math.isfinite(rate):
            self._rates.append(rate)
        self._write(record)
        if self._trackers is not None:
            self._trackers.log("train", {k: v for k, v in record.items() if k not in ("kind", "step")}, step)
        self._print_step(record, totals.metric_means)
        return record

    def _print_step(self, record: dict[str, Any], own: dict[str, float]) -> None:
        """Write a line to the log and the console; on a terminal a shorter one, which stays above the display."""
        self._cells = step_cells(record, own, self.world_size)
        step = record["step"]
        share = f"/{self._total_steps} {100 * self._share(step):.1f}%" if self._total_steps else ""
        words = " ".join(f"{name} {value}" for name, value in self._cells.items())
        where = f"step {step}{share} epoch {record['epoch']:.3f} tokens {short(record['tokens'])}"
        text = redact(f"{where} {words} eta {self._eta(step)}")
        self.log(text)
        self._printed = time.monotonic()
        if self._console is None:
            return
        if self._console.interactive:
            names = ("loss", *own, "lr", "norm", "tok/s", "skipped", "non-finite")
            cells = [f"{name} {self._cells[name]}" for name in names if name in self._cells]
            self._console.line(redact(f"step {step}{share} · {' · '.join(cells)}"))
        else:
            self._console.line(f"{now()} {text}")

    def _show_latest(self, step: int, epoch: float, tokens: int, *, force: bool) -> None:
        if self._console is None or self._bar is None:
            return
        moment = time.monotonic()
        share = f"/{self._total_steps:,} {100 * self._share(step):.0f}%" if self._total_steps else ""
        if not self._console.interactive:
            if self._latest is not None and moment - self._printed >= PLAIN_STEP_SECONDS:
                self._printed = moment
                at, loss = self._latest
                self.note(
                    f"step {step:,}{share}, loss {loss:.4f} (of step {at:,} alone), eta {self._eta(step)}"
                )
            return
        if not force and moment - self._drawn < DISPLAY_SECONDS:
            return
        self._drawn = moment
        cells = {"epoch": f"{epoch:.3f}", "tokens": short(tokens), **self._cells, **self._held_cells}
        if self._latest is not None:
            cells["loss"] = f"{self._latest[1]:.4f}"
        self._console.cells = list(cells.items())
        text = f"{step:,}{share} {duration(self.train_seconds)} left {self._eta(step)}"
        self._console.update(self._bar, self._place(step), text, quiet=True)

    def _eta(self, step: int) -> str:
        per_step = self._timer.seconds_per_step
        if per_step is None or self._total_steps is None:
            return "?"
        left = self._progress(step)[1] if self._progress is not None else self._total_steps - step
        return duration(per_step * left)

    # ---- numbers of the run so far

    @property
    def train_seconds(self) -> float:
        """Seconds spent in steps over all restarts, without evaluating and saving."""
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
        """Record the result on one validation or test set. ``set`` is its name, or ``test`` or ``test/NAME``, with the suffix
        ``-ema`` for the averaged weights.

        Trackers receive it as ``valid/loss``, ``valid/NAME/loss``, ``test/loss`` or ``test/NAME/loss``.
        """
        if not self.is_main:
            return
        values = {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
        where = {"set": set, "step": step, "epoch": epoch, "tokens": tokens}
        self._write({"kind": "eval", **where, **values, **more})
        if self._trackers is not None:
            group = set if set.partition("/")[0] in ("valid", "test", "test-ema") else f"valid/{set}"
            self._trackers.log(group, {"epoch": epoch, **values}, step)
        self._evaluations[set] = {"step": step, **{key: _finite(value) for key, value in values.items()}}
        self._held_cells[redact(one_line(set))] = f"{loss:.4f}"
        bits = "" if bits_per_byte is None else f" bits/byte {bits_per_byte:.4f}"
        self.note(f"step {step} {set} loss {loss:.4f} perplexity {perplexity:.4g}{bits}")

    def end_epoch(self, *, epoch: int, step: int) -> float | None:
        """Call when an epoch has ended with this step. Collective. Returns its exact mean training loss on rank 0.

        :meth:`epoch` records it later; a checkpoint that is saved in between includes it.
        """
        totals = self._epoch.total(self._reduce, is_main=self.is_main)
        self._epoch.zero()
        if not self.is_main:
            return None
        self._ended = (epoch, step, totals.loss)
        return totals.loss

    def epoch(self, *, valid_loss: float | None = None, valid_step: int | None = None) -> None:
        """Record the epoch that has ended, if one has. ``valid_loss`` is the last known one, from step ``valid_step``."""
        if self._ended is None:
            return
        (epoch, step, loss), self._ended = self._ended, None
        valid = {"valid_loss": valid_loss, "valid_step": None if valid_loss is None else valid_step}
        self._write({"kind": "epoch", "epoch": epoch, "step": step, "train_loss": loss, **valid})
        if self._trackers is not None:
            values = {"epoch": epoch, "train_loss": loss}
            values |= {} if valid_loss is None else {"valid_loss": valid_loss}
            # By the step, not by the epoch: a resume or a rewind hides later steps, but epochs are smaller numbers.
            self._trackers.log("epoch", values, step)
        words = "" if valid_loss is None else f" valid loss {valid_loss:.4f}"
        words += f" (of step {valid_step})" if words and valid_step not in (None, step) else ""
        self.note(f"epoch {epoch} ended at step {step}: train loss {loss:.4f}{words}")

    def event(self, event: str, *, step: int | None = None, **fields: Any) -> None:
        """Record an event without printing it: start, resume, checkpoint, skip, rewind, signal, end."""
        if not self.is_main:
            return
        record = {"kind": "event", "event": event, **({} if step is None else {"step": step})}
        if event in ("start", "resume"):
            record |= {"rows": self._start_rows, "command": sys.argv, "versions": versions()}
        record |= fields
        self._write(record)
        if event == "checkpoint" and step is not None:
            self._held_cells["checkpoint"] = f"{step:,}"

    def samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Record samples of the model: (prompt, continuation) pairs."""
        if not self.is_main:
            return
        # A prompt may contain anything. Redact each text alone: in a list, a prompt "--password" would hide its continuation.
        samples = [(redact(prompt), redact(text)) for prompt, text in samples]
        for prompt, text in samples:
            self._write({"kind": "sample", "step": step, "set": prompt, "prompt": prompt, "text": text})
            self.note(f"sample at step {step}:")
            for line in f"{prompt}{text}".split("\n"):
                self._say(f"  | {line}", names_decide=False)
        if self._trackers is not None:
            self._trackers.text("samples", "\n\n".join(f"{p}{t}" for p, t in samples), step)

    # ---- resume

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs to continue with the same means, as JSON without NaN. Collective."""
        return {
            "interval": asdict(self._interval.total(self._reduce, is_main=self.is_main)),
            "epoch": asdict(self._epoch.total(self._reduce, is_main=self.is_main)),
            "logged": self.logged,
            "evaluations": self._evaluations,
            "ended_epoch": self._ended and [*self._ended[:2], _finite(self._ended[2])],
            "train_seconds": self.train_seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of :meth:`state`. Call it before the first step."""
        for sums, name in ((self._interval, "interval"), (self._epoch, "epoch")):
            totals = Totals(**state[name])
            names = {metric: [0.0, 0.0] for metric in totals.metrics}  # equal on all ranks
            sums.load(totals if self.is_main else Totals(metrics=names))
        self.logged = state.get("logged", {})
        self._evaluations = dict(state.get("evaluations", {}))
        ended = state.get("ended_epoch")
        self._ended = None
        if self.is_main and ended is not None and not self._was_told(ended[0], ended[1]):
            self._ended = (ended[0], ended[1], math.nan if ended[2] is None else ended[2])
        self._timer.total_seconds = state["train_seconds"]
        self._is_resumed = True

    def _was_told(self, epoch: int, step: int) -> bool:
        """Whether metrics.jsonl already has the end of an epoch, which is recorded only after the save of its step."""
        path = self.run_dir / "metrics.jsonl"
        records = read_metrics(path, kind="epoch") if path.exists() else []
        return any((record["epoch"], record["step"]) == (epoch, step) for record in records)

    def rewind(
        self, *, step: int, tokens: int, state: dict[str, Any], total_steps: int | None = None
    ) -> None:
        """Call when training continues from an earlier checkpoint. The time spent so far is kept.

        Args:
            step, tokens: of the checkpoint.
            state: :meth:`state` as saved in the checkpoint.
            total_steps: new length of the run, because skipped positions can make a run of epochs shorter.
        """
        self._total_steps = total_steps or self._total_steps
        spent, resumed = self.train_seconds, self._is_resumed
        self.load_state({**state, "train_seconds": spent})
        self._is_resumed = resumed
        self._latest, self._logged_step = None, step
        self.event("rewound", step=step)
        if self._trackers is not None:
            self._trackers.rewind(step)
        self._timer.start()  # reading the checkpoint was not a step
        self._timer.interval()  # exclude the time of discarded steps from the speed
        self._tokens_logged = tokens

    def close(self) -> None:
        """Remove the display and close the files; also lets the trackers of a failed run finish."""
        if self._trackers is not None:
            self._trackers.close()
        if self._file is not None:
            self._file.close()
            if self._file.unwritten:
                lost = self._file.unwritten + self._file.lost
                self._say(
                    f"warning: {amount(lost, 'record')} of {self._file.path} could not be written ({self._file.problem})"
                )
            self._file = None
        super().close()
        self._bar = None


def step_cells(record: dict[str, Any], own: dict[str, float], world_size: int) -> dict[str, str]:
    """The numbers of a train record and the user's ``own`` as text, without those that are not known."""
    rate, norm = record["tokens_per_second"], record["grad_norm"]
    cells = {
        "loss": f"{record['loss']:.4f}",
        **{one_line(name): f"{value:.5g}" for name, value in own.items()},
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


def _finite(value: float | None) -> float | None:
    """``value``, or ``None`` for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None, format: str = ".4f") -> str:
    return "not finite" if value is None else f"{value:{format}}"
