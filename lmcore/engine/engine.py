"""One training step under any strategy: one process, DDP, FSDP2, ZeRO-1/2/3, in fp32, bf16 or fp16.

:class:`Engine` hides accelerate and DeepSpeed: the same calls train, save and load under every strategy, and the state
goes by parameter name, in whole tensors on the host. Guarantees (docs/architecture.md): the gradient is that of the mean
over all labels of the step, whatever the accumulation and the number of ranks; dropout depends on the seed and the
micro-batch only; an update whose gradient is not finite is never applied.

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
"""Ranks wait this many times ``engine.timeout_seconds`` for one another on the host, where one of them may write a long
checkpoint or tokenize a corpus. Collectives of the device wait once that."""


class Entry(NamedTuple):
    """One tensor of the state: ``kind`` "model" or "optim"; ``slot`` "" for weights, else e.g. "exp_avg"."""

    kind: str
    name: str
    slot: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Sampling(NamedTuple):
    """``forward(**inputs)`` computes what ``model`` returns; ``model`` itself is for its attributes, where it is sharded."""

    model: nn.Module
    forward: Callable[..., Any]


class Engine:
    """Joins the process group, then trains under the strategy that the launcher chose. One in each process.

    The strategy comes from the environment that ``accelerate launch`` or ``torchrun`` leaves (one process without a
    launcher), and from ``options.deepspeed``. What accelerate would silently replace (one process instead of two, DDP
    instead of FSDP2, fp32 instead of fp16) is refused with the command that does what was meant.

    Args:
        train: precision, types, compilation, recomputation and determinism; :class:`lmcore.config.schema.TrainConfig`.
        options: DeepSpeed file, time limit and type of reductions; :class:`lmcore.config.schema.EngineConfig`.
        seed: seed of the run; dropout is derived from it.

    Attributes:
        strategy: "single", "ddp", "fsdp2", "zero1", "zero2" or "zero3".
        precision: "fp32", "bf16" or "fp16"; "auto" is resolved.
        residual_dtype: of the residual stream, likewise; "auto" is resolved.
        device: where this rank computes.
        rank, world_size: of this process, and how many there are.
        context_parallel, context_rank: how many ranks share each block, and which part of it this one computes.
        tensor_parallel: how many ranks share each layer; they compute the same blocks.
        data_rank, data_world_size: of the ranks that share blocks or layers, and how many such groups there are: by these
            numbers the blocks of a step are divided.
        is_main: whether this is rank 0.
        sharded: whether no rank holds the whole weights.
        compiled: whether layers are compiled; "auto" is resolved.
        needs_weights: whether this rank must build the model with its weights; where it is sharded only rank 0.
        copies: what copies the state to the host beside the computation (:class:`lmcore.checkpoint.writer.Checkpoints`);
            :meth:`update` and :meth:`load_state` wait for it on the device.
        updating: true during an update, when the weights may be between two steps.

    Raises:
        RequestError: what was asked for is not available here; the message holds the remedy.
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
        # Gradients summed in a wider type than the weights have.
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
        self._inner: Any  # the module without its wrapper; its ``model`` is the user's
        self._state: TensorState | ZeroState
        self._micro_batch = 0
        self._settle_buckets = False
        self._state_known = False
        self.without_gradient: list[str] | None = None
        """Trained parameters that took no part in the loss of the first step; ``None`` before it, and under DeepSpeed."""
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
                must have built it with the same weights; where only rank 0 :attr:`needs_weights`, the others may
                have empty (meta) parameters, and get their parts of rank 0's.
            make_optimizer: gets ``(name, parameter)`` pairs, returns a ``torch.optim`` optimizer over them.
            gradient_accumulation: micro-batches of one step on this rank.
            micro_batch_blocks: blocks of one micro-batch (DeepSpeed needs to know).
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
            # Not Module.to: buffers (rotary frequencies) stay as they are.
            for parameter in module.parameters():
                parameter.data = parameter.data.to(self._param_dtype)
        if self.residual_dtype == "bf16" and self.strategy in ("single", "ddp"):
            narrow_residual_stream(module)
        first = None
        if self.sharded or (self._with_zero and self.precision != "fp32"):
            # DeepSpeed by itself would make its fp32 weights from rounded ones.
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
        if self.compiled:  # before checkpointing: the recomputation is of the compiled layer
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
                    # Only buffers that training changes must be kept equal, and that costs every forward.
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
        """Set the rate of the coming update."""
        optim.set_learning_rate(self.optimizer, learning_rate)

    def set_momentum(self, momentum: float) -> None:
        """Set the momentum of the coming update, where the optimizer has one (sgd, muon)."""
        optim.set_momentum(self.optimizer, momentum)

    def set_weight_decay(self, weight_decay: float) -> None:
        """Set the weight decay of the coming update, for the parameters that decay."""
        optim.set_weight_decay(self.optimizer, weight_decay)

    def set_accumulation(self, gradient_accumulation: int) -> None:
        """Set the number of micro-batches of the coming step on this rank; the same on every rank."""
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
            batch: what the module takes, e.g. ``input_ids`` and ``labels`` of shape (blocks, tokens), on the device.
            key: the micro-batch's global index in training: with the seed it decides the dropout masks.
        """
        if self._settle_buckets and self.module.training and torch.is_grad_enabled():
            self._settle_buckets = False
            settle_ddp_buckets(self.module, self._inner, batch)
        if key is not None:
            # The ranks of a group have other tokens
            part = f" {self.context_rank}" if self.context_rank else ""
            draw = keyed_seed(self.seed, f"dropout{part}", key)
            if self.device.type == "cpu":
                # torch.manual_seed would, for each kind of device that is not there, format the call stack for a seed that
                # is never used.
                torch.default_generator.manual_seed(draw)
            else:
                torch.manual_seed(draw)
        if not torch.is_grad_enabled() and self.strategy == "ddp":
            return self._inner(**batch)  # the wrapper has nothing to do without a backward
        if self.module.training and torch.is_grad_enabled():
            self._announce(is_last=self._micro_batch == self._accumulation - 1)
        with naming_unused_parameters(self.module):
            return self.module(**batch)

    def backward(self, loss_sum: Tensor, label_count: int | Tensor) -> None:
        """Add this micro-batch's part to the gradient of the global token mean.

        Args:
            loss_sum: from :meth:`forward`.
            label_count: the number of labels of the whole step, over all its micro-batches and ranks.
        """
        # Every strategy averages gradients over the ranks, hence their number; those that share layers compute the same
        # loss, of which every one has its part of the gradient.
        # A number stays a number: as a tensor it would be copied to the device, and the host would wait.
        count = label_count.clamp(min=1) if isinstance(label_count, Tensor) else max(label_count, 1)
        # A non-finite loss makes its own gradient NaN: the check of the gradient's norm then sees it on every rank.
        loss = loss_sum * torch.where(
            torch.isfinite(loss_sum), self.world_size // self.tensor_parallel / count, torch.nan
        )
        if self._with_zero:
            self.module.backward(loss, scale_wrt_gas=False)
        else:
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        self._micro_batch += 1

    def update(self, norm_limit: float = math.inf) -> tuple[Tensor, Tensor]:
        """Clip the gradients, apply the update unless its norm is not finite, clear the gradients.

        Args:
            norm_limit: an update whose gradient norm is above this is not applied (not under ZeRO).

        Returns:
            The global gradient norm before clipping (fp32) and whether the update was applied (bool), both 0-dim on
            :attr:`device`. Nothing waits for the device, except under DeepSpeed, which does so itself, and with an
            optimizer that has no fused form.

        Raises:
            ValueError: not all micro-batches of the step have been through :meth:`backward`.
            RequestError: under DDP, a trained parameter has no gradient; nothing was changed.
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
            by_name.refuse_other_state(inner)  # at the first update, not at the first save
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
        # Under offloading gradients, and with them the norm, are on the host.
        return norm.to(self.device, non_blocking=True), applied.to(self.device, non_blocking=True)

    def _total_norm(self, parameters: list[nn.Parameter], gradients: list[Any]) -> Tensor:
        if self._tensor_ranks is None:
            return by_name.whole(nn.utils.get_total_norm(gradients)).float()
        named = {self._trained_names[id(p)]: g for p, g in zip(parameters, gradients, strict=True)}
        self._tensor_ranks.settle(named)
        return self._tensor_ranks.total_norm(named)

    def _update_zero(self) -> tuple[Tensor, Tensor]:
        # DeepSpeed itself clips, skips an update that is not finite, and clears the gradients; tests hold it to that.
        self.module.step()
        norm = torch.as_tensor(self.module.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        return norm, torch.tensor(not self.optimizer.overflow, device=self.device)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Dropout off inside, on again afterwards."""
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

    # ---- between ranks -------------------------------------------------------------------------------------

    def sum_over_ranks(self, tensor: Tensor, own: Tensor | None = None) -> Tensor:
        """A new tensor on the same device: the sum of every rank's ``tensor``; of ranks that share layers, and so compute
        the same blocks, the first one's only. With ``own`` the sum of every rank's ``own`` follows it (both 1-dim)."""
        ranks = self._tensor_ranks
        counted = tensor if ranks is None or ranks.rank == 0 else torch.zeros_like(tensor)
        return self._ranks.sum(counted if own is None else torch.cat([counted, own]))

    def agree(self, flags: int) -> int:
        """The bitwise OR of every rank's ``flags`` (below 2**63). On the host: no device is waited for, and
        an error after the timeout names the rank that is missing; the next three methods do the same."""
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
        """What :meth:`state` will yield, on every rank, without any communication."""
        weights = [Entry("model", name, "", shape, dtype) for name, shape, dtype in self._state.weights()]
        return weights + [Entry("optim", *slot) for slot in self._state.slots()]

    def state(self) -> Iterator[tuple[str, str, str, Tensor | None]]:
        """``(kind, name, slot, tensor)``, one at a time, in the order of the layout. Collective.

        The tensor is whole, contiguous, a copy of its own and on the host on rank 0, ``None`` on the other
        ranks.
        """
        for entry in self.state_layout():
            tensor = self._state.gather(entry.name, entry.slot)
            copied = torch.empty(entry.shape, dtype=entry.dtype).copy_(tensor) if self.is_main else None
            yield entry.kind, entry.name, entry.slot, copied

    def state_parts(self) -> list[Held]:
        """What this rank holds of every tensor of the state, for a checkpoint. Nothing is communicated, and only buffers on a
        GPU are copied: a forward may change them, while nothing but :meth:`update` and :meth:`load_state` changes the rest."""
        parts = []
        for kind, name, slot, shape, _ in self.state_layout():
            part, tensor, holders = self._state.held(name, slot)
            if tensor.is_cuda and not slot and name not in self._parameter_names:
                tensor = tensor.clone()
            parts.append(Held(kind, name, slot, shape, part, tensor, holders))
        return parts

    def load_state(self, stored: FindStored) -> None:
        """Load weights and optimizer slots; every rank reads its own part only.

        Args:
            stored: called as ``stored(kind, name, slot)`` on every rank; returns what can be read in parts
                (:class:`lmcore.checkpoint.reader.Stored`), or ``None`` where the checkpoint has none. Every weight must be
                there; an optimizer slot that is missing starts at zero.

        Raises:
            RequestError: a weight is missing or of another shape.
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
        """The user's model in evaluation mode, to generate with. Collective.

        Where every rank has the whole model, rank 0 gets it, and ``None`` the others, which wait. Where it is sharded, every
        rank gets it, and all of them must call :attr:`Sampling.forward` together with the same inputs, as often as one
        another: no rank ever holds the whole model. Then it computes in the types of the training. Else in fp32, and under
        autocast on a GPU or with flash attention, which takes no fp32.
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
                for part in self.module.modules():  # FSDP2 leaves embedding and head whole after a forward
                    if isinstance(part, FSDPModule):
                        part.reshard()
            self.barrier("sampling")

    def _forward_sharded(self, **inputs: Any) -> Any:
        on_device = {key: v.to(self.device) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        return self.module(**on_device)

    @property
    def device_name(self) -> str:
        """What the device calls itself."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def describe(self) -> list[tuple[str, str]]:
        """Rows for the start table."""
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
        """Leave the process group. Calling it again does nothing.

        While an exception is being handled (in ``finally``, or when a ``with`` block fails) the other ranks may never
        come: then the connections are dropped instead of closed together. Print the traceback before.
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
        """Autocast for sampling on a GPU, or with kernels that take 16-bit numbers only."""
        attention = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
        device = self.device.type
        wanted = self.precision != "fp32" and (device == "cuda" or attention.startswith("flash"))
        with torch.autocast(device, torch_dtype(self.precision), enabled=wanted):
            yield

    def _announce(self, *, is_last: bool) -> None:
        """Tell the wrapper, before the forward, whether this backward ends the step."""
        if self._with_ddp:
            self.module.require_backward_grad_sync = is_last  # what no_sync() sets
        elif self._with_zero:
            self.module.set_gradient_accumulation_boundary(is_last)
        # FSDP2 reduces every micro-batch: holding back would keep whole gradients on every rank.
