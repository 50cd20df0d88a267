"""What steps add up to between two log lines: exact sums on the device, and honest step times.

Comes in: tensors of each step, and the moments at which steps end. Goes out: the sums over all ranks when
somebody asks, and the median seconds per step. What always holds: adding never waits for the device; a sum
that is saved and loaded goes on exactly as if it had not been.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcore.process import forget_peak, resident_bytes

if TYPE_CHECKING:  # torch costs seconds to import; whoever hands in a tensor has it already
    from torch import Tensor

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

    @property
    def loss(self) -> float:
        """Mean loss per label; NaN if nothing finite was added."""
        return self.loss_sum / self.count if self.count else float("nan")


class Sums:
    """Running sums (loss, labels, non-finite losses, skipped updates) of this rank, in float64 on the
    device.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._carry: Totals | None = None

    def add(self, loss_sum: Tensor, count: Tensor | int, applied: Tensor | bool | None) -> None:
        """Add one step. A loss that is not finite is counted, not summed: it would hide all others."""
        import torch  # lazily: reading a report needs no torch

        device = loss_sum.device
        real = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        loss_sum = loss_sum.detach().to(real)
        finite = torch.isfinite(loss_sum)
        count = torch.as_tensor(count, device=device).to(real)
        zero = torch.zeros((), dtype=real, device=device)
        skipped = zero if applied is None else 1 - torch.as_tensor(applied, device=device).to(real)
        if self._held is None:
            self._held = torch.zeros(4, dtype=real, device=device)
            if self._carry is not None:
                carry = self._carry
                self._held += torch.tensor(
                    [carry.loss_sum, carry.count, carry.nonfinite, carry.skipped], dtype=real, device=device
                )
                self._carry = None
        self._held += torch.stack(
            [
                torch.where(finite, loss_sum, zero),
                torch.where(finite, count, zero),
                1 - finite.to(real),
                skipped,
            ]
        )

    def total(self, reduce: Callable[[Tensor], Tensor], *, is_main: bool) -> Totals:
        """Collective: the sums over all ranks; they are folded into rank 0 and zeroed elsewhere.

        Folding makes a run that saves here and goes on equal, bit for bit, to one that resumes from here:
        both continue from the same number on the same rank.
        """
        if self._held is None:
            return self._carry or Totals()
        total = reduce(self._held.clone())
        self._held.zero_()
        if is_main:
            self._held += total
        return Totals(*[float(value) for value in total.tolist()])

    def zero(self) -> None:
        """Start again."""
        self._carry = None
        if self._held is not None:
            self._held.zero_()

    def load(self, totals: Totals | None) -> None:
        """Go on from ``totals`` (on rank 0; ``None`` elsewhere)."""
        self._held, self._carry = None, totals


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
        """The loop begins now; the first step warms up (compiles, allocates) and says nothing about the
        others.
        """
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
        """Seconds, seconds of waiting and steps since the last call; call it after the device has caught
        up.
        """
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
        forget_peak()  # that of reading text and of building the model is not training's

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
