"""A GPU's queues without a GPU: work on :class:`OnDevice` tensors is put into the current stream and runs when that gets to it.

A stream is ``prompt`` (it runs whatever it may) or not (it runs nothing before somebody must wait for it). With one prompt and
one late stream an order that only events enforce shows as wrong numbers.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

_lock = threading.RLock()  # the thread that writes waits for events, too


class Event:
    """``torch.cuda.Event``."""

    def __init__(self, **_: Any) -> None:
        self.done, self.stream = True, None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or gpu.current
        self.done, self.stream = False, stream
        stream.put(self._finish)

    def _finish(self) -> None:
        self.done = True

    def synchronize(self) -> None:
        chosen = getattr(gpu.chosen, "device", None)
        assert chosen or threading.current_thread() is threading.main_thread(), (
            "a context on the machine's first GPU"
        )
        with _lock:
            while not self.done:
                assert self.stream is not None
                self.stream.run_one()


class Stream:
    """``torch.cuda.Stream``."""

    def __init__(self, device: Any = None) -> None:
        self.work: deque[Callable[[], None] | Event] = deque()
        self.prompt = gpu.side_is_prompt
        gpu.streams.append(self)

    def put(self, work: Callable[[], None] | Event) -> None:
        with _lock:
            self.work.append(work)
            gpu.run_prompt_streams()

    def run_one(self) -> None:
        work = self.work[0]
        if isinstance(work, Event):
            work.synchronize()
        self.work.popleft()
        if not isinstance(work, Event):
            with torch._C.DisableTorchFunctionSubclass():  # it runs, and is not put into a stream again
                work()

    def wait_event(self, event: Event) -> None:
        self.put(event)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Gpu:
    """The streams of the one device."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.recorded: list[tuple[Tensor, Stream]] = []
        self.side_is_prompt = False
        self.chosen = threading.local()
        """The device that each thread has chosen."""

    def start(self, *, side_is_prompt: bool) -> None:
        self.streams.clear()
        self.recorded.clear()
        self.side_is_prompt = side_is_prompt
        self.current = Stream()
        self.current.prompt = not side_is_prompt

    def run_prompt_streams(self) -> None:
        for stream in self.streams:
            while stream.prompt and stream.work:
                if isinstance(stream.work[0], Event) and not stream.work[0].done:
                    break
                stream.run_one()

    @contextlib.contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def choosing(self, device: torch.device) -> Iterator[None]:
        self.chosen.device = device
        try:
            yield
        finally:
            self.chosen.device = None


gpu = Gpu()


class OnDevice(Tensor):
    """A tensor that says it is on a GPU. Views are made at once; what reads or writes numbers goes into the current stream."""

    def record_stream(self, stream: Any) -> None:
        gpu.recorded.append((self, stream))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return cls._run(function.__name__, function, args, kwargs or {})

    @classmethod
    def _run(cls, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        if name == "__get__":
            own = {Tensor.is_cuda.__get__: True, Tensor.device.__get__: torch.device("cuda", 0)}
            return own[function] if function in own else function(*args, **kwargs)
        if name in ("contiguous", "clone") and not (name == "contiguous" and args[0].is_contiguous()):
            made = torch.empty(args[0].shape, dtype=args[0].dtype).as_subclass(OnDevice)
            gpu.current.put(lambda: Tensor.copy_(made, args[0]))
            return made
        if name == "copy_" and not isinstance(args[0], OnDevice):  # to the host
            gpu.current.put(lambda: Tensor.copy_(args[0], args[1]))
            if not kwargs.get("non_blocking"):
                event = Event()
                event.record()
                event.synchronize()
            return args[0]
        if name in ("add_", "mul_", "sub_"):
            gpu.current.put(lambda: function(*args, **kwargs))
            return args[0]
        if name in ("detach", "reshape", "view", "narrow", "contiguous"):
            return function(*args, **kwargs).as_subclass(OnDevice)
        return function(*args, **kwargs)


def pretend(monkeypatch: pytest.MonkeyPatch, *, side_is_prompt: bool) -> Gpu:
    """Let ``torch.cuda`` be the queues of this module. ``side_is_prompt``: streams that are made later run at once and the
    current one late, else the reverse."""
    gpu.start(side_is_prompt=side_is_prompt)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: gpu.current)
    monkeypatch.setattr(torch.cuda, "stream", gpu.using)
    monkeypatch.setattr(torch.cuda, "device", gpu.choosing)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device=None: pytest.fail("waits for the whole device")
    )
    return gpu
