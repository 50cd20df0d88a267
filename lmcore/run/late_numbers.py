"""Values of a small device tensor, read a step later without waiting for the work queued since.

``tensor.tolist()`` queues a copy behind everything launched so far and waits for that: with one step of lag, for the whole of
the next step, so that the device's queue runs empty. Here the copy is queued at once, and only it is waited for::

    late = LateNumbers(torch.stack([loss, norm]))
    ...                                             # the next step is launched
    loss, norm = late.tolist()
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor


@final
class LateNumbers:
    """The values of a small tensor; on a GPU their copy to the host is queued at once, and marked."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._copied = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.current_stream(numbers.device).record_event()

    @property
    def is_late(self) -> bool:
        """Whether reading them now would wait for the device."""
        return self._copied is not None

    def tolist(self) -> Any:
        """The values; waits until they are made, at most."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
