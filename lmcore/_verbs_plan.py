"""The verb ``plan``: the arithmetic of a run, from its configuration alone; a part of the command line.

Comes in: the options of ``train_lm.py`` and what the machine will be. Goes out: the rows of :class:`lmcore.plan.Plan`.
What always holds: no weight is made (the model is imagined), and no text is read unless the budget is in epochs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lmcore.errors import RequestError

MACHINE = """\
usage: python -m lmcore plan [--processes N] [--strategy S] [--device_gib G] [--tokens_per_second R] [--watts W]
                             [options of train_lm.py]

  --processes N          devices that will train (default 1)
  --strategy S           single, ddp, fsdp2, zero1, zero2, zero3 (default: single, or ddp for several)
  --device_gib G         memory of each device (default: this machine's GPU; without one, no verdict)
  --tokens_per_second R  of all devices together, for time and energy
  --watts W              of each device
"""
STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


def plan_rows(config: Any, given: dict[str, str], *, open_data: Callable[[], Any]) -> list[tuple[str, str]]:
    """The plan of a configuration as rows.

    Args:
        given: what :data:`MACHINE` names, as words.
        open_data: opens the run's data; called only where the budget is in epochs.

    Raises:
        RequestError: what the run itself would refuse; a model that only its own code can count.
    """
    import torch

    from lmcore import assemble, plan, rehearsal, tokenizer
    from lmcore.budget import horizon

    if config.model.type is None:
        raise RequestError("plan: model.type is needed; weights from elsewhere or own code are not imagined")
    processes = int(_number(given, "processes", 1))
    strategy: Any = given.get("strategy") or ("single" if processes == 1 else "ddp")
    if strategy not in STRATEGIES or processes < 1:
        raise RequestError(f"--strategy {strategy}: take one of {', '.join(STRATEGIES)}")
    here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    device_bytes = int(_number(given, "device_gib", 0) * 2**30) or here
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device_bytes else "fp32"
    block_size = assemble.block_size_of(config)
    vocabulary = config.tokenizer.vocab_size
    if config.tokenizer.path is not None:
        vocabulary = tokenizer.load(config.tokenizer.path, revision=config.tokenizer.revision).vocab_size
    data = open_data() if config.train.duration.unit == "epochs" else None
    sizes = horizon(
        config,
        block_size=block_size,
        epoch_blocks=data.train.epoch_blocks if data else None,
        world_size=processes,
    )
    module = rehearsal.imagine(
        type=config.model.type,
        config_overrides=config.model.config,
        vocab_size=vocabulary,
        chunk="auto" if config.loss.chunk is None else config.loss.chunk,
    )
    counted = plan.parameters(module)
    setting = plan.Setting(
        strategy=strategy,
        world_size=processes,
        precision=precision,
        param_dtype=config.train.param_dtype,
        reduce_dtype=config.engine.reduce_dtype,
        micro_batch_blocks=sizes.micro_batch_blocks,
        accumulation=sizes.accumulation,
        activation_checkpointing=config.train.activation_checkpointing,
        small_optimizer_state=config.optim.state_dtype == "bf16",
        zero_bucket=plan.ZERO_BUCKET // 10,  # what ds_configs/ say
    )
    make_optimizer = partial(assemble.make_optimizer, config, module)
    state_bytes = rehearsal.optimizer_bytes(module, make_optimizer)

    def needs(one: plan.Setting) -> plan.Memory:
        fresh = rehearsal.imagine(
            type=config.model.type, config_overrides=config.model.config, vocab_size=vocabulary
        )
        if one.activation_checkpointing:
            from lmcore.model import enable_activation_checkpointing

            enable_activation_checkpointing(fresh.model)
        autocast, weights = one.casts
        rehearsed = rehearsal.rehearse(
            fresh,
            micro_batch_blocks=one.micro_batch_blocks,
            block_size=block_size,
            autocast=autocast,
            weights=weights,
            device_type="cuda" if device_bytes else "cpu",
            count_flops=False,
        )
        kept = state_bytes // 2 if one.small_optimizer_state > setting.small_optimizer_state else state_bytes
        return plan.memory(counted, rehearsed, one, optimizer_bytes=kept)

    memory = needs(setting)
    flops = rehearsal.rehearse(module, micro_batch_blocks=1, block_size=block_size)
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    learned = sum(p.numel() for name, p in module.named_parameters() if name.endswith("wpe.weight"))
    advice: tuple[tuple[str, int], ...] = ()
    if device_bytes is not None and memory.total > plan.USABLE * device_bytes:
        advice = plan.advise(setting, device_bytes, lambda one: needs(one).total)
    return plan.Plan(
        parameters=counted,
        setting=setting,
        memory=memory,
        device_bytes=device_bytes,
        advice=advice,
        flops_per_token=plan.flops_per_token(
            counted,
            positions=learned,
            block_size=block_size,
            tied=head is not None and embedding is not None and head.weight is embedding.weight,
        ),
        flops_counted=flops.flops // flops.tokens,
        block_size=block_size,
        steps=sizes.total_steps,
        tokens_per_step=sizes.tokens_per_step,
        epoch_tokens=data.train.epoch_blocks * block_size if data else None,
        checkpoint_bytes=plan.checkpoint_bytes(counted, optimizer_bytes=state_bytes),
        checkpoints_kept=config.checkpoint.keep + config.checkpoint.keep_best.k,
        tokens_per_second=_number(given, "tokens_per_second", 0) or None,
        watts_per_device=_number(given, "watts", 0) or None,
    ).rows()


def _number(given: dict[str, str], name: str, default: float) -> float:
    try:
        return float(given.get(name, default))
    except ValueError:
        raise RequestError(f"--{name} {given[name]}: give a number") from None


def disk(folder: str | os.PathLike[str]) -> tuple[str, str]:
    """Free space where the checkpoints will go."""
    import shutil

    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return "disk", f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free at {place}"
