"""A causal language model, or the user's own module, with its loss as one ``nn.Module``.

It takes a batch by keyword (``input_ids`` (B, T), ``labels`` (B, T), optionally ``position_ids`` and the like) and
returns the sum of the losses (float32) and the count of labels (int64), both 0-dim on the device.

Labels are already shifted, and are not passed to a transformers model, which would shift them again. No attention mask is
passed, because with a mask transformers ignores packing by ``position_ids``. Columns that pad the vocabulary
take no probability and get no gradient. The head runs inside its own module's call, so that the hooks of FSDP and
ZeRO, which gather a weight only inside ``forward``, run.

Example::

    model = build_model(type="gpt2", config_overrides={"n_layer": 4}, vocab_size=8000, block_size=256, seed=0)
    module = ModelWithLoss(model)
    loss_sum, count = module(input_ids=ids, labels=labels)

Letters: B blocks, T tokens of a block, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmcore.conventions import IGNORED_LABEL
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, size
from lmcore.model.build import random_weights, repeated_blocks
from lmcore.model.cpu_kernels import ATTENTION, use_faster_kernels
from lmcore.model.loss import causal_lm_loss, count_labels, cross_entropy_sum, head_logits
from lmcore.plugins import import_path

_BALANCE_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names of the weight of the experts' balance loss: in most families, in JetMoE, in DBRX."""

LossFunction = Callable[[Any, Mapping[str, Any]], tuple[Tensor, Tensor]]

# Arguments that transformers takes through **kwargs (variable-length attention kernels).
_PASSED_THROUGH = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass(frozen=True, kw_only=True)
class HeadForm:
    """How logits are computed from the head's products: :func:`lmcore.model.loss.head_logits`."""

    scale: float = 1.0
    softcap: float | None = None


class ModelWithLoss(nn.Module):
    """Body, head and loss in one module, so that DDP, FSDP2 and ZeRO wrap one forward.

    ``head_path`` says how the loss is computed:

    - ``"chunked"``: by :func:`causal_lm_loss`, for a transformers model whose logits are a linear map of its last
      hidden state, optionally scaled and softcapped (detected by :func:`probe_head`).
    - ``"logits"``: cross-entropy of full logits, for any other transformers model and the user's modules.
    - ``"factory"``: ``loss_factory(outputs, batch) -> (sum, count)`` on whatever the model returns.

    Args:
        model: from :func:`build_model`, or any module that takes the batch's keys (labels if it names them).
        chunk: tokens per chunk of the head, 0 for the plain head, or ``"auto"``.
        label_smoothing, z_loss: used in training mode only; evaluation uses the plain cross-entropy.
        loss_factory: a callable, or ``package.module:function``.
        probe: a small model of the same kind, whose head is probed instead where ``model`` has no weights.
        note: called with one line for each thing the user should know.

    Attributes:
        without_loss: if true, ``forward`` returns what the model itself returns; the hooks of this module still gather
            sharded weights.

    Example::

        module = ModelWithLoss(build_model(type="gpt2", vocab_size=8000, block_size=256, seed=0))
        loss_sum, count = module(input_ids=ids, labels=labels)      # (B, T) each
        (loss_sum / count).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk: int | str | None = "auto",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_factory: LossFunction | str | None = None,
        probe: nn.Module | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise RequestError(f"loss.label_smoothing is {label_smoothing}: give a number from 0 to below 1")
        if z_loss < 0:
            raise RequestError(
                f"loss.z_loss is {z_loss}: give 0 (off) or a small positive number such as 1e-4"
            )
        self.model = model
        self.vocab_size: int | None = getattr(model, "real_vocab_size", None)
        self.chunk = chunk
        self.compile_head = False
        self.without_loss = False
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.loss_factory: LossFunction | None = (
            import_path(loss_factory, "loss.factory") if isinstance(loss_factory, str) else loss_factory
        )
        self._is_transformers = hasattr(model, "get_output_embeddings") and hasattr(model, "base_model")
        self._balance_weight = 0.0
        if self._is_transformers:
            use_faster_kernels(model)
            self._balance_weight = _balance_weight(model)
        self._arguments, self._takes_any = _forward_arguments(model)
        if self._is_transformers:
            body_arguments, _ = _forward_arguments(self.body)
            self._arguments = (self._arguments | body_arguments | _PASSED_THROUGH) - {"labels"}
            self._takes_any = False
        self._checked: set[frozenset[str]] = set()
        self._counted = False
        # A plain function, which copy.deepcopy does not copy; it would fail on the object of a bound method.
        self._note: Callable[[str], None] = lambda line: note(line)
        self.head_path = "logits" if self.loss_factory is None else "factory"
        self.head_form = HeadForm()
        if self.loss_factory is None and self._is_transformers:
            form = probe_head(model if probe is None else probe)
            if isinstance(form, HeadForm):
                self.head_path, self.head_form = "chunked", form
                head: Any = self.get_output_embeddings()
                head.forward = types.MethodType(_head_forward, head)
            else:
                columns = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
                note(
                    f"loss: full logits, not the chunked head: {form}; each copy of the logits takes "
                    f"{size(4 * columns * 1024)} for 1,024 tokens, and a step holds about three"
                )

    # Attributes that accelerate expects of the model that it wraps.

    @property
    def body(self) -> Any:
        """The model without its head (a transformers ``base_model``), else the model."""
        return self.model.base_model if self._is_transformers else self.model

    base_model_prefix = "body"

    @property
    def config(self) -> Any:
        """The model's own config, or ``None``."""
        return getattr(self.model, "config", None)

    @property
    def _no_split_modules(self) -> set[str]:
        return {layer.__class__.__name__ for layer in decoder_layers(self.model)}

    def get_input_embeddings(self) -> nn.Module | None:
        """The token embedding of a transformers model, else ``None``."""
        return self.model.get_input_embeddings() if self._is_transformers else None  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module | None:
        """The vocabulary head of a transformers model, else ``None``."""
        return self.model.get_output_embeddings() if self._is_transformers else None  # type: ignore[operator]

    def tie_weights(self) -> None:
        """Tie head and embedding again after a wrapper has replaced one of them."""
        if hasattr(self.model, "tie_weights"):
            self.model.tie_weights()  # type: ignore[operator]

    def forward(self, **batch: Any) -> Any:
        """Return (loss_sum float32, count int64), both 0-dim; or the model's own output if :attr:`without_loss` is true.

        Raises:
            RequestError: a key that the model does not take, no labels, or outputs that do not fit the labels.
        """
        if self.without_loss:
            return self.model(**batch)
        self.check_keys(batch)
        smoothing = self.label_smoothing if self.training else 0.0
        z_loss = self.z_loss if self.training else 0.0
        empty = False
        if self.loss_factory is not None and not self.training:
            batch, empty = _without_filled_up_rows(batch)
        if self.head_path == "chunked":
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with _packing_known(self._is_packed(batch)):
                hidden = self.body(**inputs)[0]
            return self.get_output_embeddings()(  # type: ignore[misc]  # there is one on this path
                hidden,
                batch["labels"],
                chunk=self.chunk,
                scale=self.head_form.scale,
                softcap=self.head_form.softcap,
                label_smoothing=smoothing,
                z_loss=z_loss,
                vocab_size=self.vocab_size,
                compiled=self.compile_head,
            )
        inputs = {
            key: value for key, value in batch.items() if key != "labels" or "labels" in self._arguments
        }
        with _packing_known(self._is_packed(batch)) if self._is_transformers else contextlib.nullcontext():
            outputs = self.model(**inputs)
        if self.loss_factory is not None:
            return self._own_loss(outputs, batch, empty=empty)
        labels = batch["labels"]
        own_loss = None if self._is_transformers else _field(outputs, "loss")
        if own_loss is not None:  # the user's model computed its own mean loss
            count = count_labels(labels)
            return own_loss.float() * count, count
        logits = _field(outputs, "logits")
        if logits is None:
            logits = outputs if isinstance(outputs, Tensor) else outputs[0]
        loss_sum, count = cross_entropy_sum(
            logits, labels, label_smoothing=smoothing, z_loss=z_loss, vocab_size=self.vocab_size
        )
        balance = _field(outputs, "aux_loss")
        # Mixture of experts: a mean per token, as the family defines it
        if self.training and balance is not None:
            loss_sum = loss_sum + self._balance_weight * balance * count
        return loss_sum, count

    def _is_packed(self, batch: Mapping[str, Any]) -> bool:
        """Whether documents must be separated by a mask. Attention by sequence lengths needs none."""
        by_lengths = "cu_seq_lens_q" in batch and str(self.config._attn_implementation).startswith(
            (ATTENTION, "flash_attention")
        )
        return "position_ids" in batch and not by_lengths

    def _own_loss(self, outputs: Any, batch: Mapping[str, Any], *, empty: bool) -> tuple[Tensor, Tensor]:
        assert self.loss_factory is not None
        made = self.loss_factory(outputs, batch)
        if not isinstance(made, tuple | list) or len(made) != 2 or getattr(made[0], "ndim", None) != 0:
            raise RequestError(
                "loss.factory must return (sum, count): the loss summed over the batch, a tensor of one number, and "
                f"over how many labels; it returned {made.__class__.__name__}"
                + (f" of {len(made)}" if isinstance(made, tuple | list) else "")
            )
        loss_sum, count = made[0], torch.as_tensor(made[1], device=made[0].device)
        if empty:
            return torch.zeros_like(loss_sum), torch.zeros_like(count)
        # The tensors of a memory plan are of their own class and hold no values.
        if not self._counted and isinstance(batch.get("labels"), Tensor) and type(count) is Tensor:
            self._counted = True
            if (given := float(count)) != (labels := int(count_labels(batch["labels"]))):
                self._note(
                    f"loss.factory counts {given:g} where the batch has {labels} labels that are not -100: the loss "
                    f"that is logged is the sum over {given:g}, the gradient that of the sum over {labels}"
                )
        return loss_sum, count

    def check_keys(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch, or an item of one, with keys that the model does not take, or without labels (``RequestError``)."""
        keys = frozenset(batch)
        if keys in self._checked:
            return
        unknown = [] if self._takes_any else sorted(keys - self._arguments - {"labels"})
        if unknown:
            raise RequestError(
                f"the batch has keys that are not arguments ({', '.join(unknown)}) of "
                f"{self.model.__class__.__name__}.forward{did_you_mean(unknown[0], self._arguments)}"
            )
        if "labels" not in keys and self.loss_factory is None:
            raise RequestError("the batch has no 'labels': let data.factory give them, or give loss.factory")
        if {"attention_mask", "position_ids"} <= keys and self._is_transformers:
            raise RequestError(
                "an attention_mask switches packing by position_ids off: leave one of them out"
            )
        self._checked.add(keys)


@contextlib.contextmanager
def _packing_known(packed: bool) -> Iterator[None]:
    """Tell transformers whether blocks are packed by ``position_ids``, instead of letting it find out.

    While a forward of :class:`ModelWithLoss` runs, this replaces ``masking_utils.find_packed_sequence_indices`` of
    transformers. The original reads the values of ``position_ids`` in every forward, so that the host waits for the
    device and a GPU runs out of queued work once per micro-batch (transformers 5.23).
    """
    from transformers import masking_utils

    asked = masking_utils.find_packed_sequence_indices

    def answered(position_ids: Tensor) -> Tensor | None:
        if not packed:
            return None
        steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
        return (steps != 1).cumsum(-1)  # the number of the document that each token belongs to

    masking_utils.find_packed_sequence_indices = answered
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


def _without_filled_up_rows(batch: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Drop the rows of a batch that have no label. Returns the batch, and whether no row has one (then it is unchanged).

    The last batches of an evaluation are padded with rows whose labels are all ignored. They are removed here, so that
    the user's loss does not have to handle them.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or not labels.ndim or labels.is_floating_point():
        return batch, False
    counts = (labels != IGNORED_LABEL).reshape(len(labels), -1).any(dim=1)
    if bool(counts.all()):
        return batch, False
    if not bool(counts.any()):
        return batch, True
    of_rows = {
        name: value[counts]
        if isinstance(value, Tensor) and value.ndim and len(value) == len(labels)
        else value
        for name, value in batch.items()
    }
    return of_rows, False


def _forward_arguments(module: nn.Module) -> tuple[set[str], bool]:
    parameters = inspect.signature(module.forward).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, takes_any


def _balance_weight(model: Any) -> float:
    """The weight of the balance loss of a model's experts, or 0 if it computes none.

    Raises:
        RequestError: the model computes one, but its weight has none of the known names.
    """
    if not getattr(model.config, "output_router_logits", False):
        return 0.0
    for place in (model.config, model):
        for name in _BALANCE_WEIGHTS:
            if isinstance(value := getattr(place, name, None), int | float):
                return float(value)
    raise RequestError(
        f"model.config.output_router_logits asks for the balance loss of {model.__class__.__name__}, whose weight has "
        f"no known name ({', '.join(_BALANCE_WEIGHTS)}): leave it out"
    )


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


# -------------------------------------------------------------------------------------------- the linear head


def _head_forward(head: nn.Linear, hidden: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
    """``nn.Linear.forward``, which also computes the loss if labels are given.

    It is bound to the head, so that the head's hooks run."""
    if labels is None:
        return nn.functional.linear(hidden, head.weight, head.bias)
    return causal_lm_loss(hidden, head.weight, head.bias, labels, **options)


class _ProbeOutput(dict[str, Any]):
    """Stands in for the output of the body: has field 0 and ``last_hidden_state``; all other fields are ``None``."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("last_hidden_state") if key == 0 else super().get(key)


def probe_head(model: nn.Module) -> HeadForm | str:
    """The form of the head if the logits are ``head_logits(head(body(...)[0]))``, else the reason why they are not.

    This is a numeric probe, not a list of families. The body's forward is replaced by one that returns random hidden
    states of three magnitudes, so that a softcap, a scale, a norm after the body or any other step shows in the logits.
    Small states give the scale and huge ones the cap; each is rounded to a number of the model's config if one is close
    enough, and all logits must then agree.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    body: Any = model.base_model
    name = model.__class__.__name__
    if head.__class__ is not nn.Linear:
        return f"the head of {name} is {head.__class__.__name__}, not a plain Linear"
    if body is model:
        return f"{name} has no body apart from its head"
    if getattr(model.config, "output_router_logits", False):
        return "output_router_logits adds the experts' balance loss"
    inside = set(body.modules())
    outside = [module for module in model.modules() if module not in inside]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 4, head.in_features, generator=generator)

    def logits_of(hidden: Tensor) -> tuple[Tensor, Tensor]:
        body.forward = lambda *args, **kwargs: _ProbeOutput(last_hidden_state=hidden)
        ids = torch.zeros(1, 4, dtype=torch.int64, device=head.weight.device)
        # By the head's own forward: another product would round otherwise, by more than is allowed below.
        return model(input_ids=ids).logits, head(hidden)

    try:
        # A head without weights, or of zeros, gets random ones: with zeros the probe would see nothing.
        with torch.no_grad(), random_weights(outside, zeros=True):
            states = states.to(head.weight)
            pairs = [logits_of(factor * states) for factor in (1e-2, 50.0, 1e6)]
    except Exception as error:  # any family may do anything with its body's output; full logits are right
        return f"{name} could not be probed ({error.__class__.__name__})"
    finally:
        body.__dict__.pop("forward", None)
    other = f"{name} does more than a linear map, a scale and a softcap between its last hidden state and its logits"
    # Logits on the meta device: they depend on weights of the body
    if any(got.is_meta or got.shape != product.shape for got, product in pairs):
        return other
    small, huge = pairs[0], pairs[2]
    config: Any = model.config
    numbers = [float(v) for v in config.to_dict().values() if isinstance(v, int | float) and v]
    scale = _nearest_number(float((small[0] * small[1]).sum() / small[1].square().sum()), [1.0, *numbers])
    largest = float(huge[0].abs().max())
    capped = largest < 0.5 * scale * float(huge[1].abs().max())
    form = HeadForm(scale=scale, softcap=_nearest_number(largest, numbers) if capped else None)
    for got, product in pairs:
        expected = head_logits(product, scale=form.scale, softcap=form.softcap)
        if not torch.allclose(
            got, expected, rtol=1e-5, atol=1e-4 * max(1.0, 1e-2 * float(expected.abs().max()))
        ):
            return other
    return form


