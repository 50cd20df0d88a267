"""A real Slurm on one machine: one controller and several nodes, for tests.

Comes in: how many nodes and what each pretends to have. Goes out: a :class:`Cluster` that submits, watches
and ends jobs through Slurm's own commands, and that can say which processes of its jobs are alive. What
always holds: nothing of the machine's own Slurm or munge is used; every daemon is ended by its pid; after
:meth:`Cluster.stop` neither a process, nor a network interface, nor a file is left.

Two ways, chosen by what the machine allows (:attr:`Cluster.isolated` says which):

* *isolated* (root with the right to make namespaces): the whole cluster lives in one PID, mount, UTS and
  network namespace. The namespace's first process waits on a pipe that this process holds: when the tests
  end, however they end, the kernel ends everything inside and the network goes with it. Each node has its own
  network namespace, host name, address and ``/etc/hosts`` in there, so that ports, name resolution and "am I
  the head node" are real.
* *flat*: several slurmds on different ports of one host. All nodes share name and ports; jobs meet at
  127.0.0.1.

Both count fake GPUs (copies of ``/dev/null``): ``--gpus-per-node`` is honoured, ``CUDA_VISIBLE_DEVICES`` set.

    with Cluster(nodes=2) as cluster:
        job = cluster.sbatch("slurm/train.sbatch", "--nodes=2", environment={"CPU": "1"})
        cluster.wait(job, "COMPLETED", seconds=60)
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.support.fork_server import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
NEEDED = (*DAEMONS, "sbatch", "scontrol", "scancel", "squeue", "sinfo")
SUBNET = "10.231.7"
"""Only ever exists inside the isolated network namespace."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"}
# Debian's daemons live there
os.environ["PATH"] = "/usr/sbin:/sbin:" + os.environ.get("PATH", "/usr/bin:/bin")


def missing() -> list[str]:
    """The programs that are needed and not installed."""
    return [program for program in NEEDED if shutil.which(program) is None]


def can_isolate() -> bool:
    """Whether this process may make the namespaces that the isolated mode needs, fake devices included."""
    if os.geteuid() != 0 or any(shutil.which(program) is None for program in ("unshare", "nsenter", "ip")):
        return False
    probe = (
        "mount -t tmpfs tmpfs /run && ip netns add probe && ip link add probe0 type bridge"
        " && ip link add probe1 type veth peer name probe2 netns probe && mknod /run/probe c 1 3"
        " && unshare --uts --mount hostname probe"
    )
    command = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "sh", "-c", probe]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0


class Cluster:
    """A controller, ``nodes`` compute nodes named ``node1`` ..., partitions ``debug`` (default) and ``high``.

    ``high`` preempts ``debug`` by requeueing, after ``grace_seconds``. One node more, the last, is the
    partition ``apart``: nobody preempts there, so what is ended there the clock has ended. Each node claims
    ``cpus`` cores, 64 GB and ``gpus`` GPUs, whatever the machine has. ``kill_wait_seconds`` lie between SIGTERM
    and SIGKILL; ``requeue_seconds`` is the least time that a requeued job waits (the lifetime of its credential;
    Slurm takes less than 5 for its own value, 120).
    """

    def __init__(
        self,
        *,
        nodes: int = 2,
        cpus: int = 16,
        gpus: int = 8,
        kill_wait_seconds: int = 5,
        grace_seconds: int = 10,
        requeue_seconds: int = 5,
        isolated: bool | None = None,
    ) -> None:
        self.nodes = [f"node{i + 1}" for i in range(nodes + 1)]  # the last one is the partition ``apart``
        self.isolated = can_isolate() if isolated is None else isolated
        # Short on purpose: the path of munge's socket must stay under 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="lmslurm-", dir="/tmp"))
        self.configuration = self.folder / "etc" / "slurm.conf"
        self._holder: subprocess.Popen[str] | None = None
        self._enter: list[str] = []
        self._networks: dict[str, str] = {}
        self._claims = (cpus, gpus)
        self._seconds = (kill_wait_seconds, grace_seconds, requeue_seconds)

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- start and stop ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the daemons, wait until every node is idle; ``RuntimeError`` with their logs if not."""
        try:
            if self.isolated:
                self._make_namespace()
            self._write_configuration()
            run = self.folder / "run"
            munge = self.folder / "munge"
            self._inside(
                "munged",
                f"--socket={run}/munge.socket",
                f"--pid-file={run}/munged.pid",
                f"--key-file={munge}/munge.key",
                f"--seed-file={munge}/seed",
                f"--log-file={self.folder}/log/munged.log",
            )
            self._until((run / "munge.socket").exists, "munged to open its socket")
            self._inside("slurmctld", "-c", "-f", str(self.configuration))
            self._until(lambda: self._inside("scontrol", "ping", check=False).returncode == 0, "slurmctld")
            for node in self.nodes:
                self.start_node(node)
            self._until(lambda: self._idle() == len(self.nodes), "the nodes to become idle", seconds=120)
        except BaseException as error:
            logs = "\n".join(f"--- {log.name}\n{_tail(log)}" for log in self.folder.glob("log/*.log"))
            self.stop()
            if isinstance(error, (subprocess.SubprocessError, TimeoutError)):
                raise RuntimeError(f"Slurm did not start: {error}\n{logs}") from error
            raise

    def stop(self) -> None:
        """End every job, then every daemon by its pid, then the namespace; remove the folder. Idempotent."""
        if self._daemon("slurmctld") is not None:
            for job in self._squeue("%A"):
                self._inside("scancel", "--quiet", job, check=False)
            deadline = time.monotonic() + 3 * self._seconds[0]
            while self._squeue("%T") and time.monotonic() < deadline:
                time.sleep(0.1)
        for name in [*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"]:
            pid = self._daemon(name)
            if pid is not None:
                _end(pid)
        for pid in self.processes():  # tasks and slurmstepds that lost their slurmd
            _signal(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._holder is not None:
            assert self._holder.stdin is not None
            self._holder.stdin.close()  # the first process of the namespace reads end of file and leaves
            self._holder.wait(timeout=120)
            self._holder = None
        self._enter = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start one node's slurmd; also after :meth:`kill_node`."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        slurmd = ["slurmd", "-N", node, "-f", str(self.configuration)]
        if not self.isolated:
            self._inside(*slurmd)
            return
        # Not `ip netns exec`: that mounts a fresh /sys, which hides the cgroup mounts that slurmd asks for.
        setup = (
            f"hostname {node} && mount --bind {self.folder}/etc/hosts /etc/hosts && exec {' '.join(slurmd)}"
        )
        self._inside(
            "nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "--mount", "/bin/sh", "-c", setup
        )
        self._until(lambda: self._daemon(f"slurmd.{node}"), f"slurmd of {node}")
        self._networks[node] = _link(f"/proc/{self._daemon(f'slurmd.{node}')}/ns/net")

    def kill_node(self, node: str) -> None:
        """Power off one node: its slurmd and all that runs there, without a word (isolated mode only)."""
        slurmd = self._daemon(f"slurmd.{node}")
        for pid in [*([] if slurmd is None else [slurmd]), *self.processes(node)]:
            _signal(pid, signal.SIGKILL)

    def _make_namespace(self) -> None:
        lines = ["set -e", "mount -t tmpfs tmpfs /run", "ip link set lo up", "ip link add br0 type bridge"]
        lines += [f"ip addr add {SUBNET}.254/24 dev br0", "ip link set br0 up"]
        for i, node in enumerate(self.nodes):
            lines += [
                f"ip netns add {node}",
                f"ip link add veth{i} type veth peer name eth0 netns {node}",
                f"ip link set veth{i} master br0 up",
                f"ip -n {node} addr add {SUBNET}.{i + 1}/24 dev eth0",
                f"ip -n {node} link set lo up",
                f"ip -n {node} link set eth0 up",
            ]
        # bash as first process: it collects orphans, and ends at end of file (the kernel then ends the rest).
        lines += ["echo ready", "read -r _ || true"]
        flags = ["--net", "--mount", "--pid", "--uts", "--fork", "--kill-child=KILL", "--mount-proc"]
        self._holder = subprocess.Popen(
            ["unshare", *flags, "bash", "-c", "\n".join(lines)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline().strip() != "ready":
            raise RuntimeError("the namespaces for Slurm could not be made")
        self._holder.stdout.close()
        outer = self._holder.pid
        first = Path(f"/proc/{outer}/task/{outer}/children").read_text().strip()
        self._enter = ["nsenter", f"--target={first}", "--net", "--mount", "--pid", "--uts", "--"]

    def _write_configuration(self) -> None:
        for name in ("etc", "log", "run", "state", "munge", "dev"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o700)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        cpus, gpus = self._claims
        kill_wait, grace, requeue = self._seconds
        for i in range(gpus):
            device = self.folder / "dev" / f"nvidia{i}"
            try:
                # A copy of /dev/null: slurmd wants character devices
                os.mknod(device, 0o20666, os.makedev(1, 3))
            except PermissionError:
                device.touch()  # counted all the same, but CUDA_VISIBLE_DEVICES stays unset
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        host = socket.gethostname().split(".")[0]
        controller = f"{SUBNET}.254" if self.isolated else "127.0.0.1"
        ports = [16817, 17001, 17002, 17003, 17004] if self.isolated else _free_ports(1 + len(self.nodes))
        hardware = f"CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=64000"
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node if self.isolated else host}"
            f" NodeAddr={f'{SUBNET}.{i + 1}' if self.isolated else '127.0.0.1'} Port={ports[i + 1]}"
            f" {hardware} Gres=gpu:{gpus} State=UNKNOWN"
            for i, node in enumerate(self.nodes)
        )
        shared = ",".join(self.nodes[:-1])
        self.configuration.write_text(
            f"""ClusterName=test
