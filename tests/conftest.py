"""Shared by all tests: one torch thread per process, no network, no colour, nothing left in the temporary folder."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import tempfile

import hypothesis
import pytest

# Before torch is imported anywhere: two cores, several processes; more threads only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As a user has it: otherwise each of hundreds of processes compiles lmcore anew, for half a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell that starts the tests in the background has them ignore Ctrl-C, and what ignores a signal when it starts
# goes on ignoring it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Processes that tests kill, and torch's launcher always, leave folders behind: in one that goes in the end."""
    outside = tempfile.gettempdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", outside)  # ``tmp_path`` stays where pytest has it
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{outside}/torchinductor_{getpass.getuser()}")
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="lmcore-tests-")
    os.environ["LMCORE_CACHE"] = f"{tempfile.tempdir}/cache"


# Each of these takes minutes. Where workers take whole files, the longest must not be the last to begin.
LONGEST_FILES = ("test_faults.py", "test_engine_matrix.py", "test_docs.py", "test_cluster.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)  # stable: else as it was


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


# Property tests draw new examples on a developer's machine; a gate must give the same answer twice.
hypothesis.settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
