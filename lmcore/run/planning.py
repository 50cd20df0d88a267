"""Makes the plan of a run from its configuration, for ``lmcore plan``, ``--dry_run`` and the start table of a run.

All three use the functions here: the model without weights, how it is trained (:class:`lmcore.plan.plan.Setting`), the
micro-batch that fits, and the :class:`lmcore.plan.plan.Plan`. If the activations cannot be counted, for example because the
model's code reads the values of its tensors, ``Plan.uncounted`` has the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmcore import process
from lmcore.config.curves import Curve
from lmcore.config.presets import model_type_and_fields
from lmcore.config.schema import RunConfig, global_batches
from lmcore.conventions import torch_dtype
from lmcore.data.batches import Batches
from lmcore.data.context import check_divides
from lmcore.data.cursor import Cursor
from lmcore.engine import launch, tensor, zero
from lmcore.engine.accelerator import check_fsdp_optimizer
from lmcore.model.build import build_model
from lmcore.model.cpu_kernels import use_faster_kernels
from lmcore.model.module import ModelWithLoss
from lmcore.model.token_mixing import why_no_context_parallel
from lmcore.plan import plan, trace
from lmcore.plan.plan import fitting_micro_batch
from lmcore.plugins import import_path
from lmcore.report import trackers
from lmcore.run.budget import Sizes, horizon
from lmcore.run.folder import local_run_dir
from lmcore.run.setup import (
    Data,
    Note,
    adapt,
    block_size_of,
    make_optimizer,
    refuse_context_parallel,
    refuse_sharded_lora,
    schedules_of,
    tensor_parallel_problem,
    with_loss,
)

if TYPE_CHECKING:
    from lmcore.engine.engine import Engine


def setting_of(
    config: RunConfig, *, precision: str, world_size: int, strategy: str | None = None, cuda: bool = False
) -> plan.Setting:
    """How the run trains, as far as memory depends on it. ``strategy`` overrides that of the launcher; ``cuda``: on GPUs."""
    asked = launch.request(os.environ, config.engine.deepspeed)
    launched = "ddp" if asked.strategy == "single" and world_size > 1 else asked.strategy
    of_zero: dict[str, Any] = {"zero_bucket": plan.ZERO_BUCKET // 10}  # as in ds_configs/
    if asked.deepspeed is not None:
        of_zero = zero.memory_settings(asked.deepspeed)
    chosen: Any = strategy or launched
    launch.check_groups(config.train, world_size, chosen)
    return plan.Setting(
        strategy=chosen,
        world_size=world_size,
        context_parallel=config.train.context_parallel,
        tensor_parallel=config.train.tensor_parallel,
        precision=precision,
        param_dtype=config.train.param_dtype,
        residual_dtype=launch.residual_dtype(
            config.train.residual_dtype,
            strategy=chosen,
            precision=precision,
            param_dtype=config.train.param_dtype,
            cuda=cuda,
        ),
        reduce_dtype=config.engine.reduce_dtype,
        activation_checkpointing=config.train.activation_checkpointing,
        **of_zero,
    )


def with_micro_batch(setting: plan.Setting, sizes: Sizes) -> plan.Setting:
    """The setting with the micro-batch and accumulation that the budget chose."""
    most = max(sizes.accumulation_of(stretch.batch) for stretch in sizes.steps.stretches)
    return replace(setting, micro_batch_blocks=sizes.micro_batch_blocks, accumulation=most)


def model_without_weights(
    config: RunConfig, *, vocab_size: int | None, block_size: int, note: Note = print
) -> ModelWithLoss:
    """The run's model and loss on the meta device. A model of ``model.factory`` that needs real tensors is built with them."""
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
    except Exception as error:  # the user's code may read values, which fake tensors do not have
        note(
            f"model.factory {named.factory} was built with its weights: on the meta device it fails with {_one_line(error)}"
        )
        return with_loss(config, make(), note=note)


def refuse_early(config: RunConfig) -> None:
    """Refuse what would otherwise be refused only after the text has been tokenized, which may take hours."""
    for path, option in ((config.model.factory, "model.factory"), (config.loss.factory, "loss.factory")):
        if path is not None:
            import_path(path, option)
    trackers.check(config.report.trackers, config.report.webhook)
    refuse_schedule(config)
    shared, cut = config.train.context_parallel, config.train.tensor_parallel
    if shared > 1:
        check_divides(block_size_of(config), shared)
    type, fields = model_type_and_fields(config)
    if type is not None:
        _, probe = trace.build_on_meta(
            type=type,
            config_overrides=fields,
            vocab_size=config.tokenizer.vocab_size or 2,
            attention=config.model.attention,
        )
        if cut > 1:
            tensor.refuse(cut, tensor_parallel_problem(probe, cut))
            tensor.refuse_to_compile(config.train.compile, tensor.why_not_compiled(probe))
        if shared > 1:
            use_faster_kernels(probe)
            refuse_context_parallel(shared, why_no_context_parallel(probe, block_size_of(config)))


def refuse_schedule(config: RunConfig) -> None:
    """Refuse a warmup or a curve that does not fit into the run (``RequestError``). Only if nothing is in epochs, because their
    length is not known without the text."""
    optim, batch = config.optim, config.train.global_batch_blocks or config.train.global_batch_tokens
    curves = [
        one for one in (optim.schedule, optim.momentum, optim.weight_decay, batch) if isinstance(one, Curve)
    ]
    lengths = [config.train.duration, optim.warmup, optim.decay, optim.momentum_warmup]
    lengths += [place for curve in curves for place, _ in curve.points]
    if any(length.unit == "epochs" for length in lengths):
        return
    # Whether the processes can divide the batch is checked elsewhere.
    alone = replace(config, train=replace(config.train, micro_batch_exact=False))
    sizes = horizon(alone, block_size=block_size_of(config), epoch_blocks=None, world_size=1)
    schedules_of(config, sizes)


def first_batch(config: RunConfig, data: Data, micro_batch_blocks: int) -> dict[str, Tensor] | None:
    """A micro-batch of the user's own dataset, because only its code knows the shapes; ``None`` for text."""
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
    # The user's code may draw random numbers, which must not change those of the run.
    with torch.random.fork_rng(devices=[]):
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
    """The plan of a module, with or without weights, before a strategy wraps it. The module is not changed.

    Args:
        device_bytes: memory of one device; ``None`` on a CPU, where each process gets its share of the available memory.
        batch: a micro-batch of the user's own dataset (:func:`first_batch`).
    """
    if device_bytes is None and device_type == "cpu" and (free := process.available_bytes()) is not None:
        device_bytes = free // int(os.environ.get("LOCAL_WORLD_SIZE", setting.world_size))
    counted = plan.parameters(module)
    part = module  # what one rank holds of it
    if setting.tensor_parallel > 1:
        tensor.refuse(setting.tensor_parallel, tensor.why_not(module.model, setting.tensor_parallel))
        part = trace.part_of_rank(module, setting.tensor_parallel)
    counted_part = counted if part is module else plan.parameters(part)
    weights = None if config.train.param_dtype == "fp32" else torch_dtype(config.train.param_dtype)
    made: list[torch.optim.Optimizer] = []

    def make(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        made.append(make_optimizer(config, module, named))
        refuse_strategy(config, made[0], setting.strategy)
        return made[-1]

    state_bytes = trace.optimizer_bytes(module, make, weights=weights)
    part_bytes = state_bytes if part is module else trace.optimizer_bytes(part, make, weights=weights)

    average = average_bytes(config, counted)

    def step_of(one: plan.Setting) -> dict[str, Any]:
        autocast, cast = one.casts
        return {
            "block_size": sizes.block_size,
            "batch": batch,
            "autocast": autocast,
            "weights": cast,
            "narrow_stream": one.residual_dtype == "bf16",
            "device_type": device_type,
            "device_bytes": device_bytes,
        }

    def needs(one: plan.Setting) -> plan.Memory:
        refuse_strategy(config, made[0], one.strategy)  # do not advise what the run would refuse
        traced = trace.trace_step(
            part,
            micro_batch_blocks=one.micro_batch_blocks,
            activation_checkpointing=one.activation_checkpointing,
            context_parallel=one.context_parallel,
            **step_of(one),
        )
        held = plan.setting_of_part(one)
        return plan.memory(counted_part, traced, held, optimizer_bytes=part_bytes + average)

    uncounted = None
    advice: tuple[tuple[str, int], ...] = ()
    flops: int | None = None
    try:
        memory = needs(setting)
        # FLOPs per token are counted for whole layers and whole blocks.
        blocks = 1 if batch is None else setting.micro_batch_blocks
        counted_flops = trace.count_flops(module, micro_batch_blocks=blocks, **step_of(setting))
        flops = counted_flops // (blocks * sizes.block_size)
    except Exception as error:  # code that reads values of fake tensors (own models)
        uncounted = _one_line(error)
        grown = (0, 0, 0, 4 * counted_part.trained, 0)
        least = trace.StepTrace(moments=((0,) * 5, grown))
        held = plan.setting_of_part(setting)
        memory = plan.memory(counted_part, least, held, optimizer_bytes=part_bytes + average)
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
        run_tokens=sizes.run_tokens,
        batch_changes=sizes.changes(),
        epoch_tokens=epoch_tokens,
        checkpoint_bytes=plan.checkpoint_bytes(counted, optimizer_bytes=state_bytes + average),
        checkpoints_kept=config.checkpoint.keep + config.checkpoint.keep_best.k,
        tokens_per_second=tokens_per_second,
        uncounted=uncounted,
    )


