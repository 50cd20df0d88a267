"""What the launcher asked for: strategy, number of processes, precision, devices.

Reads the environment variables that ``accelerate launch`` or ``torchrun`` sets. Several ways to launch with accelerate
silently train in another way than requested: one process instead of two, DDP instead of FSDP2, no DeepSpeed. Each is
recognized by its environment variables, and refused with the command that does what was meant. accelerate itself is not
imported here, so that planning can use this module too; :mod:`lmcore.engine.accelerator` checks what was built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lmcore.config.schema import TrainConfig
from lmcore.conventions import flag
from lmcore.engine import zero
from lmcore.errors import RequestError
from lmcore.model.products import cpu_bf16, has_native_bf16

SEVERAL_ON_CPU = "accelerate launch --config_file accelerate_configs/cpu_2.yaml --num_processes N train_lm.py"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

_DEEPSPEED_FIELDS = (
    "gradient_accumulation_steps", "gradient_clipping", "zero_stage", "mixed_precision", "offload_optimizer_device",
    "offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path", "zero3_save_16bit_model",
)  # fmt: skip
"""Fields of an accelerate configuration that accelerate refuses if the program passes a DeepSpeed configuration."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The strategy that was asked for.

    ``strategy`` is "single", "ddp", "fsdp2", "zero1", "zero2" or "zero3". ``deepspeed`` is the content of the JSON file
    with the launcher's fields merged in (without a file, only stage and offloading), or ``None`` without DeepSpeed.
    """

    strategy: str
    world_size: int
    deepspeed: dict[str, Any] | None = None


def world_size(env: Mapping[str, str]) -> int:
    """``WORLD_SIZE``; 1 without a launcher."""
    return int(env.get("WORLD_SIZE", "1"))


def forced_to_cpu(env: Mapping[str, str]) -> bool:
    """Whether the launcher asked for the CPU even if there is a GPU."""
    return flag(env, "ACCELERATE_USE_CPU")


def request(env: Mapping[str, str], deepspeed: str | None) -> Request:
    """The strategy that the environment asks for.

    Args:
        deepspeed: ``engine.deepspeed``, a JSON file of ``ds_configs/``, or ``None``.

    Raises:
        RequestError: accelerate is known to do something else than this launch requests.
    """
    size = world_size(env)
    if "ACCELERATE_MIXED_PRECISION" in env and "WORLD_SIZE" not in env and "MASTER_PORT" in env:
        # accelerate's simple launcher exports the port when several processes were requested, and then starts only one.
        raise RequestError(
            f"accelerate started one process although several were asked for{launch_file(env)}; it does so for --cpu "
            f"and for distributed_type MULTI_CPU. Use {SEVERAL_ON_CPU}, or for one process unset MASTER_ADDR and "
            "MASTER_PORT"
        )
    for name, value in env.items():
        # accelerate's own parallelism is refused: the tensor parallelism of 1.15 cannot be imported with transformers 5.23,
        # and its context parallelism has no kernel for a CPU.
        split = name.startswith("PARALLELISM_CONFIG_") and name.endswith(("_TP_SIZE", "_CP_SIZE", "_SP_SIZE"))
        if split and value not in ("", "1"):
            instead = "not supported: remove it there; FSDP2 or ZeRO-3 shard a model over the devices"
            for ending, option in (("_CP_SIZE", "context_parallel"), ("_TP_SIZE", "tensor_parallel")):
                if name.endswith(ending):
                    instead = f"remove it there and use --train.{option} {value}"
            raise RequestError(f"{name}={value}{launch_file(env)}: {instead}")
    with_fsdp = flag(env, "ACCELERATE_USE_FSDP")
    with_deepspeed = deepspeed is not None or flag(env, "ACCELERATE_USE_DEEPSPEED")
    if with_fsdp and with_deepspeed:
        raise RequestError("FSDP2 (by the launcher) and DeepSpeed (by engine.deepspeed) exclude each other")
    if with_deepspeed:
        if forced_to_cpu(env):
            raise RequestError(
                "DeepSpeed is silently dropped with --cpu or ACCELERATE_USE_CPU: leave them out; "
                "to keep a run off the GPU set CUDA_VISIBLE_DEVICES=-1"
            )
        content = zero.read(env, deepspeed)
        fields = [
            name
            for name in env.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
            if name in _DEEPSPEED_FIELDS
        ]
        if fields:  # accelerate would raise later, and name neither the file nor the field
            stage = content["zero_optimization"]["stage"]
            raise RequestError(
                f"the launcher sets {', '.join(fields)} of DeepSpeed{launch_file(env)}, which a run sets itself: "
                f"{remedy(f'zero{stage}')}"
            )
        return Request(
            strategy=f"zero{content['zero_optimization']['stage']}", world_size=size, deepspeed=content
        )
    if with_fsdp:
        version = env.get("FSDP_VERSION", "1")
        if version != "2":
            raise RequestError(
                f"FSDP version {version} (accelerate's default) was asked for{launch_file(env)}: {remedy('fsdp2')}"
            )
        if flag(env, "FSDP_ACTIVATION_CHECKPOINTING"):
            raise RequestError(
                "fsdp_activation_checkpointing draws other dropout masks when it recomputes: "
                "use --train.activation_checkpointing true"
            )
        return Request(strategy="fsdp2", world_size=size)
    return Request(strategy="ddp" if size > 1 else "single", world_size=size)


def resolve_precision(asked: str, env: Mapping[str, str], *, cuda: bool) -> str:
    """The precision to run in: "fp32", "bf16" or "fp16".

    Args:
        asked: ``train.precision``; "auto" is the launcher's precision if it sets one, else bf16 on GPUs
            and CPUs with hardware support for it (:mod:`lmcore.model.products`), else fp32.
        cuda: whether the run uses GPUs.

    Raises:
        RequestError: the precision is unknown or untested, differs from the launcher's, or is not available on this
            device.
    """
    launched = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if "fp8" in (asked, launched):
        raise RequestError(
            "fp8 is not supported: its layers are replaced by other libraries, and no such run has been tested. "
            "Use --train.precision bf16"
        )
    if asked not in PRECISIONS:
        raise RequestError(f"unknown train.precision {asked!r}; choose from {', '.join(PRECISIONS)}")
    if asked == "auto" and launched == "no":
        return "bf16" if (has_native_bf16() if cuda else cpu_bf16()) else "fp32"
    if asked == "auto":
        asked = launched
    elif launched not in ("no", asked):
        raise RequestError(
            f"the launcher says mixed_precision {launched!r}{launch_file(env)} but the run says train.precision "
            f"{asked!r}: remove mixed_precision there, or pass --train.precision {launched}, or launch with "
            f"--config_file accelerate_configs/{'gpu' if cuda else 'cpu'}.yaml"
        )
    if asked == "fp16" and not cuda:
        raise RequestError(
            "fp16 needs a GPU (on a CPU accelerate would silently train in fp32): use bf16 or fp32"
        )
    return asked


def residual_dtype(asked: str, *, strategy: str, precision: str, param_dtype: str, cuda: bool) -> str:
    """The dtype of the residual stream, the sum that embedding and layers add to: "fp32", "bf16" or "fp16".

    Args:
        asked: ``train.residual_dtype``. If the weights used in the computation have 16 bits (FSDP2, ZeRO, bf16 weights), the
            residual stream has the same dtype. Autocast over fp32 weights (one process, DDP) leaves the embeddings in fp32,
            and every addition and norm then moves 4 bytes per element; with bf16 autocast "auto" casts them to bf16 on GPUs.
            On a CPU it does not, so that losses do not change from earlier versions.

    Raises:
        RequestError: not available at this precision or under this strategy.

    Example::

        residual_dtype("auto", strategy="ddp", precision="bf16", param_dtype="fp32", cuda=True)   # "bf16"
    """
    by_autocast = strategy in ("single", "ddp") and param_dtype == "fp32"
    if precision == "bf16" and by_autocast:
        return ("bf16" if cuda else "fp32") if asked == "auto" else asked
    # With fp16 autocast it stays in fp32: sums over many layers may leave fp16's range.
    found = "fp32" if precision == "fp32" or by_autocast else precision
    if asked not in ("auto", found):
        cause = f"train.precision {precision}" if by_autocast else f"{strategy} with weights in {precision}"
        raise RequestError(f"train.residual_dtype {asked}: it is {found} with {cause}; leave it out")
    return found


def check_param_dtype(param_dtype: str, strategy: str) -> None:
    """Refuse 16-bit weights (``RequestError``) under a strategy that keeps fp32 weights itself."""
    if param_dtype != "fp32" and strategy not in ("single", "ddp"):
        raise RequestError(
            f"train.param_dtype {param_dtype} has no meaning under {strategy}, which keeps fp32 weights for the "
            "optimizer and computes in a copy: leave it out"
        )


def describe_precision(asked: str, precision: str, *, cuda: bool) -> str:
    """The precision in words: with the reason if it was chosen automatically, and that it is slow where it is emulated."""
    if precision != "bf16" or cuda:
        return precision
    if not cpu_bf16():
        return "bf16 (this CPU has no instructions for it: --train.precision fp32 is faster)"
    return (
        f"bf16 (this CPU has {cpu_bf16()}; --train.precision fp32 for fp32)" if asked == "auto" else precision
    )


def uses_cuda(env: Mapping[str, str]) -> bool:
    """Whether the run computes on GPUs.

    Raises:
        RequestError: there are GPUs that torch cannot use, or fewer GPUs than processes.
    """
    if forced_to_cpu(env):
        return False
    if not torch.cuda.is_available():
        check_unusable_gpu(env)
        return False
    here, gpus = int(env.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        nodes = max(1, world_size(env) // here)
        raise RequestError(
            f"{here} processes were started on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''} (one process "
            f"for each): pass --num_processes {gpus * nodes} to accelerate launch (the files of accelerate_configs/ "
            "say 8), or --nproc_per_node to torchrun"
        )
    return True


def check_unusable_gpu(env: Mapping[str, str]) -> None:
    """Refuse to train on the CPU if there is an NVIDIA GPU that this torch cannot use.

    Raises:
        RequestError: there is one; the message gives the cause, and how to train on the CPU anyway.
    """
    hidden = env.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (hidden.strip() == "" or hidden.strip().startswith("-1")):
        return  # GPUs are hidden on purpose
    driver = _nvidia_driver()
    if driver is None:
        return
    if torch.version.cuda is None:
        cause = f"torch {torch.__version__} is built for the CPU: pip uninstall torch, then pip install torch"
    elif hidden is not None:
        cause = f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it or name a GPU that exists"
    else:
        cause = (
            f"torch {torch.__version__} needs a newer driver for CUDA {torch.version.cuda} (or the GPU is in use or "
            "broken: see nvidia-smi): update the driver, or install a torch for an older CUDA from download.pytorch.org"
        )
    raise RequestError(
        f"this machine has an NVIDIA GPU (driver {driver}) but torch cannot use it. {cause}. To train on the CPU "
        "instead: CUDA_VISIBLE_DEVICES=-1, or accelerate launch --config_file accelerate_configs/cpu.yaml"
    )


def _nvidia_driver() -> str | None:
    """The driver version if this machine has an NVIDIA GPU according to nvidia-smi ("unknown" if it fails), else ``None``."""
    smi = shutil.which("nvidia-smi")
    devices = any(Path("/dev").glob("nvidia[0-9]*"))
    if smi is None:
        return "unknown" if devices else None
    try:
        said = subprocess.run(
            [smi, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown" if devices else None
    lines = said.stdout.strip().splitlines()
    if said.returncode != 0 or not lines or "no devices" in said.stdout.lower():
        return "unknown" if devices else None
    return lines[0].strip()


def fill_in_mesh(env: MutableMapping[str, str]) -> tuple[int, int] | None:
    """HSDP's two sizes (replicas, shards), adapted to the number of processes; ``None`` if no mesh was requested.

    accelerate refuses a mesh whose product is not the number of processes, so that a file for two nodes would fail on
    four. If the sizes do not match, weights are sharded over the processes of a node and replicated over the nodes, and
    the environment variables are changed accordingly.
    """
    if not flag(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return None
    replicate, shard = "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE"
    sizes = int(env.get(replicate) or 1), int(env.get(shard) or 1)
    here, all_of_them = int(env.get("LOCAL_WORLD_SIZE") or 1), world_size(env)
    if sizes[0] * sizes[1] != all_of_them and all_of_them % here == 0:
        sizes = all_of_them // here, here
        env[replicate], env[shard] = str(sizes[0]), str(sizes[1])
    return sizes


def check_compile(env: Mapping[str, str]) -> None:
    """Refuse the launcher's compile flags, which only some strategies follow; the run has its own option."""
    launched = env.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if launched.upper() != "NO":
        raise RequestError(
            f"the launcher says dynamo_backend {launched!r}{launch_file(env)}, which DeepSpeed runs would silently drop: "
            "remove it there and use --train.compile true instead"
        )


