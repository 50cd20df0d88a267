"""Writing checkpoints, each of which is either complete and verified or does not exist.

Every rank writes its own part of the state into a temporary folder on the shared disk. It copies that part to host memory
(the only stall; on a GPU the copy overlaps with the next step). A background thread then writes, hashes, syncs and reads back
the files, and leaves a list of them in the folder. Rank 0's background thread waits for all lists, checks that the pieces
cover all tensors, writes the manifest last, renames the folder and syncs its parent. The background threads use no collectives.
If any rank is killed or loses power at any instant, the old checkpoint, the new one, or both exist. An old checkpoint is
removed only after the new one is committed and verified. Files are safetensors and JSON: nothing is ever unpickled.

Folder: ``checkpoints/step-00001000/{model*.safetensors, optim*.safetensors, state.json, manifest.json}``; with several ranks
``model-r00003*.safetensors`` and so on. In ``checkpoints`` there are also the link ``best``, ``step-….damaged-<n>`` and
``step-….abandoned-<n>`` (set aside), and ``.step-….tmp`` (being written, or left by a kill).

Example::

    saves = Checkpoints(config.checkpoint, run_dir / "checkpoints", ranks=engine)
    saves.save(100, tensors=engine.state_parts(), state={"cursor": ...})
    saves.wait()
    with open_checkpoint(run_dir / "checkpoints" / "step-00000100") as checkpoint:
        engine.load_state(checkpoint.stored)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, final

import torch
from torch import Tensor

from lmcore import __version__
from lmcore.checkpoint.copies import DeviceCopies
from lmcore.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    VERSION,
    Damaged,
    described,
    difference,
    digest,
    inodes,
    manifest_bytes,
    read_hashed,
    read_manifest,
    state_bytes,
    step_name,
    step_of,
)
from lmcore.checkpoint.pieces import Held, Piece, to_json, to_write
from lmcore.checkpoint.reader import (
    Checkpoint,
    abandon_after,
    find,
    listing,
    open_checkpoint,
    set_aside,
)
from lmcore.checkpoint.retention import kept_steps
from lmcore.checkpoint.tensors import DTYPE_NAMES, Plan, plan, write_planned
from lmcore.disk import DISK, Disk
from lmcore.errors import FaultError, RequestError
from lmcore.humanize import message_of
from lmcore.process import available_bytes

if TYPE_CHECKING:
    from lmcore.config.schema import CheckpointConfig

__all__ = ["Checkpoint", "Checkpoints", "abandon_after", "find", "listing", "open_checkpoint", "step_name"]

STATE_VERSION: Final = 1
SHARD_BYTES: Final = 2 << 30
"""Files above this size are split; the files of a checkpoint are verified in parallel."""
WAIT_SECONDS: Final = 1800.0
"""How long rank 0 waits for the other ranks' parts once its own is written. All parts have about the same size."""
ABANDON_SECONDS: Final = 4.0
"""How much longer rank 0 waits once it is ending with an error. A dead rank ends the others within 10 s."""
LAG_SECONDS: Final = 90.0
"""How long a network file system may take to show a file that another machine has created (NFS: 60 s by default)."""
BACKGROUND_NICE: Final = 10
"""Niceness of the writing thread, so that the training threads come first."""
_LEFTOVER: Final = re.compile(r"\.step-.*\.tmp|\.old-step-.*")


