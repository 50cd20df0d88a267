"""The one door to accelerate: DDP, FSDP2, ZeRO-1/2/3 and mixed precision behind one small face.

Comes in: the launcher's environment, a module that returns ``(loss_sum, count)``, a way to make its
optimizer. Goes out: the same training for every strategy, and the state by parameter name, whole tensors on
the host.

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
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from torch import Tensor, nn

from lmcore import _strategy_launch as launch
from lmcore.errors import RequestError

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


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
        deepspeed: a file of ``ds_configs/``; ``None`` takes what the launcher says.
        timeout_seconds: how long a collective waits for a rank before the run ends with an error.
        compile: "none", "regional" (each repeated block by itself: starts faster, same speed) or "full".
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
        deepspeed: str | None = None,
        timeout_seconds: float = 1800.0,
        compile: str = "none",
        seed: int = 0,
        deterministic: bool = False,
        tf32: bool = True,
    ) -> None:
        request = launch.request(os.environ, deepspeed)
        cuda = torch.cuda.is_available() and not launch.forced_to_cpu(os.environ)
        self.precision = launch.resolve_precision(precision, os.environ, cuda=cuda)
        self.strategy = request.strategy
        self.seed = seed
        self._compile = launch.resolve_compile(compile, os.environ)
        self._param_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[param_dtype]
        handlers: list[Any] = [
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
            # The bucket view saves one copy of the gradients.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        self.accelerator = Accelerator(
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            cpu=not cuda,
            # A plugin object, not a number: a number would give way to the launcher's environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            # compile is done here, in place; the launcher's dynamo flags reach only some of the strategies.
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            kwargs_handlers=handlers,
        )
        launch.check(self.accelerator, request, os.environ, self.precision)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.local_rank: int = max(0, self.accelerator.local_process_index)
        self.world_size: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.is_local_main = self.local_rank == 0
        self._timeout = timedelta(seconds=timeout_seconds)
        self._host_group = dist.new_group(backend="gloo", timeout=self._timeout) if self._grouped else None
        self._seed_everything(deterministic=deterministic, tf32=tf32)
        self.module: nn.Module
        self.optimizer: torch.optim.Optimizer
        self._micro_batch = 0

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
        self._module = module
        if self._param_dtype is torch.bfloat16:
            module.to(torch.bfloat16)
        self._compile_in_place(module)
        optimizer = make_optimizer([(clean_name(name), p) for name, p in module.named_parameters()])
        self.module, wrapped = self.accelerator.prepare(module, optimizer)
        self.optimizer = wrapped.optimizer
        self._named = {clean_name(name): p for name, p in self._module.named_parameters()}
        self._scaler = self.accelerator.scaler
        self._gate_on_device = all(group.get("fused") for group in self.optimizer.param_groups)
        self._micro_batch = 0

    # ---- one step ------------------------------------------------------------------------------------------

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the coming update; a group's ``lr_scale`` multiplies it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)

    def forward(self, batch: dict[str, Tensor], key: int | None = None) -> tuple[Tensor, Tensor]:
        """``(loss_sum, count)`` of one micro-batch of this rank, two 0-dim tensors (fp32, int64).

        In training ``key`` is the micro-batch's global index: it alone, with the seed, decides the dropout
        masks.
        """
        if key is not None:
            torch.manual_seed(keyed_seed(self.seed, "dropout", key))
        if self.module.training and torch.is_grad_enabled():
            self._sync_gradients(self._micro_batch == self._accumulation - 1)
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
        # A non-finite loss poisons its own gradient, so that the one gate on the gradient's norm sees it on
        # all ranks.
        scale = torch.where(torch.isfinite(loss_sum), self.world_size / count, torch.nan)
        loss = loss_sum * scale
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        self._micro_batch += 1

    def update(self) -> tuple[Tensor, Tensor]:
        """Clip, gate, step, clear the gradients.

        Returns:
            The global gradient norm before clipping (fp32) and whether the update was applied (bool), both
            0-dim on the device; nothing waits for the device unless the optimizer has no fused form.
        """
        if self._micro_batch != self._accumulation:
            raise ValueError(f"update after {self._micro_batch} of {self._accumulation} micro-batches")
        self._micro_batch = 0
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        parameters = [p for p in self._named.values() if p.grad is not None]
        norm = self._whole(nn.utils.get_total_norm([p.grad for p in parameters]))
        applied = torch.isfinite(norm)
        if self._clip_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        if self._gate_on_device:
            self.optimizer.found_inf = (~applied).float()  # fused kernels return at once where this is 1
            self.optimizer.grad_scale = None
            self.optimizer.step()
        elif bool(applied):
            self.optimizer.step()
        if self._scaler is not None:
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, applied

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
        shared = torch.tensor([flags], dtype=torch.int64)
        # gloo knows no bitwise operation on every version: one byte a bit, and the largest wins.
        bits = (shared >> torch.arange(63)) & 1
        self._collective("agree", lambda: dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=self._host_group))
        return int((bits << torch.arange(63)).sum())

    def barrier(self, name: str = "") -> None:
        """Wait for every rank, on the host; the error after the timeout names the ranks that are missing."""
        if self._grouped:
            self._collective(name or "barrier", lambda: dist.barrier(group=self._host_group))

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
        layout = [Entry("model", name, "", tuple(t.shape), t.dtype) for name, t in self._weights()]
        for name, parameter in self._named.items():
            slots = self.optimizer.state.get(parameter, {})
            for slot in sorted(slots):
                value = slots[slot]
                if isinstance(value, Tensor) and value.ndim > 0:
                    layout.append(Entry("optim", name, slot, tuple(value.shape), value.dtype))
        return layout

    def state(self) -> Iterator[tuple[str, str, str, Tensor | None]]:
        """``(kind, name, slot, tensor)``, one at a time, in the order of the layout. Collective.

        The tensor is whole, contiguous and on the host on rank 0, ``None`` on the other ranks.
        """
        weights = dict(self._weights())
        for entry in self.state_layout():
            source = weights[entry.name] if entry.kind == "model" else self._slot(entry.name, entry.slot)
            whole = self._whole(source.detach())
            yield entry.kind, entry.name, entry.slot, whole.cpu().contiguous() if self.is_main else None

    def load_state(self, read: Callable[[str, str, str], Tensor | None]) -> None:
        """Take over weights and optimizer slots; ``read(kind, name, slot)`` is called on every rank.

        It returns the whole tensor on the host, or ``None`` where the checkpoint has none: a weight must be
        there, an optimizer slot may be missing (then it starts afresh).
        """
        with torch.no_grad():
            for name, target in self._weights():
                self._take(target, self._required(read, name, target))
            self._prime_optimizer()
            for entry in self.state_layout():
                if entry.kind == "optim":
                    value = read("optim", entry.name, entry.slot)
                    target = self._slot(entry.name, entry.slot)
                    if value is None:
                        target.zero_()
                    else:
                        self._take(target, value)

    def optimizer_scalars(self) -> dict[str, Any]:
        """The optimizer's numbers (Adam's step count, the fp16 loss scale), as JSON."""
        scalars: dict[str, dict[str, float]] = {}
        for name, parameter in self._named.items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                if not (isinstance(value, Tensor) and value.ndim > 0):
                    scalars.setdefault(slot, {})[name] = float(value)
        result: dict[str, Any] = {"slots": {slot: compress(values) for slot, values in scalars.items()}}
        if self._scaler is not None:
            result["scaler"] = self._scaler.state_dict()
        return result

    def load_optimizer_scalars(self, scalars: dict[str, Any]) -> None:
        """The inverse of :meth:`optimizer_scalars`; call it after :meth:`load_state`."""
        for slot, stored in scalars.get("slots", {}).items():
            for name, parameter in self._named.items():
                state = self.optimizer.state.get(parameter)
                value = stored.get(name) if isinstance(stored, dict) else stored
                if state is None or value is None or slot not in state:
                    continue
                if isinstance(state[slot], Tensor):
                    state[slot].fill_(value)
                else:
                    state[slot] = type(state[slot])(value)
        if self._scaler is not None and "scaler" in scalars:
            self._scaler.load_state_dict(scalars["scaler"])

    @contextlib.contextmanager
    def full_model(self) -> Iterator[nn.Module | None]:
        """The user's model with whole weights in evaluation mode on rank 0, ``None`` elsewhere.
        Collective."""
        try:
            with self.evaluation():
                yield self._module.model if self.is_main else None
        finally:
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
        self._host_group = None
        if dist.is_initialized():
            dist.destroy_process_group()
        # accelerate keeps its state in class attributes; another engine of this process must not inherit it.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    # ---- private -------------------------------------------------------------------------------------------

    @property
    def _grouped(self) -> bool:
        return self.world_size > 1 or dist.is_initialized()

    def _seed_everything(self, *, deterministic: bool, tf32: bool) -> None:
        torch.manual_seed(keyed_seed(self.seed, "engine", 0))
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
            torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"

    def _compile_in_place(self, module: nn.Module) -> None:
        # Module.compile() changes no name and no object, so no strategy and no checkpoint sees it.
        targets = (
            [module]
            if self._compile == "full"
            else repeated_blocks(module)
            if self._compile == "regional"
            else []
        )
        for target in targets:
            target.compile()

    def _sync_gradients(self, sync: bool) -> None:
        if self.strategy == "ddp":
            self.module.require_backward_grad_sync = sync

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._named.items()
        kept = set(self._module.state_dict(keep_vars=True))
        for name, buffer in self._module.named_buffers():
            if name in kept:
                yield clean_name(name), buffer

    def _slot(self, name: str, slot: str) -> Tensor:
        return self.optimizer.state[self._named[name]][slot]

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def _take(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value)

    def _required(self, read: Callable[[str, str, str], Tensor | None], name: str, target: Tensor) -> Tensor:
        value = read("model", name, "")
        if value is None:
            raise RequestError(f"the checkpoint has no tensor {name!r}: it is of another model")
        if tuple(value.shape) != tuple(target.shape):
            found, wanted = tuple(value.shape), tuple(target.shape)
            raise RequestError(
                f"{name} is {found} in the checkpoint but {wanted} in this model: they do not fit"
            )
        return value

    def _prime_optimizer(self) -> None:
        """Create the optimizer's slots by a step that changes nothing (its slots do not exist before the
        first)."""
        saved = [p.detach().clone() for p in self._named.values()]
        rates = [(group["lr"], group.get("weight_decay")) for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, (rate, _) in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        for p, old in zip(self._named.values(), saved):
            p.copy_(old)

    def _collective(self, what: str, run: Callable[[], Any]) -> None:
        try:
            run()
        except (RuntimeError, dist.DistError) as error:
            raise RuntimeError(f"{what}: {self._absent()} ({error})") from error

    def _absent(self) -> str:
        """Which ranks did not come, as well as it can be found out after the fact."""
        try:
            dist.monitored_barrier(group=self._host_group, timeout=timedelta(seconds=15), wait_all_ranks=True)
        except (RuntimeError, dist.DistError) as error:
            return f"a rank is dead or stuck: {error}"
        return "a rank was too slow"


def clean_name(name: str) -> str:
    """A parameter's name in the user's model, without the prefixes of wrappers."""
    for part in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.").removeprefix("model.")


def keyed_seed(seed: int, purpose: str, key: int) -> int:
    """63 bits that depend on all three and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules of one class: a transformer's layers."""
    found: list[nn.Module] = []
    for child in module.children():
        same = isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(m) for m in child}) == 1
        found.extend(child if same else repeated_blocks(child))  # type: ignore[arg-type]  # a ModuleList iterates
    return found


def compress(values: dict[str, float]) -> float | dict[str, float]:
    """One number where all are equal (every parameter's step count is)."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values
