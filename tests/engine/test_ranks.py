"""Ranks listen on the job's own interface only."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from lmcore.engine import ranks
from tests.support import engine_runs
from tests.support.engine_runs import Job
from tests.support.fork_server import run_ranks

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="listening sockets are read from Linux's /proc"
)

TWO_NODES = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def listening() -> list[str]:
    """The addresses on which this process listens, from the kernel."""
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(descriptor))
        except OSError:
            continue  # the one by which the folder is read
    found = []
    for table, width in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]  # each in the machine's order
                found.append(socket.inet_ntop(width, b"".join(words)))
    return found


def listen_as_a_rank() -> tuple[list[str], str | None]:
    """What one rank of a single node listens on once its process group stands and has been used; what it was told."""
    before = listening()
    engine = engine_runs.make_engine(Job(mode="ddp2"))
    engine.barrier()
    after = listening()
    engine.close()
    for address in before:
        after.remove(address)
    return after, os.environ.get("GLOO_SOCKET_IFNAME")


def test_ddp_ranks_of_one_node_listen_on_the_loopback_only() -> None:
    (main, _), (other, told) = run_ranks(listen_as_a_rank, 2)
    # On a host whose name stands for the loopback gloo would listen there anyway.
    assert told == ranks.interface_addresses()["127.0.0.1"]
    assert other, "gloo listens somewhere"
    assert set(other) == {"127.0.0.1"}
    # Beside it only torch's store, which listens everywhere (SECURITY.md says so).
    assert sorted(set(main) - {"127.0.0.1"}) in ([], ["::"], ["0.0.0.0"])


def test_one_node_uses_the_loopback() -> None:
    loopback = ranks.interface_addresses()["127.0.0.1"]
    assert ranks.job_interface({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}) == loopback
    assert ranks.job_interface({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}) is None
    assert ranks.job_interface({}) is None


def test_head_of_several_nodes_uses_the_interface_of_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"127.0.0.1": "lo", "10.0.0.5": "ib0", "192.168.0.5": "eth0"}
    monkeypatch.setattr(ranks, "interface_addresses", lambda: names)
    monkeypatch.setattr(ranks.socket, "gethostbyname", lambda name: {"node1": "10.0.0.5"}.get(name, name))
    assert ranks.job_interface({**TWO_NODES, "MASTER_ADDR": "node1"}) == "ib0", "on the head node itself"
    assert ranks.job_interface({**TWO_NODES, "MASTER_ADDR": "127.0.1.1"}) is None, (
        "nobody else could reach it"
    )
    monkeypatch.setattr(ranks.socket, "gethostbyname", lambda name: "127.0.0.1")
    assert ranks.job_interface({**TWO_NODES, "MASTER_ADDR": "node1"}) is None


def test_other_nodes_use_the_interface_that_reaches_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe:
        def __init__(self, *words: object) -> None:
            self.to = ""

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *words: object) -> None: ...

        def connect(self, address: tuple[str, int]) -> None:
            self.to = address[0]

        def getsockname(self) -> tuple[str, int]:
            return ("10.0.0.6" if self.to.startswith("10.") else "192.168.0.6", 1)

    names = {"127.0.0.1": "lo", "10.0.0.6": "ib0", "192.168.0.6": "eth0"}
    monkeypatch.setattr(ranks, "interface_addresses", lambda: names)
    monkeypatch.setattr(ranks.socket, "socket", Probe)
    assert ranks.job_interface({**TWO_NODES, "MASTER_ADDR": "10.0.0.5"}) == "ib0"
    assert ranks.job_interface({**TWO_NODES, "MASTER_ADDR": "192.168.0.5"}) == "eth0"


def test_unknown_head_node_leaves_the_interface_to_torch() -> None:
    assert ranks.job_interface({**TWO_NODES, "MASTER_ADDR": "no-such-host.invalid"}) is None


def test_interface_chosen_by_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ranks.use_job_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib7"
