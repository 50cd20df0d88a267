"""Shared by all tests: one torch thread per process, no network, no colour."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two cores, several processes; more threads only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
