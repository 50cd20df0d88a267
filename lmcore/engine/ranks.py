"""Communication between ranks on the host: agreeing on flags, barriers, passing objects.

These calls use their own gloo groups, so that they neither wait for the device nor interleave with its collectives. Ranks
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
    """Host-side collectives over all ranks. Create it on all ranks together, after the process group.

    Without a process group every result is this process's own value.

    Args:
        timeout: how long a call waits for the other ranks before it raises an error that names those missing.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._grouped = dist.is_initialized()
        self._host = dist.new_group(backend="gloo", timeout=timeout) if self._grouped else None
        # A group in which a collective has failed cannot be used again, not even to find out which rank is missing.
        self._inquiry = dist.new_group(backend="gloo", timeout=timeout) if self._grouped else None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in a new tensor on the same device."""
        total = tensor.detach().clone()
        if self._grouped:
            dist.all_reduce(total)
        return total

    def agree(self, flags: int) -> int:
        """Bitwise OR of every rank's flags (below 2**63)."""
        if not self._grouped:
            return flags
        # The maximum of each bit as a number of its own: not every gloo has bitwise operations.
        bits = (torch.tensor([flags]) >> torch.arange(63)) & 1
        self._together("agree", lambda: dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=self._host))
        return int((bits << torch.arange(63)).sum())

    def barrier(self, name: str) -> None:
        """Wait for every rank."""
        if self._grouped:
            self._together(name, lambda: dist.barrier(group=self._host))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        box = [value]
        if self._grouped:
            self._together("broadcast", lambda: dist.broadcast_object_list(box, src=0, group=self._host))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object in rank order, on every rank."""
        values = [value] * (dist.get_world_size() if self._grouped else 1)
        if self._grouped:
            self._together("gather", lambda: dist.all_gather_object(values, value, group=self._host))
        return values

    def close(self) -> None:
        """Leave the process group, all ranks together; a second call is a no-op."""
        self._host = self._inquiry = None
        self._grouped = False
        if dist.is_initialized():
            dist.destroy_process_group()

    def abort(self) -> None:
        """Drop all connections without waiting for the other ranks, which may have failed.

        Destroying an NCCL group waits for queued collectives, forever if one rank has failed. gloo does not wait, and
        cannot be aborted.
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
        """A description of the ranks that are missing, as far as it can be found out after the failure."""
        patience = min(self._timeout, timedelta(seconds=15))
        try:
            dist.monitored_barrier(group=self._inquiry, timeout=patience, wait_all_ranks=True)
        except (RuntimeError, dist.DistError) as error:
            return f"a rank is dead or stuck: {error}"
        return "a rank was too slow"


def on_main(engine: Engine, work: Callable[[], Any]) -> Any:
    """Run ``work`` on rank 0 only; every rank gets its result. Collective.

    Raises:
        RequestError, FaultError: on every rank, if ``work`` raised it, or could not read or write a file.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if engine.is_main:
        try:
            outcome = (work(), None)
        except (RequestError, FaultError) as refusal:
            outcome = (None, refusal)
        except OSError as error:
            if error.filename is None:  # a lost connection, not a file
                raise
            failure = of_disk(error)
            failure.__cause__ = error
            outcome = (None, failure)
    result, refused = engine.broadcast_object(outcome)
    if refused is not None:
        raise refused
    return result


def hashing_together(engine: Engine, work: Callable[[Hashes], Any]) -> Any:
    """:func:`on_main` for work that hashes many files: ``work(hashes)`` runs on rank 0, all ranks compute hashes.

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
    """The files that each of ``count`` ranks hashes, about equally many bytes each, sorted by the rank that wrote them.

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

    torch.distributed has no authentication, and by default gloo listens on the address that the host name resolves to. The
    launcher's store is torch's own and listens on all interfaces; SECURITY.md says what this requires of the network.
    NCCL itself chooses among the fast networks of a cluster (``NCCL_SOCKET_IFNAME`` overrides it).
    """
    name = job_interface(os.environ)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def job_interface(env: Mapping[str, str]) -> str | None:
    """The name of the job's network interface: the loopback for one node, else the one that reaches the head node.

    ``None`` if it cannot be determined (no launcher, no IPv4); then torch chooses as usual.
    """
    size, here = env.get("WORLD_SIZE", "1"), env.get("LOCAL_WORLD_SIZE")
    if size == "1" or here is None:
        return None
    addresses = interface_addresses()
    if here == size:
        return addresses.get("127.0.0.1")
    try:
        wanted = socket.gethostbyname(env.get("MASTER_ADDR", ""))
        if wanted not in addresses:  # not the head node: find the source address of a packet to it
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((wanted, 9))  # sends nothing on a datagram socket
                wanted = probe.getsockname()[0]
    except OSError:
        return None
    # Some host names resolve to the loopback, which other nodes cannot reach.
    return None if wanted.startswith("127.") else addresses.get(wanted)


def interface_addresses() -> dict[str, str]:
    """IPv4 address -> name of every interface that has one."""
    return {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }
