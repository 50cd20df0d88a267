"""Rows of blocks or items -> one micro-batch on the device.

Comes in: what a dataset read. Goes out: tensors, ids widened to int64. What always holds: what travels to a
GPU is narrow, from page-locked memory, on a stream of its own; :meth:`ToDevice.hand_over` makes it safe to
use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lmcore.conventions import IGNORED_LABEL
from lmcore.data.blocks import Blocks
from lmcore.errors import RequestError

Collate = Callable[[list[Any]], dict[str, Tensor]]

_COPIED = "_copied"


@final
class ToDevice:
    """Rows -> one micro-batch on the device. On a GPU: narrow integers from pinned memory, on a stream of
    its own."""

    def __init__(
        self, device: torch.device, pin_memory: bool | None, cu_seq_lens: bool, collate: Collate | None
    ) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._pin = self._cuda if pin_memory is None else pin_memory and torch.cuda.is_available()
        self._cu_seq_lens = cu_seq_lens
        self._collate = collate or default_collate
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None

    def __call__(self, rows: Blocks | list[Any], start: int, stop: int) -> dict[str, Any]:
        if not self._cuda:
            return self._make(rows, start, stop)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            batch = self._make(rows, start, stop)
            batch[_COPIED] = self._stream.record_event()
        return batch

    def hand_over(self, micro_batches: list[dict[str, Any]]) -> None:
        """Let the stream of the calling thread use what was copied on ours."""
        for batch in micro_batches if self._cuda else []:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(batch.pop(_COPIED))
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(stream)

    def _make(self, rows: Blocks | list[Any], start: int, stop: int) -> dict[str, Any]:
        if not isinstance(rows, Blocks):
            batch = self._collate(rows[start:stop])
            if not isinstance(batch, dict):
                raise RequestError(
                    f"data.factory: a batch must be a dict, whose keys are arguments of the model's forward, "
                    f"not {type(batch).__name__}"
                )
            if "labels" not in batch:
                raise RequestError(
                    f"data.factory: a batch must have labels, -100 where one does not count (integers); its keys are "
                    f"{', '.join(map(str, batch))}"
                )
            return {
                key: self._send(value) if isinstance(value, Tensor) else value for key, value in batch.items()
            }
        ids, n_labels = rows.ids[start:stop], rows.n_labels[start:stop]
        # Never two views of one run of memory: ignoring a label would overwrite the input that it shares.
        if self._cuda:
            sent = self._widened(ids)
            batch = {"input_ids": sent[:, :-1].clone(), "labels": sent[:, 1:].clone()}
        else:
            batch = {"input_ids": self._widened(ids[:, :-1]), "labels": self._widened(ids[:, 1:])}
        size = batch["labels"].shape[1]
        for row in np.flatnonzero(n_labels < size).tolist():
            batch["labels"][row, int(n_labels[row]) :] = IGNORED_LABEL
        if rows.position_ids is not None:
            position_ids = rows.position_ids[start:stop]
            batch["position_ids"] = self._widened(position_ids)
            if self._cu_seq_lens:
                starts = np.append(np.flatnonzero(position_ids == 0), position_ids.size).astype(np.int32)
                lengths = self._send(torch.from_numpy(starts))
                longest = int(np.diff(starts).max())
                batch |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
                batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch

    def _widened(self, array: np.ndarray) -> Tensor:
        """int64 on the device; what travels is narrow."""
        if not self._cuda:
            # numpy, because torch would start a second pool of threads from this one.
            return self._send(torch.from_numpy(array.astype(np.int64, order="C")))
        # torch has few operations for unsigned integers: travel as signed ones, widen, and cut the sign off.
        bits = 8 * array.itemsize
        sent = self._send(torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}")))
        return sent.to(torch.int64).bitwise_and_((1 << bits) - 1)

    def _send(self, tensor: Tensor) -> Tensor:
        if self._pin:
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
