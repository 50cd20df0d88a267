"""Sums over the steps between two log lines, the time of steps, and peak memory.

Adding to a sum never waits for the device; reading one does. Sums that are saved and loaded continue exactly.

    >>> sums = Sums()
    >>> sums.add(loss_sum, count, applied, {"accuracy": (correct, count)})
    >>> sums.total(engine.sum_over_ranks, is_main=True).loss
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcore.errors import RequestError
from lmcore.process import forget_peak, resident_bytes

if TYPE_CHECKING:  # torch costs seconds to import; the caller who hands in a tensor has it already
    from torch import Tensor

    Number = float | Tensor
    Metrics = Mapping[str, "Number | tuple[Number, Number]"]

CHUNK_SECONDS = 2.0
"""Steps are timed in groups of at least this long: on a GPU the host runs ahead of the device, so that
single steps look too short and the one that waits too long."""


@dataclass(frozen=True)
class Totals:
    """Sums over steps and ranks. ``nonfinite`` and ``skipped`` count once for each rank that saw it."""

    loss_sum: float = 0.0
    count: float = 0.0
    nonfinite: float = 0.0
    skipped: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """The user's own numbers by name: [sum, count]."""

    @property
    def loss(self) -> float:
        """Mean loss per label; NaN if nothing finite was added."""
        return self.loss_sum / self.count if self.count else float("nan")

    @property
    def metric_means(self) -> dict[str, float]:
        """The user's own numbers as means; NaN where nothing finite was added."""
        return {
            name: total / count if count else float("nan") for name, (total, count) in self.metrics.items()
        }


class Sums:
    """Running sums of this rank (loss, labels, non-finite losses, skipped updates, the user's own numbers), in
    float64 on the device.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._metrics: dict[str, Tensor] = {}
        self._carry: Totals | None = None

    def add(
        self,
        loss_sum: Tensor,
        count: Tensor | int,
        applied: Tensor | bool | None,
        metrics: Metrics | None = None,
    ) -> None:
        """Add one step. What is not finite is counted, not summed: it would hide everything else."""
        import torch  # lazily: reading a report needs no torch

        device = loss_sum.device
        real = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64

        def scalar(value: Any) -> Tensor:
            value = value.detach() if isinstance(value, torch.Tensor) else value
            return torch.as_tensor(value, device=device).to(real)

        loss_sum, count = scalar(loss_sum), scalar(count)
        finite = torch.isfinite(loss_sum)
        zero = torch.zeros((), dtype=real, device=device)
        skipped = zero if applied is None else 1 - scalar(applied)
        if self._held is None:
            self._held = torch.zeros(4, dtype=real, device=device)
            if (carry := self._carry) is not None:
                known = [carry.loss_sum, carry.count, carry.nonfinite, carry.skipped]
                self._held += torch.tensor(known, dtype=real, device=device)
                for name, pair in carry.metrics.items():
                    self._metrics[name] = torch.tensor(pair, dtype=real, device=device)
                self._carry = None
        self._held += torch.stack(
            [
                torch.where(finite, loss_sum, zero),
                torch.where(finite, count, zero),
                1 - finite.to(real),
                skipped,
            ]
        )
        for name, value in (metrics or {}).items():
            parts = value if isinstance(value, tuple) else (value, 1)
            if len(parts) != 2 or any(isinstance(part, torch.Tensor) and part.numel() != 1 for part in parts):
                raise RequestError(
                    f"metrics[{name!r}] must be a number, a tensor of one element, or a tuple (sum, count) of two"
                )
            total, weight = (scalar(part).reshape(()) for part in parts)
            finite = torch.isfinite(total)
            if name not in self._metrics:
                self._metrics[name] = torch.zeros(2, dtype=real, device=device)
            self._metrics[name] += torch.stack(
                [torch.where(finite, total, zero), torch.where(finite, weight, zero)]
            )

    def total(self, reduce: Callable[[Tensor], Tensor], *, is_main: bool) -> Totals:
        """Collective: the sums over all ranks; they are folded into rank 0 and zeroed elsewhere.

        Folding makes a run that saves here and goes on equal, bit for bit, to one that resumes from here:
        both continue from the same number on the same rank.

        Raises:
            RequestError: on every rank, if the ranks do not have the same names of metrics.
        """
        if self._held is None:
            return self._carry or Totals()
        import torch  # lazily, as above

        names = sorted(self._metrics)
        # Ranks with other names would reduce tensors of other lengths and hang. All of ``mark`` are equal if and only
        # if (sum of mark)^2 = ranks * sum of mark^2; small integers, so exact, and every rank sees the same sums.
        mark = zlib.crc32("\n".join(names).encode()) % 4093 if names else 0
        check = torch.tensor([1.0, mark, mark**2], dtype=self._held.dtype, device=self._held.device)
        base = reduce(torch.cat([self._held, check]))
        loss_sum, count, nonfinite, skipped, ranks, marks, squares = base.tolist()
        if int(marks) ** 2 != int(ranks) * int(squares):
            raise RequestError(
                f"metrics: the ranks do not have the same names (here: {', '.join(names) or 'none'}); "
                f"give every rank the same ones"
            )
        self._held.zero_()
        pairs: dict[str, list[float]] = {}
        if names:
            reduced = reduce(torch.stack([self._metrics[name] for name in names]).reshape(-1)).reshape(-1, 2)
            pairs = dict(zip(names, reduced.tolist()))
            for name, pair in zip(names, reduced):
                self._metrics[name] = pair.clone() if is_main else torch.zeros_like(pair)
        if is_main:
            self._held += base[:4]
        return Totals(loss_sum, count, nonfinite, skipped, pairs)

    def zero(self) -> None:
        """Start again."""
        self._carry = None
        self._metrics.clear()
        if self._held is not None:
            self._held.zero_()

    def load(self, totals: Totals) -> None:
        """Go on from ``totals``: on rank 0 all of it, elsewhere zeros under the same names of metrics."""
        self._held, self._carry = None, totals
        self._metrics.clear()


class Timer:
    """Seconds of steps, without the pauses in which the run evaluates and saves."""

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self._chunks: deque[float] = deque(maxlen=64)
        self._chunk_seconds, self._chunk_steps = 0.0, 0
        self._interval_seconds, self._interval_waited, self._interval_steps = 0.0, 0.0, 0
        self._warm = False
        self._last = time.perf_counter()
        self._paused = 0.0
        self._depth = 0

    def start(self) -> None:
        """The loop begins now; the first step warms up (compiles, allocates) and is not in the estimate."""
        self._last, self._paused, self._warm = time.perf_counter(), 0.0, False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside is not step time. Pauses may lie inside each other."""
        started = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._paused += time.perf_counter() - started

    def step(self, waited: float) -> None:
        """A step has ended; ``waited`` seconds of it went into waiting for data."""
        seconds = self._lap()
        if self._warm:
            self._chunk_seconds += seconds
            self._chunk_steps += 1
        self._warm = True
        self._interval_waited += waited
        self._interval_steps += 1
        if self._chunk_seconds >= CHUNK_SECONDS:
            self._close_chunk()

    def interval(self) -> tuple[float, float, int]:
        """Seconds, seconds of waiting and steps since the last call; call it after the device has caught up."""
        seconds = self._lap()
        if self._chunk_steps:
            self._chunk_seconds += seconds
            self._close_chunk()
        result = self._interval_seconds, self._interval_waited, self._interval_steps
        self._interval_seconds, self._interval_waited, self._interval_steps = 0.0, 0.0, 0
        return result

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds = now - self._last - self._paused
        self._last, self._paused = now, 0.0
        self.total_seconds += seconds
        self._interval_seconds += seconds
        return seconds

    def _close_chunk(self) -> None:
        self._chunks.append(self._chunk_seconds / self._chunk_steps)
        self._chunk_seconds, self._chunk_steps = 0.0, 0

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the last groups of steps, so that one slow moment does not move the estimate."""
        return statistics.median(self._chunks) if self._chunks else None


class PeakMemory:
    """The most memory of this process since the loop began: of a GPU if ``device`` is one, else of the host.

    Args:
        bytes_before: resident memory of the process before it built its model.
    """

    def __init__(self, device: Any = None, bytes_before: int = 0) -> None:
        self._device, self._before = device, bytes_before
        self._on_gpu = getattr(device, "type", "") == "cuda"
        # That of reading text, of building the model and of a run before in this process is not this training's.
        forget_peak()
        if self._on_gpu:
            import torch  # lazily, as above

            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def peak_bytes(self) -> int:
        """What others cannot have: reserved on the GPU, or resident."""
        if self._on_gpu:
            import torch  # lazily, as above

            return int(torch.cuda.max_memory_reserved(self._device))
        return resident_bytes(peak=True)

    @property
    def tensor_bytes(self) -> int:
        """What a plan counts: allocated on the GPU, or resident above what was there before the model."""
        if self._on_gpu:
            import torch  # lazily, as above

            return int(torch.cuda.max_memory_allocated(self._device))
        return max(0, resident_bytes(peak=True) - self._before)
