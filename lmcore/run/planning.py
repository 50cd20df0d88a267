"""The configuration -> a plan, a part of the room ``assemble``: for ``plan``, ``--dry_run`` and the start of a run.

Comes in: a configuration, and what the machine is (devices, strategy, precision). Goes out: a model without weights, a
:class:`lmcore.plan.plan.Setting`, a :class:`lmcore.plan.plan.Plan`, the micro-batch that fits. What always holds: the three
callers count by the same functions; what could not be counted is said, with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmcore import process as _memory
from lmcore.config.presets import model_type_and_fields
from lmcore.config.schema import RunConfig, global_batch_blocks
from lmcore.conventions import torch_dtype
from lmcore.data.batches import Batches
from lmcore.data.cursor import Cursor
from lmcore.engine import launch
from lmcore.engine.zero import memory_settings
from lmcore.model.build import build_model
from lmcore.model.module import ModelWithLoss
from lmcore.plan import plan, trace
from lmcore.plan.plan import fitting_micro_batch
from lmcore.plugins import import_path
from lmcore.report import trackers
from lmcore.run.budget import Sizes
from lmcore.run.setup import Data, Note, adapt, make_optimizer, with_loss

if TYPE_CHECKING:
    from lmcore.engine.engine import Engine


def setting_of(
    config: RunConfig, *, precision: str, world_size: int, strategy: str | None = None
) -> plan.Setting:
    """How the run trains, as far as memory depends on it; ``strategy``: instead of what the launcher says."""
    asked = launch.request(os.environ, config.engine.deepspeed)
    launched = "ddp" if asked.strategy == "single" and world_size > 1 else asked.strategy
    zero: dict[str, Any] = {"zero_bucket": plan.ZERO_BUCKET // 10}  # what ds_configs/ say
    if asked.deepspeed is not None:
        zero = memory_settings(asked.deepspeed)
    chosen: Any = strategy or launched
    return plan.Setting(
        strategy=chosen,
        world_size=world_size,
        precision=precision,
        param_dtype=config.train.param_dtype,
        reduce_dtype=config.engine.reduce_dtype,
        activation_checkpointing=config.train.activation_checkpointing,
        **zero,
    )


def cut(setting: plan.Setting, sizes: Sizes) -> plan.Setting:
    """The same with the micro-batch and accumulation that came about."""
    return replace(setting, micro_batch_blocks=sizes.micro_batch_blocks, accumulation=sizes.accumulation)


def model_without_weights(
    config: RunConfig, *, vocab_size: int | None, block_size: int, note: Note = print
) -> ModelWithLoss:
    """The run's model and loss without its weights; a user's model that cannot be built without them is built with them."""
    named = config.model
    if named.factory is None:
        type, fields = model_type_and_fields(config)
        bare, probe = trace.build_on_meta(
            type=type,
            config_overrides=fields,
            vocab_size=vocab_size or 0,
            from_pretrained=named.from_pretrained,
            revision=named.revision,
            attention=named.attention,
            adapt=partial(adapt, config, weights=False),
        )
        return with_loss(config, bare, probe=probe, note=note)
    make = partial(
        build_model,
        factory=named.factory,
        config_overrides=named.config,
        vocab_size=vocab_size,
        block_size=block_size,
        seed=config.seed,
    )
    try:
        return with_loss(config, trace.build_own_on_meta(make), note=note)
    except Exception as error:  # own code may ask anything of numbers that are not there
        note(f"model.factory {named.factory} was built to be counted: without numbers it says {_said(error)}")
        return with_loss(config, make(), note=note)


def refuse_early(config: RunConfig) -> None:
    """Refuse what would otherwise be refused when the text has been tokenized, which may take hours."""
    for path, option in ((config.model.factory, "model.factory"), (config.loss.factory, "loss.factory")):
        if path is not None:
            import_path(path, option)
    trackers.check(config.report.trackers, config.report.webhook)
    type, fields = model_type_and_fields(config)
    if type is not None:
        trace.build_on_meta(
            type=type,
            config_overrides=fields,
            vocab_size=config.tokenizer.vocab_size or 2,
            attention=config.model.attention,
        )


def first_batch(config: RunConfig, data: Data, micro_batch_blocks: int) -> dict[str, Tensor] | None:
    """A micro-batch of the user's own data, whose shapes only its code knows; ``None`` of text."""
    if config.data.factory is None:
        return None
    batches = Batches(
        data.train,
        cursor=Cursor(fingerprint=data.train.fingerprint, seed=config.seed, phases=data.phases),
        global_batch_blocks=micro_batch_blocks,
        micro_batch_blocks=micro_batch_blocks,
        rank=0,
        world_size=1,
        collate=data.collate,
    )
    with torch.random.fork_rng(devices=[]):  # the user's code may draw, and looking must change nothing
        return next(iter(batches)).micro_batches[0]


