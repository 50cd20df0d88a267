"""What memory is left, wherever it is limited; and whether a process is alive."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lmcore import process

MIB = 2**20


def fake_groups(folder: Path, cgroup: str, mounts: list[str]) -> Path:
    """A /proc/self with these two files."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text("\n".join(mounts) + "\n")
    return proc


def group_v2(folder: Path, limit: int | str, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cache}\ninactive_file {cache}\n")


def group_v1(folder: Path, limit: int, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache {cache}\ntotal_inactive_file {cache}\n")


def test_available_memory_is_at_most_the_machines_and_at_least_zero() -> None:
    available = process.available_bytes()
    assert available is not None
    assert 0 < available <= psutil.virtual_memory().total


def test_available_memory_asks_the_jobs_own_group_of_cgroup_v2(tmp_path: Path) -> None:
    """Slurm's limit stands in a group below the root, and the least of all groups on the way counts."""
    top = tmp_path / "sys"
    mount = f"31 23 0:28 / {top} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
    proc = fake_groups(tmp_path, "0::/slurm/job_7/step_0\n", [mount])
    group_v2(top / "slurm" / "job_7" / "step_0", "max", 10 * MIB)
    group_v2(top / "slurm" / "job_7", 64 * MIB, 50 * MIB, cache=6 * MIB)
    group_v2(top / "slurm", 900 * MIB, 0)
    assert process.available_bytes(proc) == 20 * MIB
    group_v2(top / "slurm" / "job_7" / "step_0", 8 * MIB, 10 * MIB)
    assert process.available_bytes(proc) == 0


def test_available_memory_asks_cgroup_v1(tmp_path: Path) -> None:
    top = tmp_path / "memory"
    mounts = [
        f"34 31 0:31 / {tmp_path}/cpuset rw - cgroup cgroup rw,cpuset",
        f"35 31 0:32 / {top} rw,relatime - cgroup cgroup rw,memory",
    ]
    proc = fake_groups(tmp_path, "5:cpuset:/\n4:memory:/job/a\n0::/\n", mounts)
    group_v1(top, 2**63 - 4096, 500 * MIB)  # the root's: no limit
    group_v1(top / "job" / "a", 32 * MIB, 30 * MIB, cache=10 * MIB)
    assert process.available_bytes(proc) == 12 * MIB


def test_available_memory_inside_a_container_that_sees_part_of_the_tree(tmp_path: Path) -> None:
    top = tmp_path / "sys"
    proc = fake_groups(tmp_path, "0::/docker/abc\n", [f"31 23 0:28 /docker/abc {top} ro - cgroup2 cgroup rw"])
    group_v2(top, 16 * MIB, 9 * MIB)
    assert process.available_bytes(proc) == 7 * MIB


def test_available_memory_without_control_groups_is_the_machines(tmp_path: Path) -> None:
    assert process.available_bytes(tmp_path / "none") is not None


def test_available_memory_knows_ulimit_v() -> None:
    used = psutil.Process().memory_info().vms
    limit = used + 256 * MIB
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
        "from lmcore.process import available_bytes\n"
        f"assert 0 <= available_bytes() < {limit}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak can be reset on Linux only")
def test_peak_memory_counts_from_the_reset() -> None:
    assert process.forget_peak()
    before = process.resident_bytes(peak=True)
    with mmap.mmap(
        -1, 64 * MIB
    ) as block:  # pages of its own: the heap may have as much that is free and resident
        block.write(b"x" * MIB * 64)
    assert process.resident_bytes(peak=True) - before > 48 * MIB
    assert process.resident_bytes() < process.resident_bytes(peak=True)


def test_dead_processes_and_zombies_are_not_alive() -> None:
    assert process.is_alive(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not process.is_alive(child.pid), "ended, but not waited for"
    child.wait()
    assert not process.is_alive(child.pid)
    assert not process.is_alive(0)
    assert not process.is_alive(-1)


def test_command_line_above_is_that_of_the_process_that_was_given_the_script() -> None:
    own = "from lmcore import process; print(process.command_line_above('train.py'), process.command_line_above('no.py'))"
    between = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {own!r}], check=True)"
    above = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {between!r}], check=True)"
    command = [sys.executable, "-c", above, "--file", "a b.yaml"]
    done = subprocess.run([*command, "train.py", "--seed", "1"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{command} []\n"