def _nearest_number(measured: float, numbers: list[float]) -> float:
    """The number, or reciprocal of a number, that equals ``measured`` up to rounding; else ``measured`` itself."""
    known = [*numbers, *(1 / number for number in numbers)]
    nearest = min(known, key=lambda number: abs(number - measured), default=measured)
    return nearest if abs(nearest - measured) <= 1e-3 * abs(measured) else measured


# ---------------------------------------------------------------------------------------------------- regions


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated decoder layers: those that the family names, else the longest ``ModuleList`` of one class."""
    model = model.model if isinstance(model, ModelWithLoss) else model
    return repeated_blocks(model)


COMPILED_SHAPES = 64
"""Graphs allowed for one layer's code: 10 micro-batch sizes x 3 kinds of layers x training and evaluation, rounded up."""


def compile_regions(model: nn.Module, mode: str | None = None, **options: Any) -> int:
    """Compile each decoder layer's forward, and the loss of a :class:`ModelWithLoss`. Returns the number of layers.

    Layers are compiled one by one: one graph serves all layers of a kind (a shorter cold start), the layers
    get no materialized attention mask (transformers #48925), and the hooks of FSDP2 and DDP stay outside of
    the graphs. Call this before :func:`enable_activation_checkpointing`.
    """
    if isinstance(model, ModelWithLoss):
        model.compile_head = True
    # optimize_ddp splits graphs at the boundaries of DDP's buckets, to overlap their reduction with the rest of one large
    # graph. Graphs of single layers overlap anyway, and would be split into two or three.
    torch._dynamo.config.optimize_ddp = False
    # Beyond this many graphs of one function dynamo runs new shapes uncompiled for the rest of the process. Its default of 8
    # is soon reached: training and evaluation, times the kinds of layers, times the micro-batch sizes of a growing batch.
    torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
    if mode == "max-autotune":
        # With CUDA graphs the next micro-batch overwrites the memory of a kept gradient (pytorch issues 96693, 169545).
        mode = "max-autotune-no-cudagraphs"
    layers = decoder_layers(model)
    for layer in layers:
        compiled = torch.compile(layer.forward, mode=mode, dynamic=False, **options)
        layer.forward = compiled
    return len(layers)


def narrow_residual_stream(model: nn.Module) -> int:
    """Cast the outputs of the embeddings to autocast's dtype while autocast is on. Returns the number of embeddings.

    Weights and their gradients keep their dtype. Autocast leaves embeddings in fp32, and with them the residual stream. With
    this cast the residual stream, norms and the activations saved for backward are half as large, as under strategies that
    compute in a 16-bit copy of the weights. A family that adds in fp32 (Mixtral's routed experts) widens the residual stream
    again in its first layer.
    """
    inner = model.model if isinstance(model, ModelWithLoss) else model
    of_layers = {module for layer in decoder_layers(inner) for module in layer.modules()}
    embeddings = [m for m in inner.modules() if isinstance(m, nn.Embedding) and m not in of_layers]
    for embedding in embeddings:
        embedding.register_forward_hook(_in_type_of_autocast)
    return len(embeddings)


def _in_type_of_autocast(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output  # ProphetNet's position embedding returns a tuple
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def enable_activation_checkpointing(model: nn.Module, *, every: int = 1) -> int:
    """Recompute every ``every``-th decoder layer in backward, starting with the first. Returns how many are recomputed.

    Checkpointing is non-reentrant and preserves the random state, so that the recomputation uses the same dropout masks.

    Raises:
        RequestError: the model has no repeated layers.
    """
    layers = decoder_layers(model)[::every]
    if not layers:
        raise RequestError("train.activation_checkpointing: this model has no repeated layers to recompute")
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward, layer)
    return len(layers)


def _recomputed(forward: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)


# ---------------------------------------------------------------------------------------- counting and export


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``total``, ``trained``, ``embedding`` (positions included) and ``body`` (total - embedding).

    Tied weights count once.
    """
    model = model.model if isinstance(model, ModelWithLoss) else model
    seen: dict[int, nn.Parameter] = {id(p): p for p in model.parameters()}
    embeddings = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    total = sum(p.numel() for p in seen.values())
    embedding = sum(p.numel() for p in embeddings.values())
    trained = sum(p.numel() for p in seen.values() if p.requires_grad)
    return {"total": total, "trained": trained, "embedding": embedding, "body": total - embedding}


def multiplied_parameters(model: nn.Module) -> int:
    """Number of parameters used in multiplications: all but embeddings that are only looked up."""
    counts = parameter_counts(model)
    inner: Any = model.model if isinstance(model, ModelWithLoss) else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    tied = head is not None and not head_parameters(inner)
    weight = getattr(head, "weight", None)
    return counts["body"] + (weight.numel() if tied and weight is not None else 0)


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of a vocabulary head that is not tied to the token embedding."""
    if not hasattr(model, "get_output_embeddings"):
        return set()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tied = {id(p) for p in (() if embedding is None else embedding.parameters(recurse=False))}
    owned = {id(p) for p in (() if head is None else head.parameters(recurse=False))} - tied
    return {name for name, p in model.named_parameters() if id(p) in owned}


