"""The ranks of a run communicating on the host: agreeing, waiting, passing objects.

These calls use gloo groups of their own, so that they neither wait for the device nor mix with its collectives. Ranks
listen on the network interface of the job and on no other.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from lmcore.checkpoint.manifest import Hashes, hashes_here
from lmcore.errors import FaultError, RequestError, of_disk

if TYPE_CHECKING:
    from lmcore.engine.engine import Engine


class Ranks:
    """Host-side collectives over all ranks; construct it on all of them together, after the process group.

    Without a process group every answer is this process's own.

    Args:
        timeout: how long a call waits for the other ranks before it raises an error that names those missing.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._grouped = dist.is_initialized()
        self._host = dist.new_group(backend="gloo", timeout=timeout) if self._grouped else None
        # A group in which a collective has failed cannot be used again, not even to ask who is missing.
        self._inquiry = dist.new_group(backend="gloo", timeout=timeout) if self._grouped else None

    def sum(self, tensor: Tensor) -> Tensor:
        """A new tensor on the same device: the sum over the ranks."""
        total = tensor.detach().clone()
        if self._grouped:
            dist.all_reduce(total)
        return total

    def agree(self, flags: int) -> int:
        """Bitwise OR of every rank's flags (below 2**63)."""
        if not self._grouped:
            return flags
        # One number for each bit, and the largest counts: not every gloo has bitwise operations.
        bits = (torch.tensor([flags]) >> torch.arange(63)) & 1
        self._together("agree", lambda: dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=self._host))
        return int((bits << torch.arange(63)).sum())

    def barrier(self, name: str) -> None:
        """Wait for every rank."""
        if self._grouped:
            self._together(name, lambda: dist.barrier(group=self._host))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's object."""
        box = [value]
        if self._grouped:
            self._together("broadcast", lambda: dist.broadcast_object_list(box, src=0, group=self._host))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        values = [value] * (dist.get_world_size() if self._grouped else 1)
        if self._grouped:
            self._together("gather", lambda: dist.all_gather_object(values, value, group=self._host))
        return values

    def close(self) -> None:
        """Leave the process group, all ranks together; a second call does nothing."""
        self._host = self._inquiry = None
        self._grouped = False
        if dist.is_initialized():
            dist.destroy_process_group()

    def abort(self) -> None:
        """Drop all connections without waiting for the other ranks, which may never come.

        Destroying a group of NCCL waits for the collectives that are queued, without end if one rank has failed. gloo
        does not, and has no way to abort.
        """
        self._host = self._inquiry = None
        self._grouped = False
        if not dist.is_initialized():
            return
        if dist.is_nccl_available() and "nccl" in str(dist.get_backend_config()):
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    def _together(self, what: str, run: Callable[[], Any]) -> None:
        try:
            run()
        except (RuntimeError, dist.DistError) as error:
            raise RuntimeError(f"{what}: {self._missing()} ({error})") from error

    def _missing(self) -> str:
        """Which ranks did not come, as well as it can be found out after the fact."""
        patience = min(self._timeout, timedelta(seconds=15))
        try:
            dist.monitored_barrier(group=self._inquiry, timeout=patience, wait_all_ranks=True)
        except (RuntimeError, dist.DistError) as error:
            return f"a rank is dead or stuck: {error}"
        return "a rank was too slow"


def on_main(engine: Engine, work: Callable[[], Any]) -> Any:
    """Run ``work`` on rank 0 only; every rank gets its result.

    Raises:
        RequestError, FaultError: on every rank, if ``work`` raised it, or met a place that cannot be read or written.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if engine.is_main:
        try:
            outcome = (work(), None)
        except (RequestError, FaultError) as refusal:
            outcome = (None, refusal)
        except OSError as error:
            if error.filename is None:  # a lost connection, not a place
                raise
            failure = of_disk(error)
            failure.__cause__ = error
            outcome = (None, failure)
    result, refused = engine.broadcast_object(outcome)
    if refused is not None:
        raise refused
    return result


def hashing_together(engine: Engine, work: Callable[[Hashes], Any]) -> Any:
    """:func:`on_main` for work that hashes many files: ``work(hashes)`` on rank 0, and all ranks compute the hashes.

    Raises:
        RequestError, FaultError: on every rank, if ``work`` raised it.

    Example::

        path = hashing_together(engine, lambda hashes: find(folder, hashes=hashes))
    """
    if not engine.is_main:
        while (request := engine.broadcast_object(None))[0] is not None:
            path, names = request
            engine.gather_object(hashes_here(path, names[engine.rank]))
        return on_main(engine, lambda: None)

    def hashes(path: Path, names: list[str]) -> dict[str, str]:
        shares = share_files({name: (path / name).stat().st_size for name in names}, engine.world_size)
        engine.broadcast_object((path, shares))
        found: dict[str, str] = {}
        for share in engine.gather_object(hashes_here(path, shares[0])):
            found |= share
        return found

    def shared() -> Any:
        try:
            return work(hashes)
        finally:
            engine.broadcast_object((None, None))

    return on_main(engine, shared)


def share_files(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Files for each of ``count`` ranks to hash, about equally many bytes; a rank gets those that one of its number wrote.

    Example::

        share_files({"model-r00000.safetensors": 4, "model-r00001.safetensors": 4}, 2)   # one each
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    total, behind = max(1, sum(sizes.values())), 0
    for name in sorted(sizes, key=lambda name: (_WRITER.findall(name), name)):
        shares[min(count - 1, (behind + sizes[name] // 2) * count // total)].append(name)
        behind += sizes[name]
    return shares


_WRITER = re.compile(r"-r(\d{5})")


# ---- network interfaces ------------------------------------------------------------------------------------


def use_job_interface() -> None:
    """Let gloo listen on the job's interface (``GLOO_SOCKET_IFNAME``), unless the user has chosen one.

    torch.distributed has no authentication, and gloo listens on whatever address the host's name stands for. The
    store of the launcher is torch's own and listens on all interfaces; SECURITY.md says what that asks of the network.
    NCCL chooses among the fast networks of a cluster itself (``NCCL_SOCKET_IFNAME`` overrules it).
    """
    name = job_interface(os.environ)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def job_interface(env: Mapping[str, str]) -> str | None:
    """The loopback for one node; for several the one that reaches the head node, or has its address.

    ``None`` where it cannot be known (no launcher, no IPv4): then torch chooses as it always does.
    """
    size, here = env.get("WORLD_SIZE", "1"), env.get("LOCAL_WORLD_SIZE")
    if size == "1" or here is None:
        return None
    addresses = interface_addresses()
    if here == size:
        return addresses.get("127.0.0.1")
    try:
        wanted = socket.gethostbyname(env.get("MASTER_ADDR", ""))
        if wanted not in addresses:  # not the head node: which of our addresses would a packet to it carry?
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((wanted, 9))  # of a datagram socket this sends nothing
                wanted = probe.getsockname()[0]
    except OSError:
        return None
    # Some hosts' names stand for their loopback, which the other nodes could not reach.
    return None if wanted.startswith("127.") else addresses.get(wanted)


def interface_addresses() -> dict[str, str]:
    """IPv4 address -> name of every interface that has one."""
    return {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }
