"""DeepSpeed's configuration: one dictionary with every value given explicitly, so that nothing is guessed.

It is built from a JSON file of ``ds_configs/`` (or the launcher's fields) and the options of the run. A value of the file
that contradicts the run is an error that shows both; ``"auto"`` and missing values are filled in from the run. Gradients
are accumulated and reduced in fp32 unless the run says otherwise. It has no optimizer and no scheduler: the run has
its own.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lmcore.conventions import deepspeed_file
from lmcore.errors import RequestError

ELEMENTWISE = ("Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax")
"""Optimizers whose update of an element depends only on that element's own gradient and state. ZeRO flattens the parameters
and cuts them anywhere, which works with no other optimizers."""


def memory_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The memory settings of a configuration under the names of :class:`lmcore.plan.plan.Setting`, with DeepSpeed's defaults."""
    section = content["zero_optimization"]
    bucket, live = section.get("reduce_bucket_size"), section.get("stage3_max_live_parameters")
    settings: dict[str, Any] = {
        "zero_overlap": bool(section.get("overlap_comm", section["stage"] == 3)),
        "offload_optimizer": (section.get("offload_optimizer") or {}).get("device", "none") != "none",
        "offload_weights": (section.get("offload_param") or {}).get("device", "none") != "none",
    }
    settings |= {"zero_bucket": int(bucket)} if isinstance(bucket, (int, float)) else {}
    return settings | ({"zero_live": int(live)} if isinstance(live, (int, float)) else {})


def read(env: Mapping[str, str], path: str | None) -> dict[str, Any]:
    """The content of the JSON file that the run or the launcher names, or the launcher's own fields.

    Raises:
        RequestError: no such file, invalid JSON, two different files, a stage other than 1, 2 or 3, no gradient norm, or a
            section for an optimizer or a scheduler.
    """
    launched = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    launched = "" if launched.lower() == "none" else launched
    if path and launched and deepspeed_file(path).resolve() != deepspeed_file(launched).resolve():
        raise RequestError(f"engine.deepspeed is {path} but the launcher says {launched}: name one of them")
    path = path or launched
    content: dict[str, Any] = {}
    if path:
        try:
            content = json.loads(deepspeed_file(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"engine.deepspeed {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise RequestError(f"engine.deepspeed {path} is not valid JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
            raise RequestError(
                f"engine.deepspeed {path} must be a JSON object, and its zero_optimization too, as DeepSpeed has them"
            )
    section = content.setdefault("zero_optimization", {})
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if stage.isdecimal() and len(stage) < 10:
        if int(stage) != section.setdefault("stage", int(stage)):
            raise RequestError(f"the launcher says zero_stage {stage} but {path} says {section['stage']}")
    elif not path:
        section["stage"] = 2  # accelerate's own default
    if section.get("stage") not in (1, 2, 3):
        raise RequestError(
            f"{path}: zero_optimization.stage is {section.get('stage')}: use 1, 2 or 3 (0 is DDP: leave DeepSpeed out)"
        )
    if section.get("compute_grad_norm", True) is not True:
        raise RequestError(
            f"{path}: zero_optimization.compute_grad_norm is {section['compute_grad_norm']}: remove it; the run needs the "
            "norm of every step, to log it and to find faults"
        )
    for part in ("optimizer", "param"):
        device = env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none").lower()
        if device != "none" and not path:
            section[f"offload_{part}"] = {"device": device}
    for part in ("optimizer", "scheduler"):
        if part in content:
            raise RequestError(
                f"{path} has a section {part!r}: remove it; the run sets optim.name and optim.schedule"
            )
    return content


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer updates each element from that element's own gradient and state only."""
    return type(optimizer).__name__ in ELEMENTWISE or getattr(optimizer, "elementwise", False)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that needs whole matrices (``RequestError``)."""
    if not is_elementwise(optimizer):
        raise RequestError(
            f"{type(optimizer).__name__} does not work under ZeRO, which flattens and cuts the matrices that it needs "
            "whole: use adamw, adam or sgd, or DDP or FSDP2 (an elementwise optimizer of your own has an attribute elementwise = True)"
        )


def offloads(content: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state is offloaded to the host."""
    return _offload_device(content) != "none"


def _offload_device(content: Mapping[str, Any]) -> str:
    return str((content["zero_optimization"].get("offload_optimizer") or {}).get("device", "none"))


def check_compiler(content: Mapping[str, Any]) -> None:
    """Refuse offloading (``RequestError``) if a tool is missing with which DeepSpeed compiles its CPU Adam at first use."""
    if not offloads(content) or content.get("zero_force_ds_cpu_optimizer", True) is False:
        return
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise RequestError(
            f"offload_optimizer compiles DeepSpeed's CPU Adam and needs {' and '.join(missing)}: install them "
            '(apt install g++; pip install ninja) or set "zero_force_ds_cpu_optimizer": false (slower)'
        )


def base_config(content: Mapping[str, Any], *, precision: str, reduce_dtype: str) -> dict[str, Any]:
    """The configuration as far as it is known when the process group is created: everything but the batch."""
    config = copy.deepcopy(dict(content))
    for name in ("bf16", "fp16"):
        section = dict(config.get(name) or {})
        _agree(section, "enabled", precision == name, f"{name}.enabled", "train.precision")
        config[name] = section
    config["bf16"].setdefault("check_grad_overflow", True)  # a non-finite gradient is never applied
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    _agree(config, "communication_data_type", reduce_dtype, "communication_data_type", "engine.reduce_dtype")
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
        # Filled in by batch_config; accelerate would set a missing accumulation to 1
        config.setdefault(name, "auto")
    config.setdefault("gradient_clipping", "auto")
    section = config["zero_optimization"]
    section.setdefault("stage3_gather_16bit_weights_on_model_save", False)
    section.setdefault("contiguous_gradients", True)
    section.setdefault("overlap_comm", True)
    config["zero_allow_untested_optimizer"] = True
    config.setdefault("wall_clock_breakdown", False)
    return config


def batch_config(
    config: dict[str, Any], *, micro_batch_blocks: int, accumulation: int, world_size: int, clip_norm: float
) -> None:
    """Fill in, in place, the batch sizes and the clipping norm, which are known later than the rest."""
    micro = "train.micro_batch_blocks"
    _agree(
        config, "train_micro_batch_size_per_gpu", micro_batch_blocks, "train_micro_batch_size_per_gpu", micro
    )
    _agree(
        config,
        "gradient_accumulation_steps",
        accumulation,
        "gradient_accumulation_steps",
        "accumulation (global_batch_blocks / world size / micro_batch_blocks)",
    )
    total = micro_batch_blocks * accumulation * world_size
    _agree(config, "train_batch_size", total, "train_batch_size", "train.global_batch_blocks")
    _agree(config, "gradient_clipping", float(clip_norm), "gradient_clipping", "optim.clip_norm")


def set_accumulation(engine: Any, accumulation: int) -> None:
    """Set DeepSpeed's number of micro-batches per step.

    Its own ``set_train_batch_size`` does not update the optimizer, which uses the number when it offloads.
    """
    engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * accumulation * engine.dp_world_size)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = accumulation


def _agree(section: dict[str, Any], key: str, value: Any, name: str, option: str) -> None:
    """Set the run's value if the file has none or "auto"; refuse a different value."""
    found = section.get(key, "auto")
    if found != "auto" and found != value:
        raise RequestError(
            f"the DeepSpeed configuration says {name} {found!r} but the run's {option} gives {value!r}: "
            'write "auto" there or change the run'
        )
    section[key] = value


def quiet_deepspeed(device_is_cpu: bool) -> None:
    """Import DeepSpeed without its log messages, and on a CPU without compiling an operator."""
    if device_is_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # seconds, and only these strategies need it

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device_is_cpu:
        # The shared memory operator would be compiled at the start, which takes minutes or fails; gloo is used instead.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def single_process_environment(env: Any) -> None:
    """Set the launcher's variables for a single process: DeepSpeed needs a process group even without a launcher."""
    if "RANK" not in env:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def wrap(
    accelerator: Any,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    whole_layers: Sequence[nn.Module] = (),
) -> tuple[Any, Any]:
    """Create DeepSpeed's engine and optimizer.

    Floating-point buffers keep their dtype: DeepSpeed would round them to the precision of the weights, and make the
    rotary frequencies inexact.

    Args:
        whole_layers: layers whose weights ZeRO-3 gathers together, because its hooks on every module inside would break
            a compiled layer's graph.
    """
    if whole_layers:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(
            module, sorted({type(layer) for layer in whole_layers}, key=lambda kind: kind.__name__)
        )
    saved = {name: b.detach().clone() for name, b in module.named_buffers() if b.is_floating_point()}
    engine, wrapped = accelerator.prepare(module, optimizer)
    for name, value in saved.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = value.to(accelerator.device)
    return engine, wrapped.optimizer
