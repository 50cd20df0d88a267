"""One training step under any strategy: one process, DDP, FSDP2, ZeRO-1/2/3, in fp32, bf16 or fp16.

:class:`Engine` hides accelerate and DeepSpeed: the same calls train, save and load under every strategy, and the state
is addressed by parameter name. Guarantees (docs/architecture.md): the gradient is that of the mean loss over all labels
of the step, for any gradient accumulation and any number of ranks; dropout depends only on the seed and the
micro-batch; an update whose gradient is not finite is never applied.

Example::

    engine = Engine(TrainConfig(precision="fp32"), EngineConfig(), seed=1)
    engine.prepare(module, make_optimizer, gradient_accumulation=2, micro_batch_blocks=4, clip_norm=1.0)
    engine.set_learning_rate(3e-4)
    for batch, key in micro_batches:
        loss_sum, count = engine.forward(batch, key)
        engine.backward(loss_sum, label_count)
    norm, applied = engine.update()
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lmcore.checkpoint.copies import DeviceCopies
from lmcore.checkpoint.pieces import Held
from lmcore.config.schema import EngineConfig, TrainConfig
from lmcore.conventions import torch_dtype
from lmcore.engine import accelerator, context, launch, sharded_init, tensor, zero
from lmcore.engine import state as by_name
from lmcore.engine.allocator import keep_freed_memory
from lmcore.engine.draws import keyed_seed
from lmcore.engine.gradients import (
    WideGradients,
    average_in_bf16,
    naming_unused_parameters,
    refuse_without_gradient,
    settle_ddp_buckets,
)
from lmcore.engine.ranks import Ranks
from lmcore.engine.state import Stored, TensorState, clean_name, persistent_buffers
from lmcore.engine.zero_state import ZeroState
from lmcore.errors import RequestError
from lmcore.model import optim
from lmcore.model.module import (
    compile_regions,
    decoder_layers,
    enable_activation_checkpointing,
    narrow_residual_stream,
)

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
FindStored = Callable[[str, str, str], Stored | None]

HOST_WAIT_FACTOR = 10
"""The timeout of collectives on the host is ``engine.timeout_seconds`` times this, because one rank may be writing a large
checkpoint or tokenizing a corpus. Collectives on the device use ``engine.timeout_seconds`` itself."""


class Entry(NamedTuple):
    """One tensor of the state. ``kind`` is "model" or "optim"; ``slot`` is "" for weights, else e.g. "exp_avg"."""

    kind: str
    name: str
    slot: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Sampling(NamedTuple):
    """A model to sample from. Call ``forward(**inputs)``; if the model is sharded, use ``model`` for its attributes only."""

    model: nn.Module
    forward: Callable[..., Any]


class Engine:
    """Joins the process group, then trains under the strategy that the launcher chose. Create one in each process.

    The strategy comes from the environment variables that ``accelerate launch`` or ``torchrun`` sets (one process without
    a launcher), and from ``options.deepspeed``. What accelerate would silently replace (one process instead of two, DDP
    instead of FSDP2, fp32 instead of fp16) is refused with the command that does what was meant.

    Args:
        train: precision, dtypes, compilation, recomputation and determinism; :class:`lmcore.config.schema.TrainConfig`.
        options: DeepSpeed file, timeout and dtype of reductions; :class:`lmcore.config.schema.EngineConfig`.
        seed: seed of the run; dropout is derived from it.

    Attributes:
        strategy: "single", "ddp", "fsdp2", "zero1", "zero2" or "zero3".
        precision: "fp32", "bf16" or "fp16"; "auto" is resolved.
        residual_dtype: dtype of the residual stream: "fp32", "bf16" or "fp16"; "auto" is resolved.
        device: where this rank computes.
        rank, world_size: rank of this process, and the number of processes.
        context_parallel, context_rank: number of ranks that share each block, and which part of it this rank computes.
        tensor_parallel: number of ranks that share each layer; they compute the same blocks.
        data_rank, data_world_size: index of this rank's group of ranks that share blocks or layers, and the number of such
            groups. The blocks of a step are divided among these groups.
        is_main: whether this is rank 0.
        sharded: whether no rank holds the whole weights.
        compiled: whether layers are compiled; "auto" is resolved.
        needs_weights: whether this rank must build the model with its weights; if it is sharded, only rank 0 must.
        copies: pending copies of the state to the host (:class:`lmcore.checkpoint.writer.Checkpoints`), which run
            concurrently with the computation; :meth:`update` and :meth:`load_state` make the device wait for them.
        updating: true during an update, when the weights may be between two steps.

    Raises:
        RequestError: what was asked for is not available here; the message gives the remedy.
    """

    def __init__(
        self, train: TrainConfig | None = None, options: EngineConfig | None = None, *, seed: int = 0
    ) -> None:
        train, options = train or TrainConfig(), options or EngineConfig()
        request = launch.request(os.environ, options.deepspeed)
        launch.check_compile(os.environ)
        launch.check_groups(train, request.world_size, request.strategy)
        if train.tensor_parallel > 1 and launch.fill_in_mesh(os.environ) is not None:
            raise RequestError(
                f"train.tensor_parallel {train.tensor_parallel} has not been tested with HSDP{launch.launch_file(os.environ)}: "
                "use accelerate_configs/fsdp2.yaml"
            )
        cuda = launch.uses_cuda(os.environ)
        self.precision = launch.resolve_precision(train.precision, os.environ, cuda=cuda)
        self.compiled, self._compile_row = launch.compiles(train.compile, cuda=cuda)
        self._param_dtype = torch_dtype(train.param_dtype)
        launch.check_param_dtype(train.param_dtype, request.strategy)
        if train.param_dtype != "fp32" and self.precision != train.param_dtype:
            chosen = " (chosen by auto)" if train.precision == "auto" else ""
            raise RequestError(
                f"train.param_dtype {train.param_dtype} is for train.precision {train.param_dtype}, not for "
                f"{self.precision}{chosen}: give --train.precision {train.param_dtype}, or leave it out"
            )
        self.residual_dtype = launch.residual_dtype(
            train.residual_dtype,
            strategy=request.strategy,
            precision=self.precision,
            param_dtype=train.param_dtype,
            cuda=cuda,
        )
        # Gradients are summed in a wider dtype than that of the weights.
        self._wide = train.param_dtype != "fp32" and options.reduce_dtype == "fp32"
        timeout = timedelta(seconds=options.timeout_seconds)
        self.accelerator: Any = accelerator.build(
            request,
            precision=self.precision,
            reduce_dtype=options.reduce_dtype,
            timeout=timeout,
            cuda=cuda,
        )
        self.strategy = accelerator.built_strategy(self.accelerator)
        self._with_zero = self.strategy.startswith("zero")
        self.tensor_parallel = train.tensor_parallel
        self.sharded = self.strategy in ("fsdp2", "zero3") or self.tensor_parallel > 1
        self.device: torch.device = self.accelerator.device
        self._memory = keep_freed_memory() if self.device.type == "cpu" else None
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.context_parallel = train.context_parallel
        sharing = self.context_parallel * self.tensor_parallel
        self.data_rank = self.rank // sharing
        self.context_rank = self.rank % self.context_parallel
        self.data_world_size = self.world_size // sharing
        self._context_group: Any = None
        if self.context_parallel > 1:
            self._context_group = context.group_of(self.rank, self.context_parallel, self.world_size, timeout)
        self._tensor_ranks: tensor.TensorRanks | None = None
        if self.tensor_parallel > 1:
            self._tensor_ranks = tensor.TensorRanks(self.rank, self.tensor_parallel, self.world_size, timeout)
        self.needs_weights = self.is_main or not self.sharded
        self._ranks = Ranks(HOST_WAIT_FACTOR * timeout)
        self._precision_row = launch.describe_precision(train.precision, self.precision, cuda=cuda)
        if train.precision == "auto" and len(set(self.gather_object(self.precision))) > 1:
            raise RequestError(
                "train.precision auto: some of the machines compute in bf16 and others do not; give --train.precision fp32"
            )
        self._train, self._reduce_dtype = train, options.reduce_dtype
        self.seed = seed
        torch.manual_seed(keyed_seed(seed, "engine", 0))
        accelerator.choose_kernels(self.device, deterministic=train.deterministic, tf32=train.tf32)
        self.module: Any  # an nn.Module in its wrapper
        self.optimizer: Any  # a torch optimizer, or DeepSpeed's around one
        self._inner: Any  # the module without its wrapper; its ``model`` is the user's model
        self._state: TensorState | ZeroState
        self._micro_batch = 0
        self._settle_buckets = False
        self._state_known = False
        self.without_gradient: list[str] | None = None
        """Trained parameters without a gradient in the first step; ``None`` before it, and always under DeepSpeed."""
        self.copies = DeviceCopies()
        self.updating = False

    # ---- preparing -----------------------------------------------------------------------------------------

    def prepare(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        *,
        gradient_accumulation: int,
        micro_batch_blocks: int,
        clip_norm: float = 0.0,
    ) -> None:
        """Place, wrap and shard the module and its optimizer.

        Args:
            module: ``module(**batch) -> (loss_sum, count)``; the user's model is ``module.model``. Every rank
                must have built it with the same weights. If only rank 0 :attr:`needs_weights`, the parameters on other
                ranks may be empty (meta); they get their shards from rank 0.
            make_optimizer: called with ``(name, parameter)`` pairs; returns a ``torch.optim`` optimizer over them.
            gradient_accumulation: micro-batches of one step on this rank.
            micro_batch_blocks: blocks of one micro-batch (required by DeepSpeed).
            clip_norm: largest norm of the global gradient; 0 does not clip.
        """
        launch.check_accumulation(os.environ, gradient_accumulation)
        self._accumulation = gradient_accumulation
        self._clip_norm = clip_norm
        self._inner = module
        if self._context_group is not None:
            context.share_blocks(
                self._inner.model, self._context_group, self.context_parallel, self.context_rank
            )
        if self._param_dtype is not torch.float32:
            # Not Module.to, because buffers (rotary frequencies) must keep their dtype.
            for parameter in module.parameters():
                parameter.data = parameter.data.to(self._param_dtype)
        if self.residual_dtype == "bf16" and self.strategy in ("single", "ddp"):
            narrow_residual_stream(module)
        first = None
        if self.sharded or (self._with_zero and self.precision != "fp32"):
            # DeepSpeed alone would create its fp32 weights from rounded ones.
            first = sharded_init.FirstWeights(module, keep=self.is_main)
            first.check(self.gather_object(first.kind))
        if self.sharded:
            sharded_init.empty(module)
        if self._tensor_ranks is not None:
            tensor.refuse(self.tensor_parallel, tensor.why_not(self._inner.model, self.tensor_parallel))
            self._tensor_ranks.cut(self._inner.model, self.device)
            if self.compiled and (reason := tensor.why_not_compiled(self._inner.model)) is not None:
                tensor.refuse_to_compile(self._train.compile, reason)
                self.compiled, self._compile_row = False, f"off: {reason}"
        if self.compiled:  # before activation checkpointing, so that the compiled layer is recomputed
            compile_regions(module, self._train.compile_mode)
        if every := int(self._train.activation_checkpointing):
            enable_activation_checkpointing(self._inner.model, every=every)
        if self._with_zero:
            self._prepare_zero(module, make_optimizer(self._named(module)), micro_batch_blocks)
        elif self.strategy == "fsdp2":
            accelerator.wrap_layers(self.accelerator.state.fsdp_plugin, decoder_layers(self._inner.model))
            group = None if self._tensor_ranks is None else self._tensor_ranks.data_group
            self.module = sharded_init.shard_empty(module, self.accelerator, group)
            self.optimizer = accelerator.fsdp_optimizer(make_optimizer(self._named(module)))
        elif self._tensor_ranks is not None:
            sharded_init.allocate(module, self.device)
            self.optimizer = make_optimizer(self._named(module))
            self.module = accelerator.replicate(self.accelerator, module, self._tensor_ranks.data_group)
        else:
            optimizer = make_optimizer(self._named(module))
            if self._wide:
                sharded_init.same_on_every_rank(module, self.device)
                self.module = self.accelerator.prepare_model(module, evaluation_mode=True)  # without DDP
                self.optimizer = optimizer
            else:
                self.module, wrapped = self.accelerator.prepare(module, optimizer)
                self.optimizer = wrapped.optimizer
                if self.strategy == "ddp":
                    # Only buffers that training changes must be kept equal; a broadcast slows every forward.
                    self.module.broadcast_buffers = bool(persistent_buffers(module))
                    if self._reduce_dtype == "bf16" and self._param_dtype is torch.float32:
                        self.module.register_comm_hook(None, average_in_bf16)
        named, buffers = dict(self._named(module)), persistent_buffers(module)
        if self._with_zero:
            self._state = ZeroState(named, buffers, self.optimizer, int(self.strategy[-1]))
        else:
            self._state = TensorState(named, buffers, self.optimizer, self._tensor_ranks)
        if self._tensor_ranks is not None:
            tensor.check_optimizer(self.optimizer)
        if first is not None:
            first.give(self._state, self.device)
        averaging = self.world_size // self.tensor_parallel
        self._settle_buckets = self.strategy == "ddp" and averaging > 2 and not self._wide
        self._with_ddp = isinstance(self.module, nn.parallel.DistributedDataParallel)
        self._scaler = self.accelerator.scaler
        self._trained_names = {id(p): name for name, p in named.items()}
        self._parameter_names = set(named)
        self._trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._sums = WideGradients(self._trained, buffers.values()) if self._wide else None
        self._gate_on_device = by_name.gates_on_device(self.optimizer)
        self._micro_batch = 0

    def _prepare_zero(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, micro_batch_blocks: int
    ) -> None:
        zero.check_optimizer(optimizer)
        self.accelerator.gradient_accumulation_steps = self._accumulation
        config = self.accelerator.deepspeed_plugin.deepspeed_config
        zero.batch_config(
            config,
            micro_batch_blocks=micro_batch_blocks,
            accumulation=self._accumulation,
            world_size=self.world_size,
            clip_norm=self._clip_norm,
        )
        if self.sharded:
            sharded_init.partition_empty(module, optimizer, config, self.device)
        whole = decoder_layers(self._inner.model) if self.compiled and self.sharded else []
        self.module, self.optimizer = zero.wrap(self.accelerator, module, optimizer, whole_layers=whole)

    # ---- one step ------------------------------------------------------------------------------------------

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next update."""
        optim.set_learning_rate(self.optimizer, learning_rate)

    def set_momentum(self, momentum: float) -> None:
        """Set the momentum of the next update, if the optimizer has one (sgd, muon)."""
        optim.set_momentum(self.optimizer, momentum)

    def set_weight_decay(self, weight_decay: float) -> None:
        """Set the weight decay of the next update, for the parameters that decay."""
        optim.set_weight_decay(self.optimizer, weight_decay)

    def set_accumulation(self, gradient_accumulation: int) -> None:
        """Set the number of micro-batches of the next step on this rank. It must be the same on every rank."""
        if gradient_accumulation == self._accumulation:
            return
        if self._micro_batch:
            raise ValueError(f"the accumulation changes after {self._micro_batch} micro-batches of a step")
        launch.check_accumulation(os.environ, gradient_accumulation)
        self._accumulation = gradient_accumulation
        if self._with_zero:
            zero.set_accumulation(self.module, gradient_accumulation)

    def forward(self, batch: dict[str, Tensor], key: int | None = None) -> tuple[Tensor, Tensor]:
        """``(loss_sum, count)`` of one micro-batch of this rank: two 0-dim tensors (fp32, int64).

        Args:
            batch: the module's keyword arguments, e.g. ``input_ids`` and ``labels`` of shape (blocks, tokens), on the
                device.
            key: the global index of the micro-batch in training; together with the seed it decides the dropout masks.
        """
        if self._settle_buckets and self.module.training and torch.is_grad_enabled():
            self._settle_buckets = False
            settle_ddp_buckets(self.module, self._inner, batch)
        if key is not None:
            # The ranks of a context-parallel group have different tokens, so they need different masks
            part = f" {self.context_rank}" if self.context_rank else ""
            draw = keyed_seed(self.seed, f"dropout{part}", key)
            if self.device.type == "cpu":
                # torch.manual_seed would format the call stack for each kind of device that is absent, for a seed that is
                # never used.
                torch.default_generator.manual_seed(draw)
            else:
                torch.manual_seed(draw)
        if not torch.is_grad_enabled() and self.strategy == "ddp":
            return self._inner(**batch)  # without a backward the wrapper is not needed
        if self.module.training and torch.is_grad_enabled():
            self._announce(is_last=self._micro_batch == self._accumulation - 1)
        with naming_unused_parameters(self.module):
            return self.module(**batch)

    def backward(self, loss_sum: Tensor, label_count: int | Tensor) -> None:
        """Add this micro-batch's part to the gradient of the mean loss over all labels of the step.

        Args:
            loss_sum: from :meth:`forward`.
            label_count: the number of labels of the whole step, over all its micro-batches and ranks.
        """
        # Multiplied by the world size because every strategy averages gradients over the ranks, and divided by the number of
        # ranks that share layers because these compute the same loss.
        # An int stays an int: converted to a tensor it would be copied to the device, and the host would wait.
        count = label_count.clamp(min=1) if isinstance(label_count, Tensor) else max(label_count, 1)
        # Turn a non-finite loss into NaN gradients, so that the check of the gradient norm sees it on every rank.
        loss = loss_sum * torch.where(
            torch.isfinite(loss_sum), self.world_size // self.tensor_parallel / count, torch.nan
        )
        if self._with_zero:
            self.module.backward(loss, scale_wrt_gas=False)
        else:
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        self._micro_batch += 1

    def update(self, norm_limit: float = math.inf) -> tuple[Tensor, Tensor]:
        """Clip the gradients, apply the update if their norm is finite, and clear the gradients.

        Args:
            norm_limit: an update whose gradient norm is above this is not applied (not available under ZeRO).

        Returns:
            The global gradient norm before clipping (fp32) and whether the update was applied (bool), both 0-dim on
            :attr:`device`. The host does not wait for the device, except under DeepSpeed, which synchronizes itself, and
            with an optimizer that cannot skip an update on the device.

        Raises:
            ValueError: not all micro-batches of the step have gone through :meth:`backward`.
            RequestError: under DDP, a trained parameter has no gradient (nothing was changed); or the optimizer keeps state
                that a checkpoint cannot hold.
        """
        if self._micro_batch != self._accumulation:
            raise ValueError(f"update after {self._micro_batch} of {self._accumulation} micro-batches")
        if self._with_zero and norm_limit != math.inf:
            raise ValueError("norm_limit: DeepSpeed itself decides which updates are applied")
        self._micro_batch = 0
        self.copies.before_writing()
        self.updating = True
        norm, applied = self._update_zero() if self._with_zero else self._update(norm_limit)
        self.updating = False
        inner = self.optimizer.optimizer if self._with_zero else self.optimizer
        if not self._state_known and inner.state:
            by_name.refuse_other_state(inner)  # fail at the first update, not at the first save
            self._state_known = True
        return norm, applied

    def _update(self, norm_limit: float) -> tuple[Tensor, Tensor]:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        parameters = [p for p in self._trained if p.grad is not None]
        if self._with_ddp:  # before anything is changed
            refuse_without_gradient(self.module, [p for p in self._trained if p.grad is None])
        if self.without_gradient is None:
            self.without_gradient = [self._trained_names[id(p)] for p in self._trained if p.grad is None]
        gradients = [p.grad for p in parameters] if self._sums is None else self._sums.reduced()
        norm = self._total_norm(parameters, gradients)
        applied = torch.isfinite(norm) & (norm <= norm_limit)
        if self._sums is not None:
            self._sums.give_to_parameters(norm, self._clip_norm)
        elif self._clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        if self._gate_on_device:
            by_name.fill_in_momenta(self.optimizer)
            self.optimizer.found_inf = (~applied).float()  # fused kernels obey it
            self.optimizer.grad_scale = None
            self.optimizer.step()
        elif bool(applied):
            by_name.step_with_first_momenta(self.optimizer)
        if self._scaler is not None:
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # With offloading, the gradients and so their norm are on the host.
        return norm.to(self.device, non_blocking=True), applied.to(self.device, non_blocking=True)

    def _total_norm(self, parameters: list[nn.Parameter], gradients: list[Any]) -> Tensor:
        if self._tensor_ranks is None:
            return by_name.whole(nn.utils.get_total_norm(gradients)).float()
        named = {self._trained_names[id(p)]: g for p, g in zip(parameters, gradients, strict=True)}
        self._tensor_ranks.settle(named)
        return self._tensor_ranks.total_norm(named)

    def _update_zero(self) -> tuple[Tensor, Tensor]:
        # DeepSpeed itself clips, skips an update that is not finite, and clears the gradients; tests check that it does.
        self.module.step()
        norm = torch.as_tensor(self.module.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        return norm, torch.tensor(not self.optimizer.overflow, device=self.device)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context manager that puts the module into evaluation mode, and restores its mode afterwards."""
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

    # ---- between ranks -------------------------------------------------------------------------------------

    def sum_over_ranks(self, tensor: Tensor, own: Tensor | None = None) -> Tensor:
        """The sum of ``tensor`` over the ranks, in a new tensor on the same device. Collective.

        Of the ranks that share layers, and so compute the same blocks, only the first counts. With ``own``, the sum of
        ``own`` over all ranks is appended (both 1-dim)."""
        ranks = self._tensor_ranks
        counted = tensor if ranks is None or ranks.rank == 0 else torch.zeros_like(tensor)
        return self._ranks.sum(counted if own is None else torch.cat([counted, own]))

    def agree(self, flags: int) -> int:
        """The bitwise OR of every rank's ``flags`` (below 2**63).

        Runs on the host, so that it does not wait for the device, and after the timeout an error names the missing rank.
        The same holds for the next three methods."""
        return self._ranks.agree(flags)

    def barrier(self, name: str = "barrier") -> None:
        """Wait for every rank; ``name`` is shown in the error."""
        self._ranks.barrier(name)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        return self._ranks.broadcast(value)

    def gather_object(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        return self._ranks.gather(value)

    # ---- state ---------------------------------------------------------------------------------------------

    def state_layout(self) -> list[Entry]:
        """The entries that :meth:`state` will yield; the same on every rank, without communication."""
        weights = [Entry("model", name, "", shape, dtype) for name, shape, dtype in self._state.weights()]
        return weights + [Entry("optim", *slot) for slot in self._state.slots()]

    def state(self) -> Iterator[tuple[str, str, str, Tensor | None]]:
        """Yield ``(kind, name, slot, tensor)``, one at a time, in the order of :meth:`state_layout`. Collective.

        On rank 0 the tensor is whole, contiguous, a copy, and on the host. On other ranks it is ``None``.
        """
        for entry in self.state_layout():
            tensor = self._state.gather(entry.name, entry.slot)
            copied = torch.empty(entry.shape, dtype=entry.dtype).copy_(tensor) if self.is_main else None
            yield entry.kind, entry.name, entry.slot, copied

    def state_parts(self) -> list[Held]:
        """This rank's part of every tensor of the state, for a checkpoint. No communication.

        Only buffers on a GPU are copied, because a forward may change them; all other tensors are changed only by
        :meth:`update` and :meth:`load_state`."""
        parts = []
        for kind, name, slot, shape, _ in self.state_layout():
            part, tensor, holders = self._state.held(name, slot)
            if tensor.is_cuda and not slot and name not in self._parameter_names:
                tensor = tensor.clone()
            parts.append(Held(kind, name, slot, shape, part, tensor, holders))
        return parts

    def load_state(self, stored: FindStored) -> None:
        """Load weights and optimizer slots; every rank reads only its own part.

        Args:
            stored: called as ``stored(kind, name, slot)`` on every rank; returns a tensor that can be read in parts
                (:class:`lmcore.checkpoint.reader.Stored`), or ``None`` if the checkpoint does not have it. Every weight must
                exist; an optimizer slot that is missing starts at zero.

        Raises:
            RequestError: a weight is missing, or a tensor has another shape.
        """
        self.copies.before_writing()
        by_name.load(self._state, self.state_layout, stored)

    def optimizer_scalars(self) -> dict[str, Any]:
        """The optimizer's numbers (Adam's step count, the fp16 loss scale), as JSON."""
        return by_name.scalars(self._state, self._scaler, self.optimizer)

    def load_optimizer_scalars(self, scalars: dict[str, Any]) -> None:
        """The inverse of :meth:`optimizer_scalars`; call it after :meth:`load_state`."""
        by_name.load_scalars(self._state, self._scaler, self.optimizer, scalars)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Sampling | None]:
        """Context manager with the user's model in evaluation mode, for generating text. Collective.

        If every rank has the whole model, rank 0 gets it, and the other ranks get ``None`` and wait at the end. It computes
        in fp32, or under autocast on a GPU and with flash attention, which does not support fp32.

        If the model is sharded, no rank ever holds the whole model. Every rank gets it, and all ranks must call
        :attr:`Sampling.forward` together, equally often and with the same inputs. It computes in the dtypes of training.
        """
        try:
            with self.evaluation(), torch.no_grad():
                if self.sharded:
                    self._inner.without_loss = True
                    yield Sampling(self._inner.model, self._forward_sharded)
                else:
                    with self._autocast(self._inner.model):
                        yield Sampling(self._inner.model, self._inner.model) if self.is_main else None
        finally:
            if self.sharded:
                self._inner.without_loss = False
                for part in self.module.modules():  # FSDP2 keeps embedding and head unsharded after a forward
                    if isinstance(part, FSDPModule):
                        part.reshard()
            self.barrier("sampling")

    def _forward_sharded(self, **inputs: Any) -> Any:
        on_device = {key: v.to(self.device) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        return self.module(**on_device)

    @property
    def device_name(self) -> str:
        """The name of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def describe(self) -> list[tuple[str, str]]:
        """Rows (label, value) for the table that is shown at the start."""
        devices = f"{self.world_size} x {self.device_name}"
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            devices += f", {threads} thread{'s' * (threads > 1)}{' each' * (self.world_size > 1)}"
            if not launch.forced_to_cpu(os.environ) and "CUDA_VISIBLE_DEVICES" not in os.environ:
                devices += " (no GPU found)"
        precision = self._precision_row
        if self.precision != "fp32":
            precision += f", residual stream {self.residual_dtype}"
        rows = [("devices", devices), ("strategy", self.strategy), ("precision", precision)]
        if self.strategy == "fsdp2" and (mesh := launch.fill_in_mesh(os.environ)) is not None:
            rows[1] = ("strategy", f"fsdp2, {mesh[0]} replicas of {mesh[1]} shards")
        if self.context_parallel > 1:
            rows.append(
                (
                    "context parallel",
                    f"each block over {self.context_parallel} processes, {self.data_world_size} at a time",
                )
            )
        if self.tensor_parallel > 1:
            each = f"each layer over {self.tensor_parallel} processes, {self.data_world_size} x {self.tensor_parallel} in all"
            rows.append(("tensor parallel", each))
        rows.append(("compile", self._compile_row))
        return [*rows, ("memory", self._memory)] if self._memory else rows

    def close(self) -> None:
        """Leave the process group. A second call is a no-op.

        While an exception is being handled (in ``finally``, or when a ``with`` block fails) the other ranks may never
        call this. Then the connections are dropped instead of closed together. Print the traceback before.
        """
        if sys.exc_info()[1] is None:
            self._ranks.close()
        else:
            sys.stdout.flush()
            sys.stderr.flush()
            self._ranks.abort()
        accelerator.forget()

    # ---- private -------------------------------------------------------------------------------------------

    @staticmethod
    def _named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [(clean_name(name), p) for name, p in module.named_parameters()]

    @contextlib.contextmanager
    def _autocast(self, model: nn.Module) -> Iterator[None]:
        """Autocast for sampling on a GPU, or with attention kernels that support 16-bit dtypes only."""
        attention = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
        device = self.device.type
        wanted = self.precision != "fp32" and (device == "cuda" or attention.startswith("flash"))
        with torch.autocast(device, torch_dtype(self.precision), enabled=wanted):
            yield

    def _announce(self, *, is_last: bool) -> None:
        """Tell the wrapper, before the forward, whether this backward ends the step."""
        if self._with_ddp:
            self.module.require_backward_grad_sync = is_last  # the flag that no_sync() sets
        elif self._with_zero:
            self.module.set_gradient_accumulation_boundary(is_last)
        # FSDP2 reduces gradients in every micro-batch: deferring it would keep unsharded gradients on every rank.
