"""Sums over the steps between two log lines, the time of steps, and peak memory.

Adding to a sum never waits for the device; reading a sum does. Sums can be saved and loaded, and then continue exactly.

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

if TYPE_CHECKING:  # importing torch takes seconds; a caller that passes a tensor has already imported it
    from torch import Tensor

    Number = float | Tensor
    Metrics = Mapping[str, "Number | tuple[Number, Number]"]

CHUNK_SECONDS = 2.0
"""Steps are timed in groups of at least this duration. On a GPU the host runs ahead of the device, so that most single steps
would seem too short, and the one that waits too long."""


@dataclass(frozen=True)
class Totals:
    """Sums over steps and ranks. ``nonfinite`` and ``skipped`` are counted once per rank on which they occurred."""

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
        """The means of the user's own numbers; NaN if nothing finite was added."""
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
        """Add one step. Values that are not finite are counted instead of added, because they would make the sum useless."""
        import torch  # lazily: reading a report needs no torch

        device = loss_sum.device
        real = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64

        def scalar(value: Any) -> Tensor:
            if isinstance(value, torch.Tensor):
                return value.detach().to(device=device, dtype=real)
            # Filled on the device: the host would wait for a copy of its own number.
            return torch.full((), float(value), dtype=real, device=device)

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
        """The sums over all ranks. Collective. The result is kept on rank 0, and the sums of the other ranks are set to zero.

        So a run that saves here and continues is bit for bit the same as one that resumes from here: both continue from the
        same number on the same rank.

        Raises:
            RequestError: on every rank, if the ranks do not have the same names of metrics.
        """
        if self._held is None:
            return self._carry or Totals()
        import torch  # lazily, as above

        names = sorted(self._metrics)
        # Ranks with different names would reduce tensors of different lengths and hang. The values of ``mark`` are equal on all
        # ranks if and only if (sum of mark)^2 = ranks * sum of mark^2. They are small integers, so this is exact, and every
        # rank sees the same sums.
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
        """Set the sums to zero."""
        self._carry = None
        self._metrics.clear()
        if self._held is not None:
            self._held.zero_()

    def load(self, totals: Totals) -> None:
        """Continue from ``totals``: all of it on rank 0; the other ranks pass zeros with the same names of metrics."""
        self._held, self._carry = None, totals
        self._metrics.clear()


class Timer:
    """Measures the seconds of steps, without the pauses in which the run evaluates and saves."""

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
        """Start timing. The first step is a warmup (it compiles and allocates) and is excluded from the estimate."""
        self._last, self._paused, self._warm = time.perf_counter(), 0.0, False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """In this context time does not count as step time. Pauses may be nested."""
        started = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._paused += time.perf_counter() - started

    def step(self, waited: float) -> None:
        """Call after each step; ``waited`` is how many of its seconds were spent waiting for data."""
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
        """Median over the last groups of steps, so that a single slow group does not change the estimate."""
        return statistics.median(self._chunks) if self._chunks else None


class PeakMemory:
    """The peak memory of this process since the loop began: of the GPU if ``device`` is one, otherwise of the host.

    Args:
        bytes_before: resident memory of the process before it built its model.
    """

    def __init__(self, device: Any = None, bytes_before: int = 0) -> None:
        self._device, self._before = device, bytes_before
        self._on_gpu = getattr(device, "type", "") == "cuda"
        # Peaks of reading text, building the model, or an earlier run in this process do not belong to this training.
        forget_peak()
        if self._on_gpu:
            import torch  # lazily, as above

            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def peak_bytes(self) -> int:
        """Peak of the memory that other processes cannot use: reserved on the GPU, or resident on the host."""
        if self._on_gpu:
            import torch  # lazily, as above

            return int(torch.cuda.max_memory_reserved(self._device))
        return resident_bytes(peak=True)

    @property
    def tensor_bytes(self) -> int:
        """Peak of the memory that a plan counts: allocated on the GPU, or resident above that before the model was built."""
        if self._on_gpu:
            import torch  # lazily, as above

            return int(torch.cuda.max_memory_allocated(self._device))
        return max(0, resident_bytes(peak=True) - self._before)
