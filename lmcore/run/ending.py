"""How a run ends: which errors end it with one line, and what ``status.json`` and the webhook report."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Any, final

import torch

from lmcore.errors import FaultError, RequestError, of_disk
from lmcore.humanize import amount
from lmcore.report.redact import redact
from lmcore.report.trackers import tell

if TYPE_CHECKING:
    from lmcore.run.folder import RunFolder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""The errors of a disk that accepts no more data. Libraries may raise them without a file name."""


def unusable_place(error: BaseException) -> RequestError | FaultError | None:
    """The error to end with if a file or folder could not be read or written before the training; ``None`` for other errors.

    >>> unusable_place(FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"))
    RequestError('a.txt: No such file or directory')
    >>> unusable_place(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))
    """
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):
        return of_disk(error)
    return None


def full_disk(error: BaseException, *, step: int) -> FaultError | None:
    """The error to end with if the disk was full in ``step``; ``None`` for other errors."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    where = f": {error.filename}" if error.filename else ""
    return FaultError(
        f"{error.strerror} in step {step}{where}; the last checkpoint is whole: free space and run the same command to resume"
    )


def out_of_memory(
    error: BaseException, *, step: int, micro_batch_blocks: int, block_size: int
) -> FaultError | None:
    """The error to end with if memory ran out in ``step``, with advice on how to use less; ``None`` for other errors.

    >>> print(out_of_memory(MemoryError(), step=3, micro_batch_blocks=8, block_size=256))
    out of memory in step 3 with 8 blocks of 256 tokens at a time: try --train.micro_batch_blocks 4, \
--train.activation_checkpointing true, or --config_file accelerate_configs/fsdp2.yaml on several devices
    """
    of_torch_on_cpu = "can't allocate memory" in str(error)  # torch raises a plain RuntimeError
    if not of_torch_on_cpu and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return None
    smaller = f"--train.micro_batch_blocks {micro_batch_blocks // 2}, " if micro_batch_blocks > 1 else ""
    return FaultError(
        f"out of memory in step {step} with {amount(micro_batch_blocks, 'block')} of {block_size} tokens at a time: "
        f"try {smaller}--train.activation_checkpointing true, or --config_file accelerate_configs/fsdp2.yaml on several "
        "devices"
    )


def of_compiler(error: BaseException) -> bool:
    """Whether torch's compiler has failed, as it does when a signal ends the processes that it has started."""
    kinds = [kind.__module__ for kind in type(error).__mro__]
    return any(name.startswith(("torch._inductor", "torch._dynamo")) for name in kinds)


@final
class Status:
    """Writes ``status.json`` and tells the webhook. Only the process that holds the lock of the run folder does so.

    Until the lock is held, every method is a no-op, because the file may belong to another job.
    """

    def __init__(self, webhook: str | None) -> None:
        self._webhook = webhook
        self._folder: RunFolder | None = None

    def take(self, folder: RunFolder) -> None:
        """Tell that this process holds the lock of the folder, or replaces the dead rank that held it."""
        self._folder = folder

    @property
    def taken(self) -> bool:
        """Whether this process writes the status."""
        return self._folder is not None

    def remember(self, *, checkpoint_step: int | None) -> None:
        """Add the newest committed checkpoint to every later status, so that a run that had one never starts at step 0 again."""
        if self._folder is not None and checkpoint_step is not None:
            self._folder.remember(checkpoint_step=checkpoint_step)

    def going_on(self, state: str, *, step: int) -> None:
        """Write that the run is ``preparing`` or ``running``."""
        if self._folder is not None:
            self._folder.write_status(state, step=step)

    def ended(self, state: str, *, exit_code: int, reason: str, **more: Any) -> None:
        """Write how the run ended. If that cannot be written, only the exit code tells it."""
        if self._folder is None:
            return
        try:
            self._folder.write_status(state, exit_code=exit_code, reason=reason, **more)
        except OSError as error:
            print(f"the run is {state}, which status.json does not say: {of_disk(error)}", file=sys.stderr)

    def failed(self, *, exit_code: int, reason: str, diverged: bool = False) -> None:
        """Write that the run failed, and tell the webhook.

        Args:
            diverged: whether the training itself failed, not the disk or the machine.
        """
        if self._folder is None or not (self._folder.path / "status.json").exists():
            return
        try:
            self._folder.check_owner()
        except FaultError:  # the folder no longer belongs to this run
            return
        self.ended("failed", exit_code=exit_code, reason=reason, **({"diverged": True} if diverged else {}))
        tell(self._webhook, redact(f"{self._folder.path.name}: failed: {reason}"))
