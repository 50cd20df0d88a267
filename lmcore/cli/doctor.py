"""``lmcore doctor``: check this machine and name the remedy for each problem.

It changes nothing and needs neither a GPU nor a network. A check that cannot be made reports this instead of failing.

    >>> for finding in examine():
    ...     print(finding.line())
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, final

from lmcore.cli.saved import Parser
from lmcore.errors import EXIT_FINISHED
from lmcore.process import available_bytes

GIB = 2**30
FLOORS = {  # package -> (lowest version, why)
    "torch": ("2.11", "an unsafe loader was fixed in 2.10; Muon and the fused CPU AdamW"),
    "transformers": ("5.3", "CVE-2026-4372 is fixed in 5.3"),
    "accelerate": ("1.15", "FSDP2 with tied embeddings"),
    "deepspeed": ("0.19.6", ""),
    "sentencepiece": ("0.2.1", ""),
    "safetensors": ("0.4", ""),
}


@final
@dataclass(frozen=True)
class Finding:
    """The result of a check. ``state``: ``ok``, ``note`` (information), ``warn`` (may cause problems), ``bad`` (will not work)."""

    state: Literal["ok", "note", "warn", "bad"]
    name: str
    value: str
    remedy: str = ""

    def line(self) -> str:
        """The finding as one line of text."""
        mark = {"ok": "ok  ", "note": "note", "warn": "WARN", "bad": "BAD "}[self.state]
        return f"{mark}  {self.name:<22} {self.value}" + (f"\n      -> {self.remedy}" if self.remedy else "")


EXIT_COMPLAINTS = 1
"""Exit code if ``doctor`` has found something that will not work."""


def doctor(words: list[str]) -> int:
    """Check this machine and name the remedy for each problem."""
    parser = Parser(prog="lmcore doctor")
    parser.add_argument("folder", nargs="?", default=".", help="where runs will be written")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    found = examine(asked.folder)
    if asked.json:
        print(json.dumps([vars(one) for one in found], indent=2))
    else:
        print("\n".join(one.line() for one in found))
    return EXIT_COMPLAINTS if any(one.state == "bad" for one in found) else EXIT_FINISHED


def examine(folder: str | os.PathLike[str] = ".") -> list[Finding]:
    """All findings; ``folder`` is the folder for runs and token stores."""
    checks: list[Callable[[Path], Iterator[Finding]]] = [
        _python, _packages, _gpu, _distributed, _compilers, _processor, _memory, _disk, _limits, _launcher,
    ]  # fmt: skip
    found: list[Finding] = []
    for check in checks:
        try:
            found += check(Path(folder))
        # A broken installation may raise anything; the other checks are still useful.
        except Exception as error:
            name = check.__name__.removeprefix("_")
            found.append(Finding("warn", name, f"could not be checked: {type(error).__name__}: {error}"))
    return found


def _python(folder: Path) -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    yield Finding(
        "ok" if good else "bad",
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.release()}",
        "" if good else "lmcore needs Python 3.11 or newer",
    )
    if platform.system() != "Linux":
        yield Finding(
            "warn", "system", platform.system(), "Linux is tested; macOS may work, Windows does not"
        )
    coding = (sys.stdout.encoding or "").lower().replace("-", "")
    if coding != "utf8":
        yield Finding("warn", "encoding", coding or "unknown", "export PYTHONUTF8=1, or text may not print")


def _packages(folder: Path) -> Iterator[Finding]:
    for package, (floor, why) in FLOORS.items():
        try:
            have = version(package)
        except PackageNotFoundError:
            if package == "deepspeed":
                remedy = "only ZeRO needs it: pip install 'lmcore[deepspeed]'"
                yield Finding("note", package, "not installed", remedy)
                continue
            yield Finding("bad", package, "not installed", "pip install -r requirements.txt")
            continue
        if _numbers(have) < _numbers(floor):
            yield Finding("bad", package, f"{have}, older than {floor}", f"pip install -U {package}  # {why}")
        else:
            yield Finding("ok", package, have)
    for package, what in (("tensorboard", "curves in TensorBoard"), ("matplotlib", "report.html")):
        if importlib.util.find_spec(package) is None:
            yield Finding("warn", package, "not installed", f"pip install {package}  # for {what}")


def _gpu(folder: Path) -> Iterator[Finding]:
    import torch

    from lmcore.engine.launch import has_native_bf16

    driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    built = torch.version.cuda or (f"ROCm {torch.version.hip}" if torch.version.hip else None)
    if not torch.cuda.is_available():
        if driver and built is None:
            remedy = "this torch is built for the CPU: pip uninstall torch, then pip install torch"
            yield Finding("bad", "GPU", f"driver {driver.splitlines()[0]}, torch without CUDA", remedy)
        elif driver:
            remedy = (
                f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}: unset it"
                if "CUDA_VISIBLE_DEVICES" in os.environ
                else f"the driver is too old for CUDA {built}: update it, or install an older torch"
            )
            yield Finding("bad", "GPU", f"driver {driver.splitlines()[0]}, torch cannot use it", remedy)
        else:
            yield Finding("note", "GPU", "none: training runs on the CPU")
        return
    yield Finding("ok", "CUDA", f"{built}, driver {driver.splitlines()[0] if driver else 'unknown'}")
    built_for = [int(re.sub(r"\D", "", name)) for name in torch.cuda.get_arch_list()]
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"GPU {index}", f"{one.name}, {one.total_memory / GIB:.0f} GiB")
        # A build for a compute capability also runs on newer minor versions, but not on GPUs that are older or newer than
        # all capabilities it was built for.
        if built_for and not min(built_for) <= 10 * one.major + one.minor <= max(built_for) + 9:
            value = f"compute capability {one.major}.{one.minor}, torch is built for {built_for}"
            yield Finding("bad", f"GPU {index}", value, "install another build of torch")
    bf16 = has_native_bf16()
    remedy = (
        "train.precision auto takes fp32 here; fp16 is faster: --train.precision fp16" if not bf16 else ""
    )
    yield Finding("ok" if bf16 else "warn", "bf16", "supported" if bf16 else "not supported", remedy)
    free, total = torch.cuda.mem_get_info()
    if free < 0.9 * total:
        yield Finding("warn", "GPU memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
                      "another process is on the GPU: nvidia-smi shows it")  # fmt: skip


def _distributed(folder: Path) -> Iterator[Finding]:
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("bad", "torch.distributed", "not built in", "install another build of torch")
        return
    backends = [name for name in ("nccl", "gloo") if getattr(dist, f"is_{name}_available")()]
    import torch

    if torch.cuda.is_available():
        if "nccl" not in backends:
            yield Finding(
                "bad", "NCCL", "not built in", "several GPUs need it: install another build of torch"
            )
        else:
            yield Finding("ok", "NCCL", ".".join(str(part) for part in torch.cuda.nccl.version()))
    yield Finding("ok", "backends", ", ".join(backends))


def _compilers(folder: Path) -> Iterator[Finding]:
    """The tools with which torch.compile and DeepSpeed's native operators are built at run time."""
    from lmcore.engine.launch import cpp_compiler, python_header

    compiler = cpp_compiler()
    if compiler is None:
        yield Finding("warn", "C++ compiler", "none", "train.compile and DeepSpeed's CPU Adam need g++")
    elif not python_header().exists():
        yield Finding("warn", "Python.h", "missing", "train.compile needs it: apt-get install python3-dev")
    else:
        yield Finding("ok", "C++ compiler", compiler)
    if importlib.util.find_spec("deepspeed") is None:
        return
    ninja = shutil.which("ninja") or shutil.which("ninja", path=os.path.dirname(sys.executable))
    if ninja is None:
        yield Finding("warn", "DeepSpeed operators", "no ninja", "pip install ninja")
    else:
        yield Finding("ok", "DeepSpeed operators", f"built when first used, with {ninja}")
    import torch

    if torch.cuda.is_available():
        nvcc = shutil.which("nvcc") or shutil.which(
            "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
        )
        if nvcc is None:
            yield Finding(
                "note", "nvcc", "none", "only DeepSpeed's own GPU kernels need it; lmcore's ZeRO does not"
            )


def _processor(folder: Path) -> Iterator[Finding]:
    usable, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if usable < all_cores:
        job = "SLURM_JOB_ID" in os.environ
        remedy = "ask for more: --cpus-per-task (and export SRUN_CPUS_PER_TASK)" if job else "see taskset"
        state: Literal["warn", "note"] = "warn" if usable == 1 else "note"
        yield Finding(state, "cores", f"{usable} of {all_cores} may be used", remedy)
    else:
        yield Finding("ok", "cores", str(usable))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads == "1" and usable > 2:
        remedy = "accelerate launch sets 1 for several processes; for one process unset it"
        yield Finding("note", "OMP_NUM_THREADS", "1", remedy)


def _memory(folder: Path) -> Iterator[Finding]:
    available = available_bytes()
    if available is None:
        yield Finding("note", "memory", "free memory is not known on this system")
        return
    low = available < 2 * GIB
    remedy = "a small model only; close other programs or ask the batch system for more" if low else ""
    yield Finding("warn" if low else "ok", "memory", f"{available / GIB:.1f} GiB available", remedy)
    shared = shutil.disk_usage("/dev/shm").free
    if shared < GIB:
        remedy = "data.workers and NCCL use it: docker run --shm-size 8g (or --ipc host)"
        yield Finding("warn", "/dev/shm", f"{shared / GIB:.2f} GiB free", remedy)