def compiles(asked: bool | str, *, cuda: bool) -> tuple[bool, str]:
    """Whether layers are compiled, and one line that says so or why not.

    Args:
        asked: ``train.compile``: true, false or "auto", which compiles on GPUs if a compiler and Python's header files are
            installed. On a CPU compiling takes longer than most runs there.

    Raises:
        RequestError: it was set to true, but the compiler or the header files are missing.
    """
    if asked == "auto" and not cuda:
        return False, "off on a CPU (train.compile auto)"
    if asked and cpp_compiler() is None:
        if asked == "auto":
            return False, "off: no C++ compiler found (apt install g++ makes training faster)"
        raise RequestError(
            "train.compile needs a C++ compiler, and neither CXX nor g++, c++ or clang++ was found: install one (apt install "
            "g++), or use --train.compile false"
        )
    if asked and not python_header().exists():  # kernel launchers are compiled against it
        if asked == "auto":
            return False, "off: no Python.h found (apt install python3-dev makes training faster)"
        raise RequestError(
            f"train.compile needs Python's header files, and {python_header()} does not exist: install them (apt install "
            "python3-dev), or use --train.compile false"
        )
    if not asked:
        return False, "off"
    row = "layer by layer; the first step compiles, which takes up to minutes; later starts find it cached"
    return True, row


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would use: ``CXX``, g++, c++ or clang++; ``None`` if there is none."""
    names = [name for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name]
    return next((path for name in names if (path := shutil.which(name))), None)


def python_header() -> Path:
    """Where torch.compile needs Python's main header file."""
    return Path(sysconfig.get_paths()["include"], "Python.h")


def check_accumulation(env: Mapping[str, str], asked: int) -> None:
    """Refuse (``RequestError``) a gradient accumulation of the launcher that differs from the run's."""
    launched = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if launched.isdecimal() and len(launched) < 10 and int(launched) not in (1, asked):
        raise RequestError(
            f"the launcher says gradient_accumulation_steps {launched}{launch_file(env)} but the run's batch sizes give "
            f"{asked}: remove it there; accumulation follows from train.global_batch_blocks"
        )


def check_groups(train: TrainConfig, world_size: int, strategy: str) -> None:
    """Raises ``RequestError`` if the processes cannot form the groups of context and tensor parallelism."""
    if train.tensor_parallel > 1 and strategy.startswith("zero"):
        raise RequestError(
            f"train.tensor_parallel {train.tensor_parallel} under {strategy}: DeepSpeed does not know of the groups; use "
            "accelerate_configs/fsdp2.yaml or ddp.yaml instead"
        )
    for name, size in (
        ("context_parallel", train.context_parallel),
        ("tensor_parallel", train.tensor_parallel),
    ):
        if world_size % size:
            raise RequestError(
                f"train.{name} {size} does not divide the number of processes ({world_size}): start a multiple of {size} "
                f"processes with --num_processes, or use --train.{name} 1"
            )


def launch_file(env: Mapping[str, str]) -> str:
    """`` (in FILE)`` for messages: the configuration that ``accelerate launch`` read, or an empty string if unknown.

    It is the launcher's ``--config_file``, or the saved answers to ``accelerate config``, which ``accelerate launch`` uses
    without ``--config_file``.
    """
    if "ACCELERATE_MIXED_PRECISION" not in env:
        return ""  # not started by accelerate
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        words = []
    for index, word in enumerate(words):
        if word.startswith("--config_file"):
            name = word.partition("=")[2] or "".join(words[index + 1 : index + 2])
            return f" (in {name})"
    path = default_config(env)
    return "" if path is None else f" (in {path}, the answers to `accelerate config`)"


def default_config(env: Mapping[str, str]) -> Path | None:
    """The file with the saved answers to ``accelerate config``, if it exists."""
    cache = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    for suffix in ("json", "yaml"):  # accelerate's own order
        path = Path(os.path.expanduser(cache), "accelerate", f"default_config.{suffix}")
        if path.is_file():
            return path
    return None


def remedy(strategy: str) -> str:
    """The command that starts this strategy, for messages."""
    return f"use accelerate launch --config_file accelerate_configs/{strategy}.yaml train_lm.py"
