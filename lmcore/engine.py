"""The one door to accelerate: DDP, FSDP2, ZeRO-1/2/3 and mixed precision behind one small face.

Comes in: the launcher's environment, a module that returns ``(loss_sum, count)``, a way to make its
optimizer. Goes
out: the same training for every strategy, and the state by parameter name, whole tensors on the host.

What always holds:

- the process group, strategy and precision are those that were asked for; what accelerate would silently
  replace (one process instead of two, DDP instead of FSDP2, fp32 instead of fp16) is refused with the right
  command;
- the gradient is that of the global token mean, whatever the accumulation and the number of ranks (law 8);
- dropout depends on (seed, micro-batch key) only (law 10); the learning rate is set before the step (law 11);
- a non-finite loss or gradient never reaches the weights (law 12);
- nothing outside this room and its ``_strategy_*`` siblings knows which strategy runs (law 20).

Example::

    engine = Engine(precision="fp32", seed=1)
    engine.prepare(module, make_optimizer, gradient_accumulation=2, micro_batch_blocks=4, clip_norm=1.0)
    engine.set_learning_rate(3e-4)
    for batch, key in micro_batches:
        loss_sum, count = engine.forward(batch, key)
        engine.backward(loss_sum, label_count)
    norm, applied = engine.update()
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from torch import Tensor, nn

from lmcore import _strategy_fsdp as fsdp
from lmcore import _strategy_launch as launch
from lmcore import _strategy_zero as zero
from lmcore import optim
from lmcore._strategy_state import Skeleton, TensorState, whole
from lmcore._strategy_zero_state import ZeroState
from lmcore.errors import RequestError
from lmcore.model import compile_regions, decoder_layers, enable_activation_checkpointing

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Read = Callable[[str, str, str], Tensor | None]


class Entry(NamedTuple):
    """One tensor of the state: ``kind`` is "model" or "optim"; ``slot`` is "" for weights, else e.g.
    "exp_avg"."""

    kind: str
    name: str
    slot: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def launched_world_size() -> int:
    """The number of processes that the launcher started (``WORLD_SIZE``); 1 without a launcher."""
    return launch.world_size(os.environ)


class Engine:
    """One per process. Constructing it joins the process group; :meth:`close` leaves it.

    Args:
        precision: "fp32", "bf16", "fp16" (with loss scaling, CUDA only), "fp8" (handed to accelerate), or
            "auto": bf16 on a CUDA device that has it, else fp32. ``engine.precision`` is the resolved one.
        param_dtype: dtype of the weights that the optimizer updates: "fp32", or "bf16" to save memory.
        reduce_dtype: dtype in which gradients travel between ranks under FSDP2 and ZeRO.
        deepspeed: a file of ``ds_configs/``; ``None`` takes what the launcher says.
        timeout_seconds: how long a collective waits for a rank before the run ends with an error.
        compile: "none", or "regional": each layer by itself.
        compile_mode: torch.compile's mode.
        activation_checkpointing: recompute each layer in backward instead of keeping its activations.
        seed: the run's seed; dropout is derived from it.
        deterministic: bit-identical reruns on CUDA too, at the cost of speed.
        tf32: allow TF32 for fp32 matrix products on CUDA.

    Raises:
        RequestError: what was asked for cannot be had here; the message holds the remedy.
    """

    def __init__(
        self,
        *,
        precision: str = "auto",
        param_dtype: str = "fp32",
        reduce_dtype: str = "fp32",
        deepspeed: str | None = None,
        timeout_seconds: float = 1800.0,
        compile: str = "none",
        compile_mode: str | None = None,
        activation_checkpointing: bool = False,
        seed: int = 0,
        deterministic: bool = False,
        tf32: bool = True,
    ) -> None:
        request = launch.request(os.environ, deepspeed)
        launch.check_compile(os.environ)
        cuda = torch.cuda.is_available() and not launch.forced_to_cpu(os.environ)
        if (
            not cuda
        ):  # accelerate imports DeepSpeed when it unwraps a model, and that would say that it guesses
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.precision = launch.resolve_precision(precision, os.environ, cuda=cuda)
        self._with_zero = request.deepspeed is not None
        self._layers = {"compile": compile != "none", "checkpoint": activation_checkpointing}
        self._compile_mode = compile_mode
        self._param_dtype = fsdp.DTYPES[param_dtype]
        if param_dtype != "fp32" and (self._with_zero or request.strategy == "fsdp2"):
            raise RequestError(
                f"train.param_dtype {param_dtype} has no meaning under {request.strategy}, which keeps fp32 "
                "weights for the optimizer and computes in a copy: leave it out"
            )
        self._timeout = timedelta(seconds=timeout_seconds)
        backend = None
        plugins: dict[str, Any] = {}
        if request.deepspeed is not None:
            zero.check_compiler(request.deepspeed)
            zero.quiet_deepspeed(device_is_cpu=not cuda)
            zero.alone_environment(os.environ)
            config = zero.base_config(request.deepspeed, precision=self.precision, reduce_dtype=reduce_dtype)
            plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
            backend = None if cuda else "gloo"  # without it every rank would silently train alone on a CPU
        elif request.strategy == "fsdp2":
            plugins["fsdp_plugin"] = fsdp.plugin(precision=self.precision, reduce_dtype=reduce_dtype)
        self.accelerator = Accelerator(
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            cpu=not cuda and not self._with_zero,
            # A plugin object, not a number: a number would give way to the launcher's environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            dynamo_plugin=TorchDynamoPlugin(
                backend="no"
            ),  # layers are compiled here, for every strategy alike
            kwargs_handlers=[
                InitProcessGroupKwargs(backend=backend, timeout=self._timeout),
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True
                ),  # saves one copy of the gradients
            ],
            **plugins,
        )
        self.strategy = launch.check(self.accelerator, request, self.precision)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.local_rank: int = max(0, self.accelerator.local_process_index)
        self.world_size: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.is_local_main = self.local_rank == 0
        self._host_group = dist.new_group(backend="gloo", timeout=self._timeout) if self._grouped else None
        # A group that a collective has failed in is of no use any more, not even to ask who is missing.
        self._roll_call = dist.new_group(backend="gloo", timeout=self._timeout) if self._grouped else None
        self.seed = seed
        self._seed_everything(deterministic=deterministic, tf32=tf32)
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer
        self._micro_batch = 0
        self._rehearse = False
        self.updating = False
        """An update has begun and not ended: the weights may be between two steps."""

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
                must have built it with the same weights.
            make_optimizer: gets ``(name, parameter)`` pairs and returns a ``torch.optim`` optimizer over
                them.
            gradient_accumulation: micro-batches of one step on this rank.
            micro_batch_blocks: blocks of one micro-batch (DeepSpeed keeps its books by it).
            clip_norm: largest norm of the global gradient; 0 does not clip.
        """
        launch.check_accumulation(os.environ, gradient_accumulation)
        self._accumulation = gradient_accumulation
        self._clip_norm = clip_norm
        self._inner = module
        self._skeleton = Skeleton(module.model) if self._sharded and self.is_main else None
        if self._param_dtype is not torch.float32:
            for (
                parameter
            ) in module.parameters():  # not Module.to: buffers (rotary frequencies) stay as they are
                parameter.data = parameter.data.to(self._param_dtype)
        if self._layers["compile"]:  # before checkpointing: the recomputation is of the compiled layer
            compile_regions(module, self._compile_mode)
        if self._layers["checkpoint"]:
            enable_activation_checkpointing(module.model)
        optimizer = make_optimizer([(clean_name(name), p) for name, p in module.named_parameters()])
        buffers = persistent_buffers(module)
        if self._with_zero:
            self._prepare_zero(module, optimizer, micro_batch_blocks)
        else:
            if self.strategy == "fsdp2":
                fsdp.check_optimizer(optimizer)
                fsdp.name_layers(self.accelerator.state.fsdp_plugin, decoder_layers(module.model))
            # Only a buffer that is trained on (batch statistics) must be kept equal, and that costs every
            # forward.
            self.accelerator.ddp_handler.broadcast_buffers = bool(buffers)
            self.module, wrapped = self.accelerator.prepare(module, optimizer)
            self.optimizer = wrapped.optimizer
            self._state = TensorState(self._named_parameters(), persistent_buffers(module), self.optimizer)
        self._rehearse = self.strategy == "ddp" and self.world_size > 2
        self._scaler = self.accelerator.scaler
        self._trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._gate_on_device = gates_on_device(self.optimizer)
        self._micro_batch = 0

    def _prepare_zero(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, micro_batch_blocks: int
    ) -> None:
        zero.check_optimizer(optimizer)
        zero.batch_config(
            self.accelerator.deepspeed_plugin.deepspeed_config,
            micro_batch_blocks=micro_batch_blocks,
            accumulation=self._accumulation,
            world_size=self.world_size,
            clip_norm=self._clip_norm,
        )
        self.accelerator.gradient_accumulation_steps = self._accumulation
        floats = zero.float_buffers(module)
        exact = {clean_name(n): p.detach() for n, p in module.named_parameters() if self.precision != "fp32"}
        self.module, wrapped = self.accelerator.prepare(module, optimizer)
        zero.restore_buffers(module, floats, self.device)
        self.optimizer = wrapped.optimizer
        stage = int(self.strategy[-1])
        self._state = ZeroState(self._named_parameters(), persistent_buffers(module), self.optimizer, stage)
        for name, value in exact.items():  # DeepSpeed has made its fp32 weights from rounded ones
            self._state.put(name, "", value)

    # ---- one step ------------------------------------------------------------------------------------------

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the coming update."""
        optim.set_learning_rate(self.optimizer, learning_rate)

    def forward(self, batch: dict[str, Tensor], key: int | None = None) -> tuple[Tensor, Tensor]:
        """``(loss_sum, count)`` of one micro-batch of this rank, two 0-dim tensors (fp32, int64).

        In training ``key`` is the micro-batch's global index: it alone, with the seed, decides the dropout
        masks.
        """
        if self._rehearse and self.module.training and torch.is_grad_enabled():
            self._rehearse_backward(batch)
        if key is not None:
            torch.manual_seed(keyed_seed(self.seed, "dropout", key))
        if not torch.is_grad_enabled() and self.strategy == "ddp":
            return self._inner(**batch)  # the wrapper has nothing to do without a backward
        if self.module.training and torch.is_grad_enabled():
            self._announce(is_last=self._micro_batch == self._accumulation - 1)
        return self.module(**batch)

    def backward(self, loss_sum: Tensor, label_count: int | Tensor, last: bool | None = None) -> None:
        """Add this micro-batch's part to the gradient of the global token mean.

        ``label_count`` is the number of labels of the whole step over all ranks. ``last`` is only checked.
        """
        is_last = self._micro_batch == self._accumulation - 1
        if last is not None and last != is_last:
            raise ValueError(
                f"micro-batch {self._micro_batch + 1} of {self._accumulation} was called last={last}"
            )
        # Every strategy averages gradients over the ranks, hence the world size.
        count = torch.as_tensor(label_count, device=loss_sum.device).clamp(min=1)
        # A non-finite loss poisons its own gradient: the one gate, on the gradient's norm, sees it on all
        # ranks.
        loss = loss_sum * torch.where(torch.isfinite(loss_sum), self.world_size / count, torch.nan)
        if self._with_zero:
            self.module.backward(loss, scale_wrt_gas=False)
        else:
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        self._micro_batch += 1

    def update(self, norm_limit: float = math.inf) -> tuple[Tensor, Tensor]:
        """Clip, gate, step, clear the gradients.

        Args:
            norm_limit: an update whose gradient norm is above this is not applied (not under DeepSpeed).

        Returns:
            The global gradient norm before clipping (fp32) and whether the update was applied (bool), both
            0-dim on the device. Nothing waits for the device, except under DeepSpeed, which does so itself,
            and with an optimizer that has no fused form.
        """
        if self._micro_batch != self._accumulation:
            raise ValueError(f"update after {self._micro_batch} of {self._accumulation} micro-batches")
        self._micro_batch = 0
        self.updating = True
        norm, applied = self._update_zero() if self._with_zero else self._update(norm_limit)
        self.updating = False
        return norm, applied

    def _update(self, norm_limit: float) -> tuple[Tensor, Tensor]:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        parameters = [p for p in self._trained if p.grad is not None]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters])).float()
        applied = torch.isfinite(norm) & (norm <= norm_limit)
        if self._clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        if self._gate_on_device:
            self.optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]  # fused kernels obey it
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(applied):
            self.optimizer.step()
        if self._scaler is not None:
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

    def _update_zero(self) -> tuple[Tensor, Tensor]:
        # DeepSpeed itself clips, gates (norm of the reduced gradient) and clears; tests hold it to that.
        self.module.step()
        norm = torch.as_tensor(self.module.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        return norm, torch.tensor(not self.optimizer.overflow, device=self.device)  # type: ignore[attr-defined]

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

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """A new tensor: the sum of every rank's ``tensor``."""
        total = tensor.detach().clone()
        if self._grouped:
            dist.all_reduce(total)
        return total

    def agree(self, flags: int) -> int:
        """The bitwise OR of every rank's ``flags`` (below 2**63); on the host, the device is not waited
        for."""
        if not self._grouped:
            return flags
        # One number a bit, and the largest wins: not every gloo has bitwise operations.
        bits = (torch.tensor([flags]) >> torch.arange(63)) & 1
        self._collective("agree", lambda: dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=self._host_group))
        return int((bits << torch.arange(63)).sum())

    def barrier(self, name: str = "barrier") -> None:
        """Wait for every rank, on the host; the error after the timeout names the ranks that are missing."""
        if self._grouped:
            self._collective(name, lambda: dist.barrier(group=self._host_group))

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        box = [value]
        if self._grouped:
            self._collective(
                "broadcast", lambda: dist.broadcast_object_list(box, src=0, group=self._host_group)
            )
        return box[0]

    def gather_object(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        values = [value] * self.world_size
        if self._grouped:
            self._collective("gather", lambda: dist.all_gather_object(values, value, group=self._host_group))
        return values

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

    def load_state(self, read: Read) -> None:
        """Take over weights and optimizer slots; ``read(kind, name, slot)`` is called on every rank.

        It returns the whole tensor on the host, or ``None`` where the checkpoint has none. Every weight must
        be there; an optimizer slot that is missing starts afresh.

        Raises:
            RequestError: a weight is missing or of another shape.
        """
        with torch.no_grad():
            self._state.prime()  # first: a step, even an empty one, may touch the weights
            found = 0
            for entry in self.state_layout():
                value = read(entry.kind, entry.name, entry.slot)
                if value is not None and tuple(value.shape) != entry.shape:
                    raise RequestError(
                        f"{entry.name} {entry.slot} is {tuple(value.shape)} in the checkpoint but {entry.shape} "
                        "in this model: the checkpoint is of another model"
                    )
                if value is not None:
                    self._state.put(entry.name, entry.slot, value)
                    found += entry.kind == "optim"
                elif entry.kind == "model":
                    raise RequestError(f"the checkpoint has no tensor {entry.name}: it is of another model")
            if not found:
                self._state.forget()

    def optimizer_scalars(self) -> dict[str, Any]:
        """The optimizer's numbers (Adam's step count, the fp16 loss scale), as JSON."""
        slots = {slot: compress(values) for slot, values in self._state.scalars().items()}
        scalars: dict[str, Any] = {"slots": slots}
        if self._scaler is not None:
            scalars["scaler"] = self._scaler.state_dict()
        elif self._with_zero and self.precision == "fp16":
            scalars["scaler"] = {"scale": float(self.optimizer.loss_scaler.cur_scale)}  # type: ignore[attr-defined]
        return scalars

    def load_optimizer_scalars(self, scalars: dict[str, Any]) -> None:
        """The inverse of :meth:`optimizer_scalars`; call it after :meth:`load_state`."""
        for slot, stored in scalars.get("slots", {}).items():
            for name, _, _ in self._state.weights():
                value = stored.get(name) if isinstance(stored, dict) else stored
                if value is not None:
                    self._state.put_scalar(name, slot, value)
        scaler = scalars.get("scaler")
        if scaler and self._scaler is not None:
            self._scaler.load_state_dict({**self._scaler.state_dict(), **scaler})
        elif scaler and self._with_zero and self.precision == "fp16":
            self.optimizer.loss_scaler.cur_scale = scaler["scale"]  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def full_model(self) -> Iterator[nn.Module | None]:
        """The user's model with whole weights in evaluation mode on rank 0, ``None`` elsewhere.
        Collective."""
        try:
            with self.evaluation(), torch.no_grad():
                model = self._assemble() if self._sharded else self._inner.model
                yield model if self.is_main else None
        finally:
            if self._skeleton is not None:
                self._skeleton.empty()
            self.barrier("full_model")

    def describe(self) -> list[tuple[str, str]]:
        """Rows for the start table."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        devices = f"{self.world_size} x {name}"
        if self.device.type == "cpu":
            devices += f", {torch.get_num_threads()} threads each"
        return [("devices", devices), ("strategy", self.strategy), ("precision", self.precision)]

    def close(self) -> None:
        """Leave the process group. Calling it again does nothing."""
        self._host_group = self._roll_call = None
        if dist.is_initialized():
            dist.destroy_process_group()
        # accelerate keeps its state in class attributes; another engine of this process must not inherit it.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    # ---- private -------------------------------------------------------------------------------------------

    @property
    def _grouped(self) -> bool:
        return dist.is_initialized()

    @property
    def _sharded(self) -> bool:
        return self.strategy in ("fsdp2", "zero3")

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {clean_name(name): p for name, p in self._inner.named_parameters()}

    def _announce(self, *, is_last: bool) -> None:
        """Tell the wrapper, before the forward, whether this backward ends the step."""
        if self.strategy == "ddp":
            self.module.require_backward_grad_sync = is_last  # type: ignore[assignment]  # what no_sync() sets
        elif self._with_zero:
            self.module.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
        # FSDP2 reduces every micro-batch: holding back would keep whole gradients on every rank.

    def _rehearse_backward(self, batch: dict[str, Tensor]) -> None:
        """One backward whose gradients are thrown away.

        DDP orders its buckets anew after its first backward, and with three or more ranks the order decides
        how sums round. A run that resumes must not round its first step in another way than the run that
        never stopped.
        """
        self._rehearse = False
        kept = {name: buffer.clone() for name, buffer in self._inner.named_buffers()}
        self._announce(is_last=True)
        (self.module(**batch)[0] * 0.0).backward()
        self.module.zero_grad(set_to_none=True)
        for name, buffer in self._inner.named_buffers():
            buffer.copy_(kept[name])

    def _seed_everything(self, *, deterministic: bool, tf32: bool) -> None:
        torch.manual_seed(keyed_seed(self.seed, "engine", 0))
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
            torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]

    def _assemble(self) -> nn.Module | None:
        """A copy of the model with weights, on rank 0's host; the other ranks only take part in the
        gathering."""
        tensors = {}
        for name, _, _ in self._state.weights():
            tensor = self._state.gather(name, "")
            if self.is_main:
                tensors[name] = tensor.cpu()
        return self._skeleton.fill(tensors) if self._skeleton is not None else None

    def _collective(self, what: str, run: Callable[[], Any]) -> None:
        try:
            run()
        except (RuntimeError, dist.DistError) as error:
            raise RuntimeError(f"{what}: {self._absent()} ({error})") from error

    def _absent(self) -> str:
        """Which ranks did not come, as well as it can be found out after the fact."""
        try:
            dist.monitored_barrier(
                group=self._roll_call, timeout=min(self._timeout, timedelta(seconds=15)), wait_all_ranks=True
            )
        except (RuntimeError, dist.DistError) as error:
            return f"a rank is dead or stuck: {error}"
        return "a rank was too slow"


def clean_name(name: str) -> str:
    """A parameter's name in the user's model, without the prefixes of wrappers."""
    for part in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.").removeprefix("model.")


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that a checkpoint must hold, by name."""
    kept = set(module.state_dict(keep_vars=True))
    return {clean_name(name): b for name, b in module.named_buffers() if name in kept}


def keyed_seed(seed: int, purpose: str, key: int) -> int:
    """63 bits that depend on all three and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def gates_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer skips a step by ``found_inf``, a number on the device: torch's fused kernels
    do."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and type(optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def compress(values: dict[str, float]) -> float | dict[str, float]:
    """One number where all are equal (every parameter's step count is)."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values
