"""The network interface of a job: ranks listen where the others of the job are, and nowhere else.

``torch.distributed`` has no authentication, and gloo listens on whatever address the host's name stands for. The
store of the launcher is torch's own and listens on all interfaces; SECURITY.md says what that asks of the network.
NCCL chooses for itself among the fast networks of a cluster (``NCCL_SOCKET_IFNAME`` overrules it).
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface, at byte 20 of struct ifreq


def stay_on_the_jobs_interface() -> None:
    """Set ``GLOO_SOCKET_IFNAME``, unless the user has; before the process group is made."""
    name = job_interface(os.environ) if sys.platform == "linux" else None
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def job_interface(env: Mapping[str, str]) -> str | None:
    """The loopback for one node; for several the one that reaches the head node, or has its address.

    ``None`` where it cannot be told (no launcher, no IPv4): then torch chooses as it always does.
    """
    size, here = env.get("WORLD_SIZE", "1"), env.get("LOCAL_WORLD_SIZE")
    if size == "1" or here is None:
        return None
    addresses = interface_addresses()
    if here == size:
        wanted = "127.0.0.1"
    else:
        try:
            wanted = socket.gethostbyname(env.get("MASTER_ADDR", ""))
            if (
                wanted not in addresses
            ):  # not the head node: which of our addresses would a packet to it carry?
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                    probe.connect((wanted, 9))  # of a datagram socket this sends nothing
                    wanted = probe.getsockname()[0]
        except OSError:
            return None
        if wanted.startswith(
            "127."
        ):  # some hosts' names stand for themselves only; others could not reach that
            return None
    return addresses.get(wanted)


def interface_addresses() -> dict[str, str]:
    """Of every interface that has an IPv4 address: address -> name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none, or is down
            found[socket.inet_ntoa(answer[20:24])] = name
    return found