class Ranks(Protocol):
    """The interface to the processes of a run that the writer needs; :class:`lmcore.engine.engine.Engine` implements it."""

    rank: int
    world_size: int

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank."""

    def gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""


@final
class OneProcess:
    """:class:`Ranks` for a single process."""

    rank, world_size = 0, 1

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_object(self, value: Any) -> list[Any]:
        return [value]


@final
@dataclass(kw_only=True)
class _Save:
    """A save in progress on one rank. ``messages`` and ``problem`` go from the background thread to the caller's thread.

    ``folder`` is the temporary folder, and ``token`` tells this save from any other of the same step. ``manifest`` and
    ``state`` are set on rank 0 only. ``written`` is set when this rank's own files are written, ``done`` when this rank has
    nothing left to do.
    """

    step: int
    folder: Path
    token: str
    plan: Plan
    pieces: list[Piece]
    tensors: Iterator[Tensor]
    begin: float
    copies: dict[str, Tensor] = field(default_factory=dict)
    """The tensors' bytes by file, in host memory that does not change during the save. Empty if the tensors are written
    directly, without a copy."""
    copied: Callable[[], None] = lambda: None
    """Waits until the copies hold the state; called by the writing thread."""
    manifest: dict[str, Any] = field(default_factory=dict)
    state: bytes = b""
    seconds: float = 0.0
    problem: Exception | None = None
    messages: list[str] = field(default_factory=list)
    written: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    others: dict[int, str] = field(default_factory=dict)
    """The known failures of other ranks, by rank; ``news`` is set once the ranks have exchanged them."""
    news: threading.Event = field(default_factory=threading.Event)
    give_up_at: float = math.inf


class _Known(NamedTuple):
    """The parts of a manifest that retention needs; ``inode`` is the inode of the checkpoint's folder."""

    inode: int
    step: int
    reason: str
    metrics: dict[str, Any]


@final
class Checkpoints:
    """Saves the checkpoints of one run. Create it on every rank: every rank writes its part, and rank 0 commits the
    checkpoint and removes old ones.

    Args:
        options: how many to keep, by what metric, and how to write; :class:`lmcore.config.schema.CheckpointConfig`.
        folder: ``<run folder>/checkpoints``, on a disk that all ranks see; created by the first save. It may be a link, and
            so may checkpoints in it.
        ranks: the processes of the run. :meth:`save` and :meth:`wait` are collective over them.
        keeps: whether the checkpoint of a step is kept permanently (``options.keep_every``, in steps); default: none is.
        copies: if given, copies from a GPU may continue after :meth:`save` has returned, and the caller must call
            ``copies.before_writing()`` before it changes any tensor that was saved; :class:`lmcore.engine.engine.Engine` has
            such copies. By default all copies are complete when :meth:`save` returns.
        progress: called on every rank while a save runs in the foreground: at each tensor, and at each file that is read
            back. A watchdog counts it as progress, so that a long save is not mistaken for a hang.
        note: called with one line per event, always on the caller's thread.
        shard_bytes: files above this size are split.
        wait_seconds: how long rank 0 waits for the parts of the others once it has written its own.
    """

    def __init__(
        self,
        options: CheckpointConfig,
        folder: Path | str,
        *,
        ranks: Ranks | None = None,
        keeps: Callable[[int], bool] | None = None,
        copies: DeviceCopies | None = None,
        disk: Disk = DISK,
        progress: Callable[[], None] = lambda: None,
        note: Callable[[str], None] = print,
        shard_bytes: int = SHARD_BYTES,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self.folder = Path(folder)
        self.keep = max(1, options.keep)
        self.keep_best = asdict(options.keep_best) if options.keep_best.k else None
        self.keeps = keeps or (lambda step: False)
        self.measured_after = -1
        """Metrics up to this step were measured on other data than later ones."""
        self.background = options.background
        self.last_step: int | None = None
        """The step of the newest checkpoint that this object has committed or was resumed from; up to date on rank 0 only."""
        self.save_seconds = 0.0
        """Duration of the last save from its start to its commit: the time to reserve before a deadline."""
        self._ranks: Ranks = ranks or OneProcess()
        self.is_main = self._ranks.rank == 0
        self._stop_on_failure = options.on_full_disk == "stop"
        self._disk, self._note, self._shard_bytes = disk, note, shard_bytes
        self._copies, self._copies_go_on = copies or DeviceCopies(), copies is not None
        self._progress = progress
        self._wait_seconds = wait_seconds
        self._known: dict[str, _Known] = {}
        self._running: _Save | None = None
        self._failure: str | None = None
        self._buffers: dict[str, Tensor] = {}
        self._late_metrics: dict[int, dict[str, Any]] = {}

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Tell the writer that the run continues from this checkpoint, so that its step need not be saved again."""
        self.last_step = checkpoint.step

    def save(
        self,
        step: int,
        *,
        tensors: Iterable[Held],
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        reason: str = "interval",
        epoch: float | None = None,
        tokens: int | None = None,
    ) -> bool:
        """Save this step. Collective: the ranks synchronize before anything is written.

        Tensors are copied before this returns, or before the next write to them on their device (``copies``); they may be
        live parameters, on any device. If the previous save is still being written, this waits for it. The step that was
        saved last is not written again. A failure to write is never raised here: it sets :attr:`failed`, and :meth:`poll`
        and :meth:`wait` raise it.

        Args:
            tensors: what this rank holds of every tensor of the state. Together the ranks hold all of it; elements that
                several ranks hold are written by one of them.
            state: JSON content of ``state.json``; rank 0's is used, and ``step`` is added.
            metrics: what is known about this step; :meth:`record` can add more later.
            reason: ``interval``, ``end``, ``save file``, or one of :data:`PREEMPTION_REASONS`.

        Returns:
            Whether a save was started; the same on every rank. False if this step is already saved or the save failed
            immediately.
        """
        several = self._ranks.world_size > 1
        pieces = to_write(tensors, rank=self._ranks.rank)
        layout = [(piece.kind, piece.key, None, piece.tensor.shape, piece.tensor.dtype) for piece in pieces]
        planned = plan(layout, shard_bytes=self._shard_bytes, writer=self._ranks.rank if several else None)
        _, sizes = self._settle_together(planned.total_bytes)
        begin = time.monotonic()
        begun: tuple[str, str, dict[str, Any], bytes] | None = None
        if self.is_main:
            try:
                begun = self._begin(step, sum(sizes), state, metrics or {}, reason, epoch, tokens)
            except OSError as error:
                self._fail(step, error)
        name = self._ranks.broadcast_object(begun and begun[:2])
        if name is None:
            return False
        save = _Save(
            step=step,
            folder=self.folder / name[0],
            token=name[1],
            plan=planned,
            pieces=pieces,
            tensors=(piece.tensor for piece in pieces),
            begin=begin,
        )
        if begun is not None:
            save.manifest, save.state = begun[2:]
        self._run(save)
        return True

    def _run(self, save: _Save) -> None:
        if self.background and self._copy(save):
            try:
                threading.Thread(target=self._write, args=(save, BACKGROUND_NICE), name="checkpoint").start()
            except RuntimeError as error:  # no thread can be started: a limit of threads or memory
                self._note(f"checkpoint of step {save.step} is written in the foreground: {error}")
                self._write(save, 0)
        else:
            self._write(save, 0)
        self._running = save

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics that became known after the save (by the evaluation of its step), for ``keep_best``."""
        if self.is_main:
            self._late_metrics.setdefault(step, {}).update(_plain(metrics))
            self._settle()

    def poll(self) -> int | None:
        """The step of a checkpoint that was committed since the last call, or ``None``. Does not wait and is not collective.

        Raises ``FaultError`` if a save has failed and the policy is to stop.
        """
        return self._outcome(self._settle(), final=False)

    def wait(self, *, final: bool = False) -> int | None:
        """Wait until no rank is writing any more, then do what :meth:`poll` does. Collective.

        Args:
            final: raise a failure whatever ``on_full_disk`` says. Set it before a run reports that it has finished.
        """
        step, _ = self._settle_together(0)
        self._failure = self._ranks.broadcast_object(self._failure)  # rank 0 knows the failures of all ranks
        return self._outcome(step, final=final)

    def abandon(self) -> None:
        """Tell the writer that this rank is ending with an error. Others may be gone, so rank 0 waits only a few more
        seconds for their parts."""
        if self._running is not None:
            self._running.give_up_at = time.monotonic() + ABANDON_SECONDS

    def _outcome(self, step: int | None, *, final: bool) -> int | None:
        if self._failure is not None and (final or self._stop_on_failure):
            raise FaultError(self._failure)
        return step

    def _settle_together(self, given: int) -> tuple[int | None, list[int]]:
        """Wait until every rank has written its part or failed, and collect the result. Collective.

        Returns:
            The committed step, or ``None`` (always ``None`` on other ranks than 0); and the ``given`` of every rank.
        """
        running, problem = self._running, None
        if running is not None:
            running.written.wait()
            problem = None if running.problem is None else _cause(running.problem)
        reports = self._ranks.gather_object((problem, given))
        if self.is_main and running is not None:
            running.others = {rank: said for rank, (said, _) in enumerate(reports) if said and rank}
            running.news.set()  # without failures, too: all parts are written now
        step = self._settle(wait=True)
        if self.is_main and running is not None and running.problem is not None:
            self._disk.remove_quietly(running.folder)  # no rank writes into it any more
        return step, [number for _, number in reports]

    @property
    def failed(self) -> bool:
        """Whether a save has failed and the run must stop. It differs between ranks, which must agree on it."""
        self._settle()
        return self._stop_on_failure and self._failure is not None

    @property
    def busy(self) -> bool:
        """Whether a save that is due by the clock has to wait for the previous one. Always true on other ranks than 0, because
        rank 0's clock decides for all."""
        return not self.is_main or (self._running is not None and not self._running.done.is_set())

    def _settle(self, *, wait: bool = False) -> int | None:
        """Collect the result of the background thread; never raises."""
        step = None
        if self._running is not None and (wait or self._running.done.is_set()):
            self._running.done.wait()
            save, self._running = self._running, None
            self.save_seconds = save.seconds
            for message in save.messages:
                self._note(message)
            if save.problem is not None:
                self._fail(save.step, save.problem)
            elif self.is_main:
                step = self.last_step = save.step
                self._failure = None
                self._note(f"checkpoint {step_name(step)} committed in {save.seconds:.1f} s")
        if self._running is None and self._late_metrics:
            late, self._late_metrics = self._late_metrics, {}
            for saved_step, metrics in late.items():
                try:
                    self._add_metrics(saved_step, metrics)
                except OSError as error:
                    self._note(
                        f"the metrics of step {saved_step} could not be added to its checkpoint: {error}"
                    )
        return step

    # ---- parts of a save -----------------------------------------------------------------------------------

    def _begin(
        self,
        step: int,
        total_bytes: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        reason: str,
        epoch: float | None,
        tokens: int | None,
    ) -> tuple[str, str, dict[str, Any], bytes] | None:
        """On rank 0, before anything is copied: create the temporary folder.

        Returns:
            The folder's name, the token, the manifest and the content of ``state.json``; ``None`` if this step is saved.
        """
        if self.last_step == step and (self.folder / step_name(step)).is_dir():
            return None
        content = state_bytes({"version": STATE_VERSION, **state, "step": step})
        self._disk.makedirs(self.folder)
        with os.scandir(self.folder) as entries:
            left = [Path(entry.path) for entry in entries if _LEFTOVER.fullmatch(entry.name)]
        for path in left:
            self._disk.remove_tree(path)
        needed = total_bytes + len(content) + (1 << 20)
        status = os.statvfs(self.folder)
        free = status.f_bavail * status.f_frsize
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "lmcore": __version__,
            "torch": torch.__version__,
            "step": step,
            "epoch": epoch,
            "tokens": tokens,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "metrics": _plain(metrics),
            "keep_best": self.keep_best,
            "measured_after": self.measured_after,
        }
        token = uuid.uuid4().hex
        # Named after the token, so that a rank of an earlier job that still writes cannot write into this save.
        label = f".{token[:8]}" if self._ranks.world_size > 1 else ""
        name = f".{step_name(step)}{label}.tmp"
        self._disk.mkdir(self.folder / name)
        self._disk.fsync_dir(self.folder)
        return name, token, manifest, content

    def _copy(self, save: _Save) -> bool:
        """Copy what this rank writes to host buffers. False, with a note, if there is not enough memory for them."""
        sizes = dict(save.plan.data_bytes)
        if {name: len(buffer) for name, buffer in self._buffers.items()} != sizes:
            self._buffers.clear()
            neighbours = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # they copy at the same time
            needed, available = sum(sizes.values()), available_bytes()
            try:
                if available is not None and needed * neighbours > 0.8 * available:
                    raise MemoryError(f"only {available / 1e9:.3g} GB of memory are free to copy it to")
                # The buffers are kept from save to save: allocating new pages costs more than the copy.
                pinned = any(piece.tensor.is_cuda for piece in save.pieces)
                self._buffers.update({name: _host_buffer(size, pinned) for name, size in sizes.items()})
            except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError if an allocation fails
                self._buffers.clear()
                cause = message_of(error)
                self._note(f"checkpoint of {needed / 1e9:.3g} GB is written in the foreground: {cause}")
                return False
        targets = [self._buffers[entry.file][entry.start : entry.stop] for entry in save.plan.entries]
        save.copied = self._copies.begin(zip(targets, [piece.tensor for piece in save.pieces], strict=True))
        if not self._copies_go_on:
            save.copied()
        save.tensors = iter(targets)
        save.copies = dict(self._buffers)
        return True

    def _write(self, save: _Save, niceness: int) -> None:
        """Write and commit the checkpoint and remove old ones, in the background or not. Keeps an exception for the caller."""
        progress = self._progress if not niceness else lambda: None
        try:
            save.copied()
            if niceness and sys.platform.startswith("linux"):  # on Linux niceness is per thread
                thread = threading.get_native_id()
                own = os.getpriority(os.PRIO_PROCESS, thread)  # lowering the niceness would need a privilege
                os.setpriority(os.PRIO_PROCESS, thread, max(niceness, own))
            part = self._write_part(save, progress)
            if self.is_main:
                save.written.set()
                self._commit(save, [part, *self._other_parts(save, progress)], progress)
            else:
                # The list must be the last file that this rank writes: once it exists, rank 0 commits, and any later write
                # into the folder (to report a failed sync, for example) would damage the checkpoint. Rank 0 removes the list
                # before it commits and syncs the folder, so the list need not be durable.
                path = save.folder / part_name(self._ranks.rank)
                self._disk.write_bytes(path, manifest_bytes(part), durable=False)
        except Exception as error:
            save.problem = error
            if self.is_main:
                self._disk.remove_quietly(save.folder)
            else:
                self._leave_problem(save, error)
        else:
            try:
                if self.is_main:
                    self._retain(save.step, save.messages)
            except OSError as error:
                save.messages.append(f"old checkpoints could not be removed: {error}")
        finally:
            save.seconds = time.monotonic() - save.begin
            save.written.set()
            save.done.set()

    def _write_part(self, save: _Save, progress: Callable[[], None]) -> dict[str, Any]:
        """Write, sync and read back this rank's files. Returns what the manifest will say about them."""
        disk = self._disk
        files = write_planned(disk, save.folder, save.plan, save.tensors, progress=progress)
        if self.is_main:
            disk.write_file(save.folder / STATE, save.state)
            files[STATE] = {"bytes": len(save.state), "sha256": hashlib.sha256(save.state).hexdigest()}
        for file, entry in files.items():
            progress()
            if found := self._difference(save, file, entry["sha256"]):
                raise OSError(errno.EIO, f"{file} reads back differently than it was written ({found})")
        tensors: dict[str, dict[str, Any]] = {}
        names = sorted(save.plan.data_bytes)
        for planned, piece in zip(save.plan.entries, save.pieces, strict=True):
            tensors.setdefault(piece.kind, {})[piece.key] = {
                "dtype": DTYPE_NAMES[piece.tensor.dtype],
                "shape": list(piece.shape),
                "pieces": [to_json(names.index(planned.file), piece.part, piece.shape)],
            }
        return {
            "token": save.token,
            "rank": self._ranks.rank,
            "files": files,
            "piece_files": names,
            "tensors": tensors,
        }

    def _difference(self, save: _Save, file: str, sha256: str) -> str:
        """How a file on the disk differs from what was written; empty if it does not."""
        if file in save.copies:  # its bytes are still in memory
            header, data = save.plan.headers[file], save.copies[file]
            return difference(save.folder / file, (memoryview(header), data.numpy().data))
        found = digest(save.folder / file, from_disk=True)
        return "" if found == sha256 else found[:80]

    def _leave_problem(self, save: _Save, error: Exception) -> None:
        """Tell rank 0 of a failure by a file. This may fail as well, on the same disk; then rank 0 learns of it at the next
        collective."""
        content = {"token": save.token, "rank": self._ranks.rank, "problem": _cause(error)}
        path = save.folder / part_name(self._ranks.rank)
        with contextlib.suppress(OSError):
            self._disk.write_bytes(path, manifest_bytes(content), durable=False)

    def _other_parts(self, save: _Save, progress: Callable[[], None]) -> list[dict[str, Any]]:
        """The lists that the other ranks have left in the folder, in rank order.

        Raises:
            OSError: a rank has failed, or has left no list within the time limit.
        """
        parts: dict[int, dict[str, Any]] = {}
        missing, pause = list(range(1, self._ranks.world_size)), 0.01
        begin = time.monotonic()
        end = begin + self._wait_seconds
        told = False
        while missing:
            if save.news.is_set() and not told:  # all have written; a network file system may show it later
                told, end = True, min(end, time.monotonic() + LAG_SECONDS)
            for rank in missing:
                path = save.folder / part_name(rank)
                if path.is_file():
                    part = read_hashed(path)
                    if part.get("token") != save.token or part.get("rank") != rank:
                        raise OSError(errno.EIO, f"{path.name} is of another save")
                    if problem := part.get("problem", save.others.get(rank)):
                        raise OSError(errno.EIO, f"rank {rank}: {problem}")
                    parts[rank] = part
            missing = [rank for rank in missing if rank not in parts]
            if missing and save.others:
                rank, problem = next(iter(save.others.items()))
                raise OSError(errno.EIO, f"rank {rank}: {problem}")
            if missing and time.monotonic() >= min(end, save.give_up_at):
                what = f"rank {', '.join(map(str, missing))} left nothing in {save.folder}"
                waited = f"{time.monotonic() - begin:.0f} s after rank 0 had written its part"
                raise OSError(errno.ETIMEDOUT, f"{what}, {waited}; all ranks must see the same disk")
            if missing:
                progress()
                time.sleep(pause) if told else save.news.wait(pause)
                pause = min(pause * 1.5, 1.0)
        return [parts[rank] for rank in sorted(parts)]

    def _commit(self, save: _Save, parts: list[dict[str, Any]], progress: Callable[[], None]) -> None:
        """On rank 0, when all parts are written: write the manifest, rename the folder and sync its parent."""
        disk, target = self._disk, self.folder / step_name(save.step)
        manifest = save.manifest | _joined(parts)
        try:
            described(manifest)
        except Damaged as problem:
            raise OSError(
                errno.EIO, f"what the ranks have written is not the whole state ({problem})"
            ) from None
        for file, entry in manifest["files"].items():
            progress()
            if (found := os.lstat(save.folder / file).st_size) != entry["bytes"]:
                raise OSError(errno.EIO, f"{file} has {found:,} bytes instead of {entry['bytes']:,}")
        for part in parts[1:]:
            disk.unlink(save.folder / part_name(part["rank"]))
        disk.write_file(save.folder / MANIFEST, manifest_bytes(manifest))
        disk.fsync_dir(save.folder)
        if os.path.lexists(target):
            # It belongs to an abandoned branch. After a kill between the two renames, the new one is complete and is found.
            set_aside(target, "abandoned", disk)
        disk.rename(save.folder, target)
        disk.fsync_dir(self.folder)

    def _retain(self, step: int, messages: list[str]) -> None:
        """Update the link ``best`` and remove old checkpoints, now that the one of ``step`` is committed and verified."""
        known = {
            name: found
            for name, inode in inodes(self.folder).items()
            if (found := self._read_once(name, inode)) is not None
        }
        self._known = known
        # A checkpoint with a damaged manifest is not in `known` and is never removed; the next resume reports it.
        stay, best = kept_steps(
            {found.step: (found.reason, found.metrics) for found in known.values()},
            keep=self.keep,
            keep_best=self.keep_best,
            keeps=self.keeps,
            measured_after=self.measured_after,
        )
        stay.add(step)
        if best is not None:
            self._link_best(step_name(best), messages)
        going = []
        for name, found in known.items():
            if found.step not in stay:
                # Rename it first: a kill during the removal must not leave an incomplete folder under a valid name.
                going.append(self.folder / f".old-{name}")
                self._disk.rename(self.folder / name, going[-1])
        if going:
            self._disk.fsync_dir(self.folder)
        for old in going:
            self._disk.remove_tree(old)

    def _read_once(self, name: str, inode: int) -> _Known | None:
        """Step, reason and metrics from a manifest, read once per folder; ``None`` for a damaged one.

        With thousands of kept checkpoints, even a stat of each manifest would take longer than the save.
        """
        known = self._known.get(name)
        if known is not None and known.inode == inode:
            return known
        path = self.folder / name
        try:
            manifest = read_manifest(path)
        except (Damaged, RequestError, OSError):
            return None  # it stays as it is: the next resume sets it aside
        return _Known(inode, step_of(path), manifest["reason"], manifest["metrics"])

    def _link_best(self, name: str, messages: list[str]) -> None:
        link, aside = self.folder / "best", self.folder / ".best.tmp"
        if link.is_symlink() and os.readlink(link) == name:
            return
        try:
            if aside.is_symlink():
                self._disk.unlink(aside)
            self._disk.link(aside, name)
            self._disk.rename(aside, link)
        except OSError as error:  # not every file system has links; --resume best does not need the link
            messages.append(f"the link checkpoints/best could not be set: {error.strerror}")

    def _add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        path = self.folder / step_name(step)
        try:
            manifest = read_manifest(path)
        except Damaged:
            return  # this step was not saved, or its checkpoint was removed meanwhile
        manifest["metrics"] |= metrics
        manifest["measured_after"] = self.measured_after
        # Written next to the folder, not in it: a file that a kill leaves inside would make the checkpoint damaged.
        aside = self.folder / f".manifest-{step}.tmp"
        self._disk.write_file(aside, manifest_bytes(manifest))
        self._disk.rename(aside, path / MANIFEST)
        self._disk.fsync_dir(path)
        self._known.pop(path.name, None)
        messages: list[str] = []
        self._retain(step, messages)
        for message in messages:
            self._note(message)

    def _fail(self, step: int, error: Exception) -> None:
        last = "older ones are" if self.last_step is None else f"{step_name(self.last_step)} is"
        cause = _cause(error)
        remedy = (
            ", or keep training without it: --checkpoint.on_full_disk continue"
            if self._stop_on_failure
            else ""
        )
        self._failure = (
            f"checkpoint of step {step} could not be written: {cause}; {last} untouched; check space and permissions of "
            f"{self.folder}{remedy}"
        )
        if not self._stop_on_failure:
            self._note(self._failure)


def part_name(rank: int) -> str:
    """File name of the list that a rank leaves in the temporary folder of a save: its files and the pieces in them."""
    return f"part-r{rank:05d}.json"


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """``files``, ``piece_files`` and ``tensors`` of the manifest. Raises ``OSError`` if two ranks disagree about a tensor."""
    files: dict[str, Any] = {}
    names: list[str] = []
    tensors: dict[str, dict[str, Any]] = {}
    for part in parts:
        for kind, of_kind in part["tensors"].items():
            for key, entry in of_kind.items():
                known = tensors.setdefault(kind, {}).setdefault(key, {**entry, "pieces": []})
                if (known["dtype"], known["shape"]) != (entry["dtype"], entry["shape"]):
                    raise OSError(
                        errno.EIO, f"rank {part['rank']} has another {key} than the ranks before it"
                    )
                known["pieces"] += [[file + len(names), *where] for file, *where in entry["pieces"]]
        files |= part["files"]
        names += part["piece_files"]
    return {"files": files, "piece_files": names, "tensors": tensors}


def _cause(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else repr(error)


def _host_buffer(size_bytes: int, pinned: bool) -> Tensor:
    """A buffer in host memory; ``pinned``: page-locked, so that a GPU copies into it directly. Not tested on a GPU.

    It is page-locked in place because the sizes of torch's own pinned memory are rounded up to a power of two.
    """
    buffer = torch.empty(size_bytes, dtype=torch.uint8)
    if pinned and size_bytes:
        runtime: Any = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(buffer.data_ptr(), size_bytes, 0)) == 0:
            weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
        else:  # without page-locked memory the copy is slower, but correct
            # CUDA keeps the error until the next kernel launch, and torch would blame that kernel: so launch one here.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda")
    return buffer


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON can store them: NaN and infinity become null, which is never the best value."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }
