"""What a run will need, computed before it starts: parameters, steps, FLOPs, memory per device, disk, time.

Pure functions of counts and of one traced micro-batch (:class:`~lmcore.plan.trace.StepTrace`). Every number can be computed
by hand from the formula next to it; only :func:`memory` knows what each strategy keeps where.

Sources: ZeRO's partitions, Rajbhandari et al. 2020, arXiv 1910.02054, section 5; the other buffers of each strategy are from
the code of DeepSpeed 0.19.8 and torch 2.13 and were measured (tests/plan/test_plan.py); 6 N FLOPs per token, Kaplan et al.
2020, arXiv 2001.08361, and 12 L d T for the attention, Chowdhery et al. 2022, arXiv 2204.02311, appendix B; 20 tokens per
parameter, Hoffmann et al. 2022, arXiv 2203.15556.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from lmcore.conventions import torch_dtype
from lmcore.engine.tensor import why_not
from lmcore.errors import RequestError
from lmcore.humanize import amount, duration, short, size
from lmcore.model.module import ModelWithLoss, decoder_layers
from lmcore.plan.scaling import TOKENS_PER_PARAMETER
from lmcore.plan.trace import (
    ACTIVATIONS,
    COPIES,
    LAYER_GRADIENTS,
    LOGITS,
    OTHER_GRADIENTS,
    StepTrace,
    optimizer_bytes,
    part_of_rank,
    trace_step,
)

Strategy = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
LEAST_PARAMETERS = 70_000_000
"""Size of the smallest models of Hoffmann et al. 2022, the basis of :data:`~lmcore.plan.scaling.TOKENS_PER_PARAMETER`."""
USABLE = 0.92
"""Share of a device's memory available to tensors: the context, the kernels' workspace and fragmentation take the rest."""
ZERO_BUCKET = 500_000_000
"""DeepSpeed's own default of reduce_bucket_size, in elements; ds_configs/ use a tenth of it."""
WITHOUT_ATTENTION = "linear|conv|mamba|recurrent"
"""Pattern for the names in ``config.layer_types`` of layers without attention."""


# ------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts of a model. ``groups`` add up to ``total``; a tied head is counted once, with the embedding."""

    total: int
    trained: int
    groups: dict[str, int]
    outside_layers: int
    largest_layer: int
    layers: int
    attention_width: int
    """``L d`` of the attention: heads times their dimensions, summed over the layers with attention."""
    buffer_bytes: int
    largest_tensor: int = 0
    idle: int = 0
    """Parameters of routed experts that a token is not sent to."""


def parameters(module: nn.Module) -> Parameters:
    """Count a model, which may consist of fake or meta tensors."""
    model = module.model if isinstance(module, ModelWithLoss) else module
    layers = decoder_layers(model)
    of_layer: dict[int, int] = {}
    for number, layer in enumerate(layers):
        of_layer |= dict.fromkeys(map(id, layer.parameters()), number)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    heads = set() if head is None else set(map(id, head.parameters()))
    groups = dict.fromkeys(
        ("embeddings", "attention", "feed-forward", "norms and biases", "head", "other"), 0
    )
    sizes = [0] * max(1, len(layers))
    for name, p in model.named_parameters():
        inside = id(p) in of_layer
        if inside:
            sizes[of_layer[id(p)]] += p.numel()
        if id(p) in embeddings:
            groups["embeddings"] += p.numel()
        elif id(p) in heads:
            groups["head"] += p.numel()
        elif p.ndim < 2:
            groups["norms and biases"] += p.numel()
        elif inside:
            groups["attention" if "att" in name.lower() else "feed-forward"] += p.numel()
        else:
            groups["other"] += p.numel()
    total = sum(p.numel() for p in model.parameters())
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Parameters(
        total=total,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        groups={name: count for name, count in groups.items() if count},
        outside_layers=total - sum(sizes),
        largest_layer=max(sizes),
        layers=len(layers),
        attention_width=_attention_width(config, len(layers)),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        largest_tensor=max((p.numel() for p in model.parameters() if p.requires_grad), default=0),
        idle=sum(p.numel() - p.numel() * each // p.shape[0] for p, each in _routed_experts(model, config)),
    )


def _attention_width(config: Any, layers: int) -> int:
    """See :class:`Parameters`. If the dimensions of keys and values differ, their mean is used."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int) or not heads:
        return 0
    each = getattr(config, "head_dim", None) or width / heads
    if keys := getattr(config, "qk_head_dim", None):
        each = (keys + (getattr(config, "v_head_dim", None) or keys)) / 2
    kinds = getattr(config, "layer_types", None)
    attending = layers if kinds is None else sum(not re.search(WITHOUT_ATTENTION, kind) for kind in kinds)
    return int(attending * heads * each)


def _routed_experts(model: nn.Module, config: Any) -> Iterator[tuple[nn.Parameter, int]]:
    """The weights that hold all experts of a layer, (experts, out, in), with the number of experts per token."""
    each = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    if each and experts:
        yield from ((p, each) for p in model.parameters() if p.ndim == 3 and p.shape[0] == experts)


def flops_per_token(counted: Parameters, *, positions: int, block_size: int, tied: bool) -> int:
    """``6 N + 12 L d T``. N excludes parameters that are only looked up (positions, and the embedding unless it is also the
    head) and the experts that a token is not sent to.

    ``positions`` is the number of parameters of learned position embeddings. As in PaLM's and nanoGPT's MFU, attention is
    counted in full, not halved for being causal. A frozen weight costs 4 instead of 6, because its gradient is not computed.
    """
    looked_up = positions if tied else counted.groups.get("embeddings", 0)
    used = counted.total - looked_up - counted.idle
    updated = used if counted.trained == counted.total else min(counted.trained, used)
    return 4 * used + 2 * updated + 12 * counted.attention_width * block_size


def model_flops_per_token(module: nn.Module, block_size: int) -> int | None:
    """:func:`flops_per_token` of a transformers model; ``None`` for a model whose shape is not known."""
    model = module.model if isinstance(module, ModelWithLoss) else module
    if not hasattr(model, "get_output_embeddings"):
        return None
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    counted = parameters(model)
    return flops_per_token(
        counted,
        positions=counted.groups.get("embeddings", 0) - embedding.weight.numel() if tied else 0,
        block_size=block_size,
        tied=tied,
    )


PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835.5e12,
    "H200": 989e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090$": 165e12,  # not the Laptop GPU
    "MI300X": 1307e12,
}
"""Dense bf16 matrix FLOP/s by a pattern for the device's name (the first match applies), from the vendors' data sheets:

- NVIDIA H100 (SXM 1,979 TFLOP/s with sparsity, which is twice the dense rate; NVL 1,671; PCIe 1,513), H200 (SXM 1,979; NVL
  1,671), HGX B200 (144 PFLOP/s of fp4 for 8 GPUs, 4.5 of bf16 with sparsity for each);
- dense as given: H20 148, A100 312, L40S 362.05;
- Ada architecture whitepaper: RTX 4090 165.2, with sums in float32; AMD Instinct MI300X 1,307.4."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """The device's peak FLOP/s; ``None`` if it is not known, and then there is no MFU."""
    if precision not in ("bf16", "fp16"):
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


# ----------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is trained, as far as memory depends on it."""

    strategy: Strategy = "single"
    world_size: int = 1
    context_parallel: int = 1
    tensor_parallel: int = 1
    precision: str = "fp32"
    param_dtype: str = "fp32"
    residual_dtype: str = "fp32"
    reduce_dtype: str = "fp32"
    micro_batch_blocks: int = 1
    accumulation: int = 1
    activation_checkpointing: bool | int = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    zero_bucket: int = ZERO_BUCKET
    zero_overlap: bool = True
    zero_live: int = 1_000_000_000

    @property
    def data_world_size(self) -> int:
        """Number of micro-batches computed in parallel: of ranks, or of groups of ranks that share blocks or layers."""
        return self.world_size // self.sharing

    @property
    def sharing(self) -> int:
        """How many ranks compute one micro-batch together."""
        return self.context_parallel * self.tensor_parallel

    @property
    def casts(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        """(autocast dtype, dtype of the weights in forward) for :func:`lmcore.plan.trace.trace_step`."""
        compute = None if self.precision == "fp32" else torch_dtype(self.precision)
        if self.strategy in ("single", "ddp"):
            return compute, None if self.param_dtype == "fp32" else torch_dtype(self.param_dtype)
        return (compute, compute) if self.strategy == "fsdp2" else (None, compute)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device at the peak of a step, and on its host (offload)."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.logits


def setting_of_part(setting: Setting) -> Setting:
    """Under tensor parallelism, the setting of the group of ranks that hold the same part of the layers."""
    if setting.tensor_parallel == 1:
        return setting
    ranks = setting.world_size // setting.tensor_parallel
    alone = ranks == 1 and setting.strategy == "ddp"
    return replace(setting, world_size=ranks, strategy="single" if alone else setting.strategy)


def memory(counted: Parameters, traced: StepTrace, setting: Setting, *, optimizer_bytes: int) -> Memory:
    """The memory at the peak of a step under a strategy.

    With P parameters, N ranks, w bytes per stored weight, c bytes per weight in the computation, O bytes of optimizer state:

    ======== ================ ============================== ========= ==============================================
    strategy weights          gradients                      optimizer buffers
    ======== ================ ============================== ========= ==============================================
    single   w P              as backward makes them; all    O         casts of weights by autocast
                              of them under accumulation
    ddp      w P              w P (the buckets), twice       O         as single
                              under accumulation
    fsdp2    4 P / N          4 P / N                        O / N     what is outside of the layers, and 1 layer in
                                                                       forward, 3 and its gradient in backward
    zero1    c P              4 P / N, 4 P under             (4P+O)/N  2 buckets
                              accumulation or in 16 bits
    zero2    c P              4 P / N, as backward makes     (4P+O)/N  2 buckets, the largest tensor's gradient
                              them; all under accumulation
    zero3    c P / N          4 P / N                        (4P+O)/N  gathered weights (at most zero_live), 1 bucket
    ======== ================ ============================== ========= ==============================================

    single and ddp with bf16 weights sum gradients in 4 P bytes, and round them to another 2 P once the activations are freed.

    Under context parallelism over c ranks, the activations are those of T / c tokens of each block, and of the keys and
    values of T (1 + 1 / 2c) tokens in each layer (:func:`lmcore.engine.context.keys_of_queries`).

    Under tensor parallelism over t ranks, all terms refer to the part of the model that a rank holds, and N is the number of
    ranks that hold the same part (:func:`setting_of_part`).

    Under ZeRO the optimizer's part includes its fp32 weights. Offload moves it and the rank's share of the gradients to the
    host; under stage 3 also the weights, if requested.
    """
    ranks, several = setting.world_size, setting.accumulation > 1
    total, trained = counted.total, counted.trained
    kept = torch_dtype(setting.param_dtype).itemsize if setting.strategy in ("single", "ddp", "fsdp2") else 4
    compute = torch_dtype(setting.precision).itemsize if setting.strategy not in ("single", "ddp") else kept
    if setting.strategy in ("single", "ddp"):
        resident = kept * trained * ({"single": 0, "ddp": 1}[setting.strategy] + several)
        if wide := kept < 4 and setting.reduce_dtype == "fp32":
            resident = 4 * trained
        share = 0.0 if resident else 1.0
        moment = traced.peak(gradients=share, other_gradients=share)
        if wide and kept * trained > moment[ACTIVATIONS] + moment[LOGITS] + moment[COPIES]:
            resident, moment = resident + kept * trained, (0,) * 5  # the peak is in the update
        return Memory(
            weights=kept * total + counted.buffer_bytes,
            gradients=resident or moment[LAYER_GRADIENTS] + moment[OTHER_GRADIENTS],
            optimizer=optimizer_bytes,
            buffers=moment[COPIES],
            activations=moment[ACTIVATIONS],
            logits=moment[LOGITS],
        )
    if setting.strategy == "fsdp2":
        return _memory_fsdp2(counted, traced, setting, optimizer_bytes, compute)
    # ZeRO sends gradients to their owner as soon as a bucket is full.
    moment = traced.peak(gradients=0.0, other_gradients=0.0)
    state = (4 * trained + optimizer_bytes) // ranks
    gradients = all_gradients = 4 * trained // ranks
    if setting.strategy == "zero1" and (several or compute < 4):
        gradients = all_gradients = 4 * trained
    bucket = setting.zero_bucket * compute
    buffers, weights = bucket * (2 if setting.zero_overlap else 1), compute * total
    if setting.strategy == "zero2" and not several:
        moment, gradients, buffers = _backward_of_zero2(counted, traced, setting, compute)
    if setting.strategy == "zero3":
        buffers = bucket + compute * min(total, setting.zero_live)
        weights = compute * total // ranks
    host = 0
    if setting.offload_optimizer:
        host, state, gradients = state + all_gradients, 0, 0
    if setting.offload_weights and setting.strategy == "zero3":
        host, weights = host + weights, 0
    return Memory(
        weights=weights + counted.buffer_bytes,
        gradients=gradients,
        optimizer=state,
        buffers=buffers,
        activations=moment[ACTIVATIONS],
        logits=moment[LOGITS],
        host=host,
    )


def _backward_of_zero2(
    counted: Parameters, traced: StepTrace, setting: Setting, compute: int
) -> tuple[tuple[int, ...], int, int]:
    """The peak of ZeRO-2 without accumulation, and the bytes of gradients and of buffers at that moment.

    DeepSpeed frees its share of the gradients after the update, and allocates it again in the next backward pass, with the
    buckets. So neither exists in the head at the end of forward, where activations are largest. In backward the gradient of
    the largest tensor is complete, and what is being reduced has an fp32 copy if it is in 16 bits.
    """
    trained, bucket = counted.trained, setting.zero_bucket
    made_at_last = max(1, traced.moments[-1][LAYER_GRADIENTS] + traced.moments[-1][OTHER_GRADIENTS])
    largest = counted.largest_tensor
    buckets = bucket * compute * (2 if setting.zero_overlap else 1) + compute * largest
    copy = 4 * max(largest, min(bucket, trained)) if compute < 4 else 0

    def held(moment: tuple[int, ...]) -> tuple[int, int]:
        made = moment[LAYER_GRADIENTS] + moment[OTHER_GRADIENTS]
        gradients = 4 * trained * made // (made_at_last * setting.world_size)
        return gradients, (buckets + copy) if made else 0

    def size(moment: tuple[int, ...]) -> int:
        return moment[ACTIVATIONS] + moment[LOGITS] + moment[COPIES] + sum(held(moment))

    fullest = max(traced.moments, key=size)
    return fullest, *held(fullest)


def _memory_fsdp2(
    counted: Parameters, traced: StepTrace, setting: Setting, optimizer_bytes: int, compute: int
) -> Memory:
    """Memory of FSDP2: layers are gathered one after the other; the rest stays gathered from forward to backward."""
    ranks, layer = setting.world_size, counted.largest_layer
    reduce = torch_dtype(setting.reduce_dtype).itemsize
    outside = compute * counted.outside_layers
    all_gradients = 4 * counted.trained // ranks
    of_layers = max(1, traced.moments[-1][LAYER_GRADIENTS])

    def at(moment: tuple[int, ...]) -> tuple[int, int]:
        """Bytes of (gradients, gathered weights) at a moment."""
        done = moment[LAYER_GRADIENTS] / of_layers
        gathered = outside + compute * layer
        if done:  # the next layer is gathered while the last one's gradient is reduced
            gathered = outside + (3 * compute + reduce) * layer
        return int(all_gradients * (1.0 if setting.accumulation > 1 else done)), gathered

    def size(moment: tuple[int, ...]) -> int:
        return sum(at(moment)) + moment[ACTIVATIONS] + moment[LOGITS] + moment[OTHER_GRADIENTS]

    moment = max(traced.moments, key=size)
    gradients, gathered = at(moment)
    return Memory(
        weights=4 * counted.total // ranks + counted.buffer_bytes,
        gradients=gradients + moment[OTHER_GRADIENTS],
        optimizer=optimizer_bytes // ranks,
        buffers=gathered,
        activations=moment[ACTIVATIONS],
        logits=moment[LOGITS],
    )


def remedies(setting: Setting) -> list[tuple[str, Setting]]:
    """Changes that need less memory and keep the global batch; those that cost the least time come first."""
    found: list[tuple[str, Setting]] = []
    if setting.precision == "fp32":
        found.append(("--train.precision bf16", replace(setting, precision="bf16")))
    blocks = setting.micro_batch_blocks
    smaller = [blocks // divisor for divisor in (2, 4) if blocks % divisor == 0] + [1]
    for micro in dict.fromkeys(fewer for fewer in smaller if fewer < blocks):
        changed = replace(
            setting, micro_batch_blocks=micro, accumulation=setting.accumulation * blocks // micro
        )
        found.append((f"--train.micro_batch_blocks {micro}", changed))
    if setting.activation_checkpointing != 1:
        found.append(("--train.activation_checkpointing", replace(setting, activation_checkpointing=True)))
    if setting.world_size > 1 and setting.strategy in ("ddp", "zero1", "zero2"):
        found.append(("accelerate_configs/fsdp2.yaml", replace(setting, strategy="fsdp2")))
    if not setting.offload_optimizer and setting.tensor_parallel == 1:
        offloaded = replace(
            setting,
            strategy="zero2" if setting.strategy in ("single", "ddp", "zero1") else "zero3",
            zero_bucket=ZERO_BUCKET // 10,
            offload_optimizer=True,
        )
        stage = offloaded.strategy[-1]
        # A launcher that has configured FSDP2 does not accept DeepSpeed as well.
        by_launcher = f"accelerate_configs/zero{stage}_offload.yaml"
        by_option = f"--engine.deepspeed ds_configs/zero{stage}_offload.json"
        found.append((by_launcher if setting.strategy == "fsdp2" else by_option, offloaded))
    if setting.strategy in ("fsdp2", "zero3"):
        doubled = replace(setting, world_size=2 * setting.world_size)
        found.append((f"{doubled.world_size} devices", doubled))
    return found


def largest_micro_batch(share: int, capacity: int, needs: Callable[[int], int]) -> int:
    """The largest divisor of ``share`` (a rank's blocks of a step) that fits into ``capacity`` bytes; at least 1.

    ``needs(blocks)`` is called only a few times, by bisection, because memory grows with the micro-batch.
    """
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    low, high = 0, len(divisors) - 1  # divisors[low] is assumed to fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(divisors[middle]) <= capacity else (low, middle - 1)
    return divisors[low]


def fitting_micro_batch(
    module: ModelWithLoss,
    setting: Setting,
    *,
    share: int,
    block_size: int,
    device_bytes: int,
    make_optimizer: Callable[[list[tuple[str, Any]]], torch.optim.Optimizer],
    device_type: str = "cpu",
) -> int:
    """The largest divisor of ``share`` (blocks of a step on this rank) whose step fits, at least 1.

    Args:
        setting: strategy, world size and precision of the run; its micro-batch and accumulation are not used.
        device_bytes: memory of the smallest device.
    """
    if setting.tensor_parallel > 1:
        if why_not(module.model, setting.tensor_parallel) is not None:  # refused when the run prepares it
            return 1
        module = part_of_rank(module, setting.tensor_parallel)
    counted = parameters(module)
    autocast, weights = setting.casts
    kept = None if setting.param_dtype == "fp32" else torch_dtype(setting.param_dtype)
    state_bytes = optimizer_bytes(module, make_optimizer, weights=kept)

    def needs(blocks: int) -> int:
        traced = trace_step(
            module,
            micro_batch_blocks=blocks,
            block_size=block_size,
            autocast=autocast,
            weights=weights,
            narrow_stream=setting.residual_dtype == "bf16",
            activation_checkpointing=setting.activation_checkpointing,
            device_type=device_type,
            device_bytes=device_bytes,
            context_parallel=setting.context_parallel,
        )
        one = replace(setting, micro_batch_blocks=blocks, accumulation=share // blocks)
        return memory(counted, traced, setting_of_part(one), optimizer_bytes=state_bytes).total

    return largest_micro_batch(share, int(USABLE * device_bytes), needs)


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known about a run before it starts; ``None`` for what is not known."""

    parameters: Parameters
    setting: Setting
    memory: Memory
    device_bytes: int | None
    advice: tuple[tuple[str, int], ...]
    flops_per_token: int | None
    flops_counted: int | None
    block_size: int
    steps: int
    tokens_per_step: int
    epoch_tokens: int | None
    checkpoint_bytes: int
    checkpoints_kept: int
    tokens_per_second: float | None = None
    run_tokens: int | None = None
    """Number of labels of the whole run; default: every step has :attr:`tokens_per_step`."""
    batch_changes: str = ""
    """The changes of the global batch during the run, in words."""
    uncounted: str | None = None
    """Why the activations of a step could not be counted; in that case :attr:`memory` is a lower bound."""

    @property
    def tokens(self) -> int:
        """Labels of the whole run."""
        return self.steps * self.tokens_per_step if self.run_tokens is None else self.run_tokens

    @property
    def fits(self) -> bool | None:
        """Whether :attr:`memory` is within the usable share of the device."""
        if self.device_bytes is None:
            return None
        within = self.memory.total <= USABLE * self.device_bytes
        return None if within and self.uncounted else within

    @property
    def seconds(self) -> float | None:
        """Duration at the given rate of all devices together."""
        return None if not self.tokens_per_second else self.tokens / self.tokens_per_second

    def rows(self) -> list[tuple[str, str]]:
        """Rows for the start table: name, value and how it is computed."""
        p, s, m = self.parameters, self.setting, self.memory
        groups = ", ".join(f"{name} {short(count)}" for name, count in p.groups.items())
        frozen = f"; {short(p.trained)} trained" if p.trained != p.total else ""
        ratio = self.tokens / p.total
        best = (
            f"about {TOKENS_PER_PARAMETER:g} make the best model for a given compute (Hoffmann et al. 2022)"
        )
        if p.total < LEAST_PARAMETERS:
            best = (
                f"about {TOKENS_PER_PARAMETER:g} are best above {short(LEAST_PARAMETERS)} parameters (Hoffmann et al. 2022); "
                "for a smaller model, lmcore size measures it"
            )
        rows = [
            ("parameters", f"{p.total:,} ({groups}){frozen}"),
            (
                "global batch",
                f"{amount(self.tokens_per_step // self.block_size, 'block')} of {self.block_size:,} tokens at first"
                if self.batch_changes
                else f"{s.data_world_size} x {s.accumulation} x {s.micro_batch_blocks} x {self.block_size:,} "
                f"({'processes' if s.sharing == 1 else f'groups of {s.sharing} processes'} x "
                f"accumulation x micro-batch x block) = {self.tokens_per_step:,} tokens",
            ),
            *([("batch changes", self.batch_changes)] if self.batch_changes else []),
            (
                "budget",
                f"{amount(self.steps, 'step')} = {short(self.tokens)} tokens"
                + (f" = {self.tokens / self.epoch_tokens:.3g} epochs" if self.epoch_tokens else ""),
            ),
            (
                "tokens per parameter",
                f"{ratio:.3g}; {best}",
            ),
            ("FLOPs per token", self._flops()),
            (
                "memory per device",
                f"{'at least ' if self.uncounted else ''}{size(m.total)} at the peak = {self._parts_of_the_peak()}"
                + (f"; on the host {size(m.host)}" if m.host else ""),
            ),
        ]
        if self.device_bytes is not None:
            verdict = {True: "fits into", False: "does not fit into", None: "not known for"}[self.fits]
            rows.append(("verdict", f"{verdict} {size(self.device_bytes)} ({USABLE:.0%} usable)"))
        if self.advice:
            changes = "; ".join(f"{change} ({size(needs)})" for change, needs in self.advice)
            enough = max(needs for _, needs in self.advice) <= USABLE * (self.device_bytes or 0)
            rows.append(("it would fit with" if enough else "least memory by", changes))
        kept = f"{size(self.checkpoint_bytes)} x {self.checkpoints_kept} kept = "
        rows.append(("checkpoints", kept + size(self.checkpoint_bytes * self.checkpoints_kept)))
        if self.seconds is not None:
            rate = f"{duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s"
            rows.append(("time", f"{rate}, evaluating and saving not counted"))
        return rows

    def _parts_of_the_peak(self) -> str:
        """What is in memory at the peak; for example, gradients may not exist yet at that moment."""
        m = self.memory
        parts = {
            "weights": m.weights,
            "gradients": m.gradients,
            "optimizer": m.optimizer,
            "buffers": m.buffers,
        }
        if not self.uncounted:
            parts |= {"activations": m.activations, "head": m.logits}
        words = [f"{name} {size(held)}" for name, held in parts.items() if held]
        if self.uncounted:
            words.append(f"activations, which could not be counted ({self.uncounted})")
        return " + ".join(words)

    def beside_the_budget(self) -> list[tuple[str, str]]:
        """:meth:`rows` without those that the start table of a run has anyway."""
        return [
            row
            for row in self.rows()
            if row[0] not in ("parameters", "global batch", "batch changes", "budget")
        ]

    def _flops(self) -> str:
        """FLOPs per token by the formula and as counted, as far as each is known."""
        each = self.flops_per_token or self.flops_counted
        if each is None:
            return f"not counted ({self.uncounted})"
        all_trained = self.parameters.trained == self.parameters.total
        formula = "6 N + 12 L d T" if all_trained else "4 N + 2 N trained + 12 L d T"
        formula += ", N with the experts of one token" if self.parameters.idle else ""
        known = [] if self.flops_per_token is None else [f"{short(self.flops_per_token)} ({formula})"]
        known += [] if self.flops_counted is None else [f"{short(self.flops_counted)} counted"]
        return f"{', '.join(known)}; {short(self.tokens * each)} in all"

    def signature(self) -> list[Any]:
        """What a measured rate depends on, apart from the machine. A rate with another signature does not apply."""
        s = self.setting
        how = [s.strategy, s.world_size, s.precision, s.micro_batch_blocks, s.accumulation]
        shared = [s.context_parallel] if s.context_parallel > 1 else []
        cut = ["tensor", s.tensor_parallel] if s.tensor_parallel > 1 else []
        return [self.parameters.total, self.block_size, *how, s.activation_checkpointing, *shared, *cut]

    def numbers(self) -> dict[str, float]:
        """The numbers that a report compares with measured ones, under the names of ``metrics.jsonl``."""
        known = {
            "parameters": self.parameters.total,
            "memory_bytes": self.memory.total,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "steps": self.steps,
        }
        if self.uncounted:
            del known["memory_bytes"]
        return {name: value for name, value in known.items() if value is not None}


def advise(
    setting: Setting, capacity: int, needs: Callable[[Setting], int], *, count: int = 3
) -> tuple[tuple[str, int], ...]:
    """The first ``count`` changes each of which is enough to fit. If none is, the most helpful ones combined, which may still
    not fit, as the bytes next to them show.
    """
    tried = []
    for name, changed in remedies(setting):
        with suppress(RequestError):  # a model without repeated layers cannot recompute them
            tried.append((name, changed, needs(changed)))
    good = [(name, least) for name, _, least in tried if least <= USABLE * capacity]
    if good:
        return tuple(good[:count])
    names, current = [], setting
    for name, changed, _ in sorted(tried, key=lambda one: one[2])[:count]:
        fields = {f: v for f, v in vars(changed).items() if v != getattr(setting, f)}
        names.append(name)
        current = replace(current, **fields)
    return ((" and ".join(names), needs(current)),) if names else ()


def checkpoint_bytes(counted: Parameters, *, optimizer_bytes: int) -> int:
    """Size of a checkpoint: fp32 weights and the optimizer's state."""
    return 4 * counted.total + counted.buffer_bytes + optimizer_bytes
