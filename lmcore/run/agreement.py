"""Flags of signals, deadlines and clocks, agreed over the ranks by the tensor that every step reduces anyway.

Each bit is one number beside the sums of the loss; the sum over the ranks is above zero where any rank has set it. So a
step has one collective, on the device, and no ring of messages between hosts, whose time grows with their number.

On a CPU, and of one process, the flags of a step are known at its end. On several GPUs the numbers are read a step later,
without waiting for the device: there flags are acted on at the end of the next step, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lmcore.run import guard
from lmcore.run.intervals import EPOCH, EVALUATE, LOG, SAVE
from lmcore.run.late_numbers import LateNumbers

BITS = (
    guard.SIGTERM,
    guard.SIGUSR1,
    guard.SIGINT,
    guard.SIGHUP,
    guard.SPOT,
    guard.DEADLINE,
    guard.MAX_MINUTES,
    guard.STOP_FILE,
    guard.SAVE_FILE,
    guard.FAULT,
    guard.REWIND,
    LOG,
    EVALUATE,
    SAVE,
    EPOCH,
)


def numbers_of(flags: int, device: torch.device) -> Tensor:
    """(len(BITS),) float64 on the device, 1 where a bit is set. Made there: the host waits for no copy."""
    numbers = torch.zeros(len(BITS), dtype=torch.float64, device=device)
    for index, bit in enumerate(BITS):
        if flags & bit:
            numbers[index].fill_(1.0)
    return numbers


def flags_of(numbers: Sequence[float]) -> int:
    """The bits of :func:`numbers_of`, summed over ranks."""
    return sum(bit for bit, number in zip(BITS, numbers, strict=True) if number > 0)


@final
class Agreement:
    """The flags that all ranks act on at the end of each step; the same on every rank.

    Args:
        several: whether there are other ranks.

    Example::

        agreement = Agreement(several=engine.world_size > 1)
        sums = engine.sum_over_ranks(loss, own=numbers_of(flags, device))
        flags = agreement.after_step(flags, LateNumbers(sums), first=2, at_once=False)
    """

    def __init__(self, *, several: bool) -> None:
        self._several = several
        self._pending: tuple[LateNumbers, int] | None = None
        self._acted_on = 0

    def after_step(self, flags: int, numbers: LateNumbers, *, first: int, at_once: bool) -> int:
        """The flags to act on now.

        Args:
            flags: of this rank.
            numbers: summed over ranks; from index ``first`` on those of :func:`numbers_of`.
            at_once: this step's numbers are waited for anyway; the same on every rank.
        """
        if not self._several:
            return flags
        agreed = 0
        if self._pending is not None:
            # The file SAVE was still there when this was asked: what the last boundary did has answered it.
            agreed = self._read(*self._pending) & ~(self._acted_on & guard.SAVE_FILE)
            self._pending = None
        if at_once or not numbers.is_late:
            agreed |= self._read(numbers, first)
        else:
            self._pending = numbers, first
        self._acted_on = agreed
        return agreed

    @staticmethod
    def _read(numbers: LateNumbers, first: int) -> int:
        return flags_of(numbers.tolist()[first:])