def plan_of(
    config: RunConfig,
    module: ModelWithLoss,
    *,
    setting: plan.Setting,
    sizes: Sizes,
    device_bytes: int | None,
    device_type: str,
    batch: Mapping[str, Tensor] | None = None,
    epoch_tokens: int | None = None,
    tokens_per_second: float | None = None,
) -> plan.Plan:
    """The plan of a module that is not wrapped yet, or of one without weights; it is not changed.

    Args:
        device_bytes: ``None`` on a CPU: the share of each process in the memory that is free here.
        batch: a micro-batch of the user's own data (:func:`first_batch`).
    """
    if device_bytes is None and device_type == "cpu" and (free := _memory.available_bytes()) is not None:
        device_bytes = free // int(os.environ.get("LOCAL_WORLD_SIZE", setting.world_size))
    counted = plan.parameters(module)
    weights = None if config.train.param_dtype == "fp32" else torch_dtype(config.train.param_dtype)
    state_bytes = trace.optimizer_bytes(module, partial(make_optimizer, config, module), weights=weights)

    average = average_bytes(config, counted)

    def held(one: plan.Setting, *, count_flops: bool = False, blocks: int | None = None) -> trace.StepTrace:
        autocast, cast = one.casts
        return trace.trace_step(
            module,
            micro_batch_blocks=blocks or one.micro_batch_blocks,
            block_size=sizes.block_size,
            batch=batch,
            autocast=autocast,
            weights=cast,
            activation_checkpointing=one.activation_checkpointing and not count_flops,
            device_type=device_type,
            count_flops=count_flops,
        )

    def needs(one: plan.Setting) -> plan.Memory:
        return plan.memory(counted, held(one), one, optimizer_bytes=state_bytes + average)

    uncounted = None
    advice: tuple[tuple[str, int], ...] = ()
    flops: int | None = None
    try:
        memory = needs(setting)
        traced = held(setting, count_flops=True, blocks=1 if batch is None else None)
        flops = traced.flops // traced.tokens
    except (
        Exception
    ) as error:  # code that asks numbers of tensors that have none (own models, routed experts)
        uncounted = _said(error)
        grown = (0, 0, 0, 4 * counted.trained, 0)
        least = trace.StepTrace(moments=((0,) * 5, grown), flops=0, tokens=1)
        memory = plan.memory(counted, least, setting, optimizer_bytes=state_bytes + average)
    if device_bytes is not None and memory.total > plan.USABLE * device_bytes and uncounted is None:
        advice = plan.advise(setting, device_bytes, lambda one: needs(one).total)
    return plan.Plan(
        parameters=counted,
        setting=setting,
        memory=memory,
        device_bytes=device_bytes,
        advice=advice,
        flops_per_token=plan.model_flops_per_token(module, sizes.block_size),
        flops_counted=flops,
        block_size=sizes.block_size,
        steps=sizes.total_steps,
        tokens_per_step=sizes.tokens_per_step,
        epoch_tokens=epoch_tokens,
        checkpoint_bytes=plan.checkpoint_bytes(counted, optimizer_bytes=state_bytes + average),
        checkpoints_kept=config.checkpoint.keep + config.checkpoint.keep_best.k,
        tokens_per_second=tokens_per_second,
        uncounted=uncounted,
    )


