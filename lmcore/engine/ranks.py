"""The ranks of a run, talking on the host: agreeing, waiting, passing objects.

Comes in: an initialized process group, or none (then every answer is this process's own). What always holds:
these calls use gloo groups of their own, so that they neither wait for the device nor mix with its
collectives; where a rank does not come, the error of the others names it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmcore.errors import FaultError, RequestError

if TYPE_CHECKING:
    from lmcore.engine.engine import Engine


class Ranks:
    """Made once, on all ranks together."""

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._grouped = dist.is_initialized()
        self._host = dist.new_group(backend="gloo", timeout=timeout) if self._grouped else None
        # A group that a collective has failed in is of no use any more, not even to ask who is missing.
        self._roll_call = dist.new_group(backend="gloo", timeout=timeout) if self._grouped else None

    def sum(self, tensor: Tensor) -> Tensor:
        """A new tensor on the same device: the sum over the ranks."""
        total = tensor.detach().clone()
        if self._grouped:
            dist.all_reduce(total)
        return total

    def agree(self, flags: int) -> int:
        """Bitwise OR of every rank's flags (below 2**63)."""
        if not self._grouped:
            return flags
        # One number a bit, and the largest wins: not every gloo has bitwise operations.
        bits = (torch.tensor([flags]) >> torch.arange(63)) & 1
        self._together("agree", lambda: dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=self._host))
        return int((bits << torch.arange(63)).sum())

    def barrier(self, name: str) -> None:
        """Wait for every rank."""
        if self._grouped:
            self._together(name, lambda: dist.barrier(group=self._host))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's object."""
        box = [value]
        if self._grouped:
            self._together("broadcast", lambda: dist.broadcast_object_list(box, src=0, group=self._host))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        values = [value] * (dist.get_world_size() if self._grouped else 1)
        if self._grouped:
            self._together("gather", lambda: dist.all_gather_object(values, value, group=self._host))
        return values

    def close(self) -> None:
        """Leave the process group; a second call does nothing."""
        self._host = self._roll_call = None
        self._grouped = False
        if dist.is_initialized():
            dist.destroy_process_group()

    def _together(self, what: str, run: Callable[[], Any]) -> None:
        try:
            run()
        except (RuntimeError, dist.DistError) as error:
            raise RuntimeError(f"{what}: {self._absent()} ({error})") from error

    def _absent(self) -> str:
        """Which ranks did not come, as well as it can be found out after the fact."""
        patience = min(self._timeout, timedelta(seconds=15))
        try:
            dist.monitored_barrier(group=self._roll_call, timeout=patience, wait_all_ranks=True)
        except (RuntimeError, dist.DistError) as error:
            return f"a rank is dead or stuck: {error}"
        return "a rank was too slow"


def on_main(engine: Engine, work: Callable[[], Any]) -> Any:
    """Rank 0 does the work; every rank gets its result, or the same refusal."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if engine.is_main:
        try:
            outcome = (work(), None)
        except (RequestError, FaultError) as refusal:
            outcome = (None, refusal)
    result, refused = engine.broadcast_object(outcome)
    if refused is not None:
        raise refused
    return result
