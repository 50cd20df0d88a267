"""A torch profiler over a window of steps (``train.profile``).

Writes ``profile/steps-10-12.json.gz`` into the run folder, for chrome://tracing or https://ui.perfetto.dev, and a table of the
slowest operators in the same folder. Steps outside the window are not slowed down.
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
    """Profiles the steps ``first`` to ``last``, both included.

    Call :meth:`step` before the first step of this process and after each step, and :meth:`end` after the last one.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._profile: profile | None = None
        self._done = 0
        self._written = False

    def step(self, done: int) -> str | None:
        """Call after ``done`` updates. Returns the file that was written if the window has just ended."""
        self._done = done
        if self._profile is not None and done >= self._last:
            return self._finish()
        if self._profile is None and not self._written and self._first - 1 <= done < self._last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._first = done + 1  # later than requested if the run was resumed inside the window
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()
        return None

    def end(self) -> str | None:
        """Call when the run has ended. Returns the file with what was profiled so far, a message if nothing was profiled, or
        ``None`` if the file was written before."""
        if self._profile is not None:
            return self._finish()
        if self._written:
            return None
        return (
            f"nothing was profiled: steps {self._first}-{self._last} (train.profile) are not among those of this start, "
            f"which ended at step {self._done:,}"
        )

    def _finish(self) -> str:
        assert self._profile is not None
        self._last, self._written = min(self._last, self._done), True
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