SlurmctldHost={host}({controller})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# The lifetime of a credential is also the time that a requeued job waits (Slurm's own value: 120 s).
AuthInfo=socket={self.folder}/run/munge.socket,cred_expire={requeue}
CredType=cred/munge
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool.%n
SlurmctldPidFile={self.folder}/run/slurmctld.pid
SlurmdPidFile={self.folder}/run/slurmd.%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/slurmd.%n.log
# No cgroups, no binding, no MPI, no accounting: nothing that one machine could not give to several nodes.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MailProg=/bin/true
KillWait={kill_wait}
OverTimeLimit=0
MinJobAge=3600
InactiveLimit=0
ReturnToService=2
SlurmdTimeout=60
SlurmctldTimeout=30
MessageTimeout=20
# The nodes claim more than the machine has, so that templates are submitted as they are.
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=debug Nodes={shared} Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes={shared} MaxTime=INFINITE DefaultTime=30 PriorityTier=10 PreemptMode=OFF
PartitionName=apart Nodes={self.nodes[-1]} MaxTime=INFINITE DefaultTime=30 PreemptMode=OFF
"""
        )
        etc = self.folder / "etc"
        (etc / "gres.conf").write_text(
            f"NodeName=node[1-{len(self.nodes)}] Name=gpu File={self.folder}/dev/nvidia[0-{gpus - 1}]\n"
        )
        # slurmd loads a cgroup plugin even where none is used, and its own choice needs systemd.
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
        major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
        (etc / "cgroup.conf").write_text(
            f"CgroupPlugin={'disabled' if (major, minor) >= (23, 11) else 'cgroup/v1'}\n"
        )
        hosts = [f"{SUBNET}.{i + 1} {node}" for i, node in enumerate(self.nodes)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, f"{SUBNET}.254 {host}", ""]))

    # --- jobs ----------------------------------------------------------------------------------------------

    def sbatch(
        self, script: str | Path, *options: str, arguments: Sequence[str] = (), environment: Mapping[str, str]
    ) -> int:
        """Submit from a clean environment (nothing of the tests' own leaks in); returns the job id."""
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        return int(self._inside(*command, environment=environment).stdout.strip().split(";")[0])

    def command(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``scontrol``, ``scancel``, ... against this cluster."""
        return self._inside(*command, check=check)

    def show(self, job: int | str) -> dict[str, str]:
        """The fields of ``scontrol show job``; of the first one for an array."""
        line = self._inside("scontrol", "show", "job", "-o", str(job)).stdout.splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def state(self, job: int | str) -> str:
        """``RUNNING``, ``COMPLETED``, ..."""
        return self.show(job)["JobState"]

    def restarts(self, job: int | str) -> int:
        """How often the job was requeued."""
        return int(self.show(job)["Restarts"])

    def wait(self, job: int | str, *states: str, seconds: float) -> str:
        """Wait until the job is in one of ``states``; ``AssertionError`` if it ends otherwise or too late."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if state in ENDED or time.monotonic() > deadline:
                raise AssertionError(f"job {job} is {state}, wanted {' or '.join(states)}: {self.show(job)}")
            time.sleep(0.4)
        return state

    def wait_for(self, condition: Callable[[], object], what: str, *, seconds: float) -> None:
        """Wait for anything; ``AssertionError`` when time is over."""
        try:
            self._until(condition, what, seconds=seconds)
        except TimeoutError as error:
            raise AssertionError(str(error)) from None

    def processes(self, node: str | None = None, *, job: int | None = None) -> list[int]:
        """The pids (seen from here) of all processes of jobs, slurmstepds included, daemons excluded.

        ``node`` limits them to one node, which is its network namespace (isolated mode only); ``job`` to one job,
        without slurmstepds.
        """
        network = None if node is None else self._networks[node]
        return [pid for pid in _pids() if self._is_ours(pid, network, job)]

    def _is_ours(self, pid: int, network: str | None, job: int | None) -> bool:
        environment = _environment(pid)
        if job is not None and environment.get("SLURM_JOB_ID") != str(job):
            return False
        if environment.get("SLURM_CONF") != str(self.configuration):
            return False
        is_step = _command_line(pid).startswith("slurmstepd")
        in_place = network is None or _link(f"/proc/{pid}/ns/net") == network
        return in_place and (is_step or "SLURM_JOB_ID" in environment)

    # --- below ---------------------------------------------------------------------------------------------

    def _inside(
        self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        clean = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        clean |= {"SLURM_CONF": str(self.configuration)} | dict(environment or {})
        # nsenter goes to the root folder of the mount namespace; sbatch remembers where it was called.
        enter = [*self._enter, "env", f"--chdir={os.getcwd()}"] if self._enter else []
        result = subprocess.run(
            [*enter, *command], env=clean, capture_output=True, text=True, timeout=90, check=False
        )
        if check and result.returncode != 0:
            raise subprocess.SubprocessError(
                f"{' '.join(command)}: code {result.returncode}: {result.stderr}{result.stdout}"
            )
        return result

    def _squeue(self, fields: str) -> list[str]:
        return sorted(set(self._inside("squeue", "-h", "-o", fields, check=False).stdout.split()))

    def _idle(self) -> int:
        """How many nodes are idle; a node that is in two partitions counts once."""
        return len(set(self._inside("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.split()))

    def _daemon(self, name: str) -> int | None:
        """A daemon's pid, seen from here; its pid file may hold the one that is seen from inside."""
        program, _, node = name.partition(".")
        start = f"{program} -N {node} " if node else f"{program} "
        for pid in _pids():
            line = _command_line(pid)
            if line.startswith(start) and str(self.folder) in line:
                return pid
        return None

    def _until(self, condition: Callable[[], object], what: str, *, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s for {what}")
            time.sleep(0.1)


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # the process is gone, or is somebody else's
        return ""


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _environment(pid: int) -> dict[str, str]:
    try:
        items = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in items if "=" in item)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended in the meantime, which is what was wanted


def _end(pid: int) -> None:
    """SIGTERM, ten seconds, SIGKILL. A zombie has an empty command line and counts as ended."""
    _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while _command_line(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    if _command_line(pid):
        _signal(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, no two equal."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