def _disk(folder: Path) -> Iterator[Finding]:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    usage, nodes = shutil.disk_usage(place), os.statvfs(place)
    low = usage.free < 10 * GIB
    remedy = "a checkpoint takes about 12 bytes a parameter, and checkpoint.keep of them stay" if low else ""
    yield Finding("warn" if low else "ok", "disk", f"{usage.free / GIB:.1f} GiB free at {place}", remedy)
    if not os.access(place, os.W_OK):
        yield Finding(
            "bad", "disk", f"{place} cannot be written", "choose another --run_dir and data.store_dir"
        )
    if nodes.f_files and nodes.f_favail < 10_000:
        yield Finding(
            "warn", "files", f"{nodes.f_favail:,} more files fit", "the quota of files is nearly used up"
        )
    kind = _file_system(place)
    if kind.startswith(("nfs", "fuse", "cifs", "9p")):
        remedy = "fine for checkpoints; put data.store_dir on a local disk if data.wait grows"
        yield Finding("note", "file system", kind, remedy)


def _limits(folder: Path) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        remedy = f"ulimit -n {min(hard, 65536)}"
        if hard <= soft:
            remedy = "the hard limit is no higher: root can raise it; docker run --ulimit nofile=65536"
        yield Finding("warn", "open files", f"at most {soft}", remedy)
    else:
        yield Finding("ok", "open files", f"at most {soft:,}")
    core, _ = resource.getrlimit(resource.RLIMIT_AS)
    if core != resource.RLIM_INFINITY:
        yield Finding(
            "warn", "address space", f"{core / GIB:.1f} GiB", "ulimit -v unlimited: CUDA maps much more"
        )


def _launcher(folder: Path) -> Iterator[Finding]:
    from lmcore.engine.launch import default_config
    from lmcore.engine.launcher import why_unreadable

    default = default_config(os.environ)
    if default is not None:
        remedy = "accelerate launch takes it unless --config_file is given: see accelerate_configs/"
        yield Finding("note", "accelerate config", f"{default} exists", remedy)
        if (reason := why_unreadable(default)) is not None:
            remedy = f"remove {default}, or give --config_file, or start with lmcore train"
            yield Finding("warn", "accelerate config", f"accelerate launch cannot read it: {reason}", remedy)
    strange = sorted(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "DEEPSPEED_")))
    if strange:
        yield Finding(
            "note", "environment", ", ".join(strange), "these decide the strategy; unset what is old"
        )
    if "SLURM_JOB_ID" in os.environ and "SLURM_JOB_END_TIME" not in os.environ:
        yield Finding(
            "note", "Slurm", "no SLURM_JOB_END_TIME", "the deadline is unknown: give train.max_minutes"
        )


# ---- small helpers


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _file_system(place: Path) -> str:
    """The type of the file system of ``place``, which is that of the longest mount point above it."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        point, name = line.split()[1:3]
        point = point.replace("\\040", " ")
        inside = str(place) == point or str(place).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind
