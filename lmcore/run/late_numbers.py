"""Values of a small device tensor that are read one step later, without waiting for the work queued since then.

``tensor.tolist()`` queues a copy behind everything launched so far and waits for it. One step later it would wait for the
whole next step, and the device's queue would run empty. Here the copy is queued immediately, and only the copy is waited for::

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
    """The values of a small tensor. On a GPU their copy to the host is queued at once, followed by an event."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._copied = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.current_stream(numbers.device).record_event()

    @property
    def is_late(self) -> bool:
        """Whether reading the values may wait for the device."""
        return self._copied is not None

    def tolist(self) -> Any:
        """The values. Waits only until they have been computed and copied."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
