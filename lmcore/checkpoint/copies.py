"""Copies from a GPU to host memory beside the computation.

The state of a checkpoint is copied by a CUDA stream of its own while the next forward and backward run, which read weights
and write none. What must be in order:

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
    """Begins copies, and lets what writes to their sources wait for them. For the thread that gives work to the device.

    Example::

        copies = DeviceCopies()
        wait = copies.begin([(buffer, weight)])     # returns at once for a weight on a GPU
        ...                                         # the weight may be read
        copies.before_writing()
        weight.mul_(0.5)                            # after the copy, on the device
        wait()                                      # on any thread: now the buffer holds the weight before
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._unfinished: list[tuple[torch.device, Any]] = []

    def begin(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Begin to copy the bytes of each source to its target.

        Args:
            pairs: (target, source): uint8 (bytes,) on the host, which should be page-locked, and a tensor on any device.

        Returns:
            A function that waits until all targets are filled; any thread may call it. Sources on the host are copied
            before this returns.
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
                # A contiguous form, where one is made, is memory of this stream, which frees it in order.
                target.copy_(raw(source), non_blocking=True)
            # Whoever lets go of it before the copy is done: its memory is not given to others.
            source.record_stream(begun[device])
        events = []
        for device, stream in begun.items():
            event = torch.cuda.Event(blocking=True)  # it does not spin on a core
            event.record(stream)
            events.append((device, event))
        self._unfinished += events

        def wait() -> None:
            for device, event in events:
                # The device of a new thread is the first of the machine, where waiting would make a context of 0.5 GB.
                with torch.cuda.device(device):
                    event.synchronize()

        return wait

    def before_writing(self) -> None:
        """Let all work that is given to the current streams from now on wait for the copies begun; the host does not wait."""
        for device, event in self._unfinished:
            torch.cuda.current_stream(device).wait_event(event)
        self._unfinished.clear()
