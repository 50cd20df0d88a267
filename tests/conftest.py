"""Shared by all tests: one torch thread per process, no network, no colour."""

from __future__ import annotations

import os
import signal

# Before torch is imported anywhere: two cores, several processes; more threads only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts the tests in the background has them ignore Ctrl-C, and what ignores a signal when it starts
# goes on ignoring it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
