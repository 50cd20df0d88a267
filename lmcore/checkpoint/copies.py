"""Copies from a GPU to host memory that overlap with the computation.

A CUDA stream of its own copies the state of a checkpoint while the next forward and backward run, which read weights
but do not write them. The required order:

    updates so far -> copies -> event -> the next update        on the device: the host waits for none of it
                                event -> the thread that reads the host memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor

from lmcore.checkpoint.tensors import raw


@final
class DeviceCopies:
    """Starts copies, and makes later writes to their sources wait for them. To be used on the thread that queues the
    device's work.

    Example::

        copies = DeviceCopies()
        wait = copies.begin([(buffer, weight)])     # returns at once for a weight on a GPU
        ...                                         # the weight may be read
        copies.before_writing()
        weight.mul_(0.5)                            # after the copy, on the device
        wait()                                      # on any thread: now the buffer holds the old weight
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._unfinished: list[tuple[torch.device, Any]] = []

    def begin(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Start copying the bytes of each source to its target. Sources on the host are copied before this returns.

        Args:
            pairs: (target, source). The target is a uint8 tensor (bytes,) on the host, which should be page-locked; the
                source is a tensor on any device.

        Returns:
            A function that waits until all targets are filled. Any thread may call it.
        """
        begun: dict[torch.device, Any] = {}
        for target, source in pairs:
            if not source.is_cuda:
                target.copy_(raw(source))
                continue
            device = source.device
            if device not in begun:
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)
                begun[device] = self._streams[device]
                begun[device].wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(begun[device]):
                # raw() may make a contiguous copy; it is allocated on this stream, so it is freed in stream order.
                target.copy_(raw(source), non_blocking=True)
            # If the source is freed before the copy is done, its memory must not be reused yet.
            source.record_stream(begun[device])
        events = []
        for device, stream in begun.items():
            event = torch.cuda.Event(blocking=True)  # waiting does not spin on a core
            event.record(stream)
            events.append((device, event))
        self._unfinished += events

        def wait() -> None:
            for device, event in events:
                # The current device of a new thread is cuda:0, where waiting would create a context of 0.5 GB.
                with torch.cuda.device(device):
                    event.synchronize()

        return wait

    def before_writing(self) -> None:
        """Make all work queued on the current streams from now on wait for the started copies. The host does not wait."""
        for device, event in self._unfinished:
            torch.cuda.current_stream(device).wait_event(event)
        self._unfinished.clear()