def average_bytes(config: RunConfig, counted: plan.Parameters) -> int:
    """Of the moving average of the weights: one more fp32 copy of what is trained."""
    return 4 * counted.trained if config.optim.ema_decay else 0


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def fitting(
    config: RunConfig,
    module: ModelWithLoss,
    setting: plan.Setting,
    *,
    block_size: int,
    device_bytes: int | None,
) -> int | None:
    """What ``train.micro_batch_blocks auto`` is on GPUs; ``None``: nothing is known to limit it (a CPU, the user's
    own model or data), and :func:`lmcore.run.budget.horizon` takes a moderate one."""
    blocks = global_batch_blocks(config, block_size)
    own = config.model.factory is not None or config.data.factory is not None
    if config.train.micro_batch_blocks != "auto" or device_bytes is None or own:
        return None
    if blocks % setting.world_size:
        return None
    return fitting_micro_batch(
        module,
        setting,
        share=blocks // setting.world_size,
        block_size=block_size,
        device_bytes=device_bytes - int(average_bytes(config, plan.parameters(module)) / plan.USABLE),
        make_optimizer=partial(make_optimizer, config, module),
        device_type="cuda",
    )


def device_bytes_of(device: torch.device) -> int | None:
    """Memory of a GPU; ``None`` of a CPU, whose memory belongs to many."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def auto_micro_batch(config: RunConfig, engine: Engine, module: ModelWithLoss, block_size: int) -> int | None:
    """:func:`fitting` on the run's own devices, agreed over the ranks."""
    if engine.device.type != "cuda":
        return None
    setting = setting_of(config, precision=engine.precision, world_size=engine.world_size)
    fits = fitting(
        config, module, setting, block_size=block_size, device_bytes=device_bytes_of(engine.device)
    )
    agreed = [one for one in engine.gather_object(fits) if one is not None]
    return min(agreed) if agreed else None


PLAN_FILE = "plan.json"
"""In the run folder: what the last probe of this run measured (``python -m lmcore plan --probe``)."""


def plan_here(
    config: RunConfig, engine: Engine, module: ModelWithLoss, sizes: Sizes, data: Data, note: Note
) -> plan.Plan | None:
    """The plan of the run that is about to start, on rank 0; before the module is wrapped.

    With the rate of a probe, where one was made of the same model, batch, strategy and precision.
    """
    try:
        return _plan_here(config, engine, module, sizes, data, note) if engine.is_main else None
    except Exception as error:  # whatever it is, training does not need the plan
        note(f"plan: could not be made: {_said(error)}")
        return None


def _plan_here(
    config: RunConfig, engine: Engine, module: ModelWithLoss, sizes: Sizes, data: Data, note: Note
) -> plan.Plan:
    setting = setting_of(config, precision=engine.precision, world_size=engine.world_size)
    blocks = getattr(data.train, "epoch_blocks", None)
    made = plan_of(
        config,
        module,
        setting=cut(setting, sizes),
        sizes=sizes,
        device_bytes=device_bytes_of(engine.device),
        device_type=engine.device.type,
        batch=first_batch(config, data, sizes.micro_batch_blocks),
        epoch_tokens=blocks * sizes.block_size if blocks else None,
    )
    if made.uncounted:
        note(f"plan: the activations could not be counted: {made.uncounted}")
    probed = Path(config.run_dir or "") / PLAN_FILE
    if not probed.is_file():
        return made
    kept = json.loads(probed.read_text(encoding="utf-8"))
    if kept.get("signature") != made.signature():
        note(f"{probed} is of another model, batch or strategy: its rate is not compared with")
        return made
    return replace(made, tokens_per_second=kept["tokens_per_second"])
