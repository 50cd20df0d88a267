"""The errors that end a run with one line, and who writes status.json."""

from __future__ import annotations

import doctest
import errno
import os
from pathlib import Path

import pytest
import torch

from lmcore.errors import EXIT_FAULT, EXIT_SAVED, FaultError, RequestError
from lmcore.run import ending
from lmcore.run.ending import Status, full_disk, out_of_memory, unusable_place
from lmcore.run.folder import RunFolder


def os_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))


def test_examples() -> None:
    assert doctest.testmod(ending).failed == 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (os_error(errno.EACCES, "text"), RequestError),
        (os_error(errno.ENOSPC, "text"), FaultError),
        (os_error(errno.ENOSPC), FaultError),
        (os_error(errno.ECONNREFUSED), None),
        (ValueError("x"), None),
    ],
)
def test_of_the_errors_before_the_training_those_of_files_are_one_line(
    error: Exception, kind: type[Exception] | None
) -> None:
    failure = unusable_place(error)
    assert failure is None if kind is None else isinstance(failure, kind)


def test_in_training_a_full_disk_is_told_from_a_file_that_is_not_there() -> None:
    failure = full_disk(os_error(errno.EDQUOT, "metrics.jsonl"), step=7)
    assert failure is not None
    assert "in step 7: metrics.jsonl" in str(failure)
    assert full_disk(os_error(errno.ENOENT, "metrics.jsonl"), step=7) is None


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_memory_that_ran_out_gets_advice_and_no_other_error(error: Exception, found: bool) -> None:
    failure = out_of_memory(error, step=1, micro_batch_blocks=3, block_size=8)
    assert (failure is not None and "--train.micro_batch_blocks 1" in str(failure)) == found


def test_block_alone_is_not_told_to_be_cut() -> None:
    failure = str(out_of_memory(MemoryError(), step=1, micro_batch_blocks=1, block_size=8))
    assert "with 1 block of 8 tokens at a time: try --train.activation_checkpointing true" in failure


def test_status_is_written_by_the_one_that_holds_the_folder_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    other, mine = Status(None), Status(None)
    other.going_on("running", step=3)
    other.failed(exit_code=EXIT_FAULT, reason="not mine")
    other.ended("saved", exit_code=EXIT_SAVED, reason="not mine")
    assert folder.read_status() is None
    assert not other.taken
    mine.take(folder)
    mine.remember(checkpoint_step=2)
    mine.going_on("running", step=3)
    mine.failed(exit_code=EXIT_FAULT, reason="mine", diverged=True)
    status = folder.read_status()
    assert status is not None
    assert (status["state"], status["reason"], status["diverged"]) == ("failed", "mine", True)
    assert (status["step"], status["checkpoint_step"]) == (3, 2)
    folder.unlock()


def test_a_failure_is_not_written_into_another_run_that_took_the_place(tmp_path: Path) -> None:
    folder, successor = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    folder.lock()
    mine = Status(None)
    mine.take(folder)
    mine.going_on("running", step=3)
    folder.path.rename(tmp_path / "moved")
    successor.create()
    successor.write_status("running", step=0)
    mine.failed(exit_code=EXIT_FAULT, reason="mine")
    status = successor.read_status()
    assert status is not None
    assert (status["state"], status["step"]) == ("running", 0)
    folder.unlock()
