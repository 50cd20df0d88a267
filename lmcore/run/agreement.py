"""Combines the flags of signals, deadlines and clocks over the ranks in the tensor that every step reduces anyway.

Each flag is one number next to the sums of the loss; its sum over the ranks is positive if any rank has set it. So a step
has one collective, on the device, and no ring of messages between hosts, whose time grows with the number of hosts.

On a CPU, and with one process, the flags of a step are known at its end. On several GPUs the numbers are read one step later,
so that the host does not wait for the device: all ranks act on the flags at the end of the next step.
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
    """(len(BITS),) float64 on the device, 1 where a bit is set. Created on the device, so that the host waits for no copy."""
    numbers = torch.zeros(len(BITS), dtype=torch.float64, device=device)
    for index, bit in enumerate(BITS):
        if flags & bit:
            numbers[index].fill_(1.0)
    return numbers


def flags_of(numbers: Sequence[float]) -> int:
    """The flags that any rank has set, from the sum over the ranks of :func:`numbers_of`."""
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
            flags: the flags of this rank.
            numbers: summed over ranks; those of :func:`numbers_of` start at index ``first``.
            at_once: read this step's numbers now, because the host waits for them anyway; the same on every rank.
        """
        if not self._several:
            return flags
        agreed = 0
        if self._pending is not None:
            # These flags are from before the last save, when the file SAVE still existed: do not save for it again.
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
