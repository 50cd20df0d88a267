"""A torch profiler over a window of steps (``train.profile``).

Writes ``profile/steps-10-12.json.gz`` into the run folder, for chrome://tracing or https://ui.perfetto.dev, and a table of the
slowest operators beside it. Steps outside of the window are not slower.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from torch.profiler import ProfilerActivity, profile

from lmcore.disk import DISK

TABLE_ROWS = 30


@final
class ProfileWindow:
    """Profiles the steps ``first`` to ``last``, both included; call :meth:`step` after each step of the run."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._profile: profile | None = None

    def step(self, done: int) -> str | None:
        """Call after ``done`` updates. Returns the file that was written, if the window has just ended."""
        if self._profile is not None and done >= self._last:
            return self._finish()
        if self._profile is None and done == self._first - 1:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()
        return None

    def _finish(self) -> str:
        assert self._profile is not None
        self._profile.stop()
        DISK.makedirs(self._folder)
        name = f"steps-{self._first}-{self._last}"
        trace = self._folder / f"{name}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=by, row_limit=TABLE_ROWS)
        DISK.write_text(self._folder / f"{name}.txt", table, durable=False)
        self._profile = None
        return str(trace)