def refuse_strategy(config: RunConfig, optimizer: torch.optim.Optimizer, strategy: str) -> None:
    """Refuse what the engine would refuse under this strategy (``RequestError``), before memory is counted."""
    if strategy.startswith("zero"):
        zero.check_optimizer(optimizer)
    elif strategy == "fsdp2":
        check_fsdp_optimizer(optimizer)
    launch.check_param_dtype(config.train.param_dtype, strategy)
    if config.model.lora.rank:
        refuse_sharded_lora(strategy)


def average_bytes(config: RunConfig, counted: plan.Parameters) -> int:
    """Bytes of the moving average of the weights (``optim.ema_decay``): one more fp32 copy of the trained parameters."""
    return 4 * counted.trained if config.optim.ema_decay else 0


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def fitting(
    config: RunConfig,
    module: ModelWithLoss,
    setting: plan.Setting,
    *,
    block_size: int,
    device_bytes: int | None,
) -> int | None:
    """The micro-batch of ``train.micro_batch_blocks auto`` on GPUs; ``None`` on a CPU and for the user's own model or data,
    whose memory is not known: for them :func:`lmcore.run.budget.horizon` uses a moderate one."""
    blocks = max(global_batches(config, block_size))
    own = config.model.factory is not None or config.data.factory is not None
    if config.train.micro_batch_blocks != "auto" or device_bytes is None or own:
        return None
    if blocks % setting.data_world_size:
        return None
    return fitting_micro_batch(
        module,
        setting,
        share=blocks // setting.data_world_size,
        block_size=block_size,
        device_bytes=device_bytes - int(average_bytes(config, plan.parameters(module)) / plan.USABLE),
        make_optimizer=partial(make_optimizer, config, module),
        device_type="cuda",
    )


def device_bytes_of(device: torch.device) -> int | None:
    """Total memory of a GPU; ``None`` for a CPU, whose memory is shared with other programs."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def auto_micro_batch(config: RunConfig, engine: Engine, module: ModelWithLoss, block_size: int) -> int | None:
    """:func:`fitting` on the run's own devices: the minimum over the ranks. Collective on GPUs."""
    if engine.device.type != "cuda":
        return None
    setting = setting_of(config, precision=engine.precision, world_size=engine.world_size, cuda=True)
    fits = fitting(
        config, module, setting, block_size=block_size, device_bytes=device_bytes_of(engine.device)
    )
    agreed = [one for one in engine.gather_object(fits) if one is not None]
    return min(agreed) if agreed else None


PLAN_FILE = "plan.json"
"""File in the run folder with what the last ``lmcore plan --probe`` of this run measured."""


def plan_here(
    config: RunConfig, engine: Engine, module: ModelWithLoss, sizes: Sizes, data: Data, note: Note
) -> plan.Plan | None:
    """The plan for the start table, on rank 0 only; called before the module is wrapped.

    Its tokens per second are those of the last probe, if it used the same model, batch, strategy and precision.
    """
    try:
        return _plan_here(config, engine, module, sizes, data, note) if engine.is_main else None
    except Exception as error:  # training does not need the plan
        note(f"plan: could not be made: {_one_line(error)}")
        return None


def _plan_here(
    config: RunConfig, engine: Engine, module: ModelWithLoss, sizes: Sizes, data: Data, note: Note
) -> plan.Plan:
    on_gpu = engine.device.type == "cuda"
    setting = setting_of(config, precision=engine.precision, world_size=engine.world_size, cuda=on_gpu)
    blocks = getattr(data.train, "epoch_blocks", None)
    made = plan_of(
        config,
        module,
        setting=with_micro_batch(setting, sizes),
        sizes=sizes,
        device_bytes=device_bytes_of(engine.device),
        device_type=engine.device.type,
        batch=first_batch(config, data, sizes.micro_batch_blocks),
        epoch_tokens=blocks * sizes.block_size if blocks else None,
    )
    if made.uncounted:
        note(f"plan: the activations could not be counted: {made.uncounted}")
    probed = local_run_dir(config.run_dir, config.local_dir) / PLAN_FILE
    if not probed.is_file():
        return made
    try:
        kept = json.loads(probed.read_bytes())
        signature, rate = kept["signature"], float(kept["tokens_per_second"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        note(f"{probed} is damaged: its tokens/s are not used")
        return made
    if signature != made.signature():
        note(f"{probed} was measured with another model, batch or strategy: its tokens/s are not used")
        return made
    return replace(made, tokens_per_second=rate)