def vocabulary_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters whose first dimension is the vocabulary: the token embedding, the head and its bias."""
    if not hasattr(model, "get_output_embeddings"):
        return set()
    parts = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    owned = {id(p) for part in parts if part is not None for p in part.parameters(recurse=False)}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in owned}


def export_state(tensors: Iterable[tuple[str, Tensor]], exported: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Remove the padding of the vocabulary from named tensors.

    Tensors other than embedding and head can have it: DeepSeek V4 routes by a buffer with one row per token, Moshi's
    embedding has one more row.

    Args:
        exported: a model built from :func:`export_config`, whose parameters may be empty; larger tensors are cut to its
            shapes.
    """
    sizes = {name: own.shape for name, own in exported.named_parameters(remove_duplicate=False)}
    sizes |= {name: own.shape for name, own in exported.named_buffers()}
    for name, tensor in tensors:
        size = sizes.get(name, tensor.shape)
        yield name, tensor if size == tensor.shape else tensor[tuple(map(slice, size))].contiguous()


def export_config(model: nn.Module) -> Any:
    """The transformers config to save with exported weights: the real vocabulary size, and the cache on where possible."""
    config: Any = copy.deepcopy(model.config)
    real = getattr(model, "real_vocab_size", None)
    if real is not None:
        config.get_text_config().vocab_size = real
        if getattr(config, "decoder_vocab_size", None) is not None:
            config.decoder_vocab_size = real  # Marian's head is of this size
    config.use_cache = config.get_text_config().use_cache = _cache_has_length(config)
    config.architectures = [model.__class__.__name__]
    return config


def _cache_has_length(config: Any) -> bool:
    """Whether the cache of transformers can count its tokens, which most families require whenever they use one.

    It cannot if no layer attends to tokens (linear attention, convolutions)."""
    from transformers import DynamicCache

    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError:
        return False
    return True
