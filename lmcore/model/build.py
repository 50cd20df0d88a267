"""Build the model from a type and its settings.

There are three kinds of models: any causal language model of transformers from scratch (``type`` and config fields),
the same from pretrained weights, or the user's own factory ``package.module:function``, which may return any
``nn.Module``.

A transformers model has float32 parameters, ``use_cache`` off and a vocabulary padded to a multiple of 64
(``model.real_vocab_size`` keeps the true one). From scratch, every module is initialized by its family's own
rule from a generator keyed by (seed, module name): the weights have the same bits whatever the strategy, the
world size and the order of construction.

Example::

    model = build_model(type="gpt2", config_overrides={"n_layer": 4}, vocab_size=8000, block_size=256, seed=0)
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import unittest.mock
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, message_of
from lmcore.model.config import (
    SPECIAL_IDS,
    context_length,
    known_tokens,
    make_config,
    pad_vocab,
    pretrained_config,
    refuse_unsafe_index,
)
from lmcore.plugins import import_path

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")

# ------------------------------------------------------------------------------------------------------ build


def _is_not_about_masks(record: logging.LogRecord) -> bool:
    # If pad and EOS are one id, transformers asks for a mask. We do not need one, because ignored labels are set by
    # position, and a mask would switch off packing by position_ids.
    return "passing in an `attention_mask`" not in record.getMessage()


def build_model(
    *,
    type: str = "gpt2",
    config_overrides: Mapping[str, Any] | None = None,
    vocab_size: int | None,
    special_ids: Mapping[str, int] | None = None,
    block_size: int,
    from_pretrained: str | None = None,
    revision: str | None = None,
    factory: str | None = None,
    attention: str | None = None,
    seed: int,
    zero_init: bool = False,
    weights: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """Build the model on the CPU, with float32 parameters.

    A transformers model has an attribute ``real_vocab_size``: the number of columns of its head without padding.

    Args:
        type: transformers model type (``"gpt2"``, ``"llama"``), for a model from scratch.
        config_overrides: fields of that type's config; with a factory, further arguments of it.
        vocab_size: V, the tokenizer's vocabulary size; the model gets ``pad_vocab(V)`` rows. ``None`` (own data,
            no tokenizer) only with a factory.
        special_ids: the tokenizer's ``bos_token_id`` and so on; what it does not define becomes ``None``.
        block_size: T, tokens of a block; refused if longer than the model's context.
        from_pretrained: folder or Hub id (safetensors only; no code of the repository is ever run).
        revision: commit, tag or branch of the Hub id; the commit that it resolves to is noted.
        factory: ``package.module:function``, called with those of ``vocab_size``, ``block_size``,
            ``special_ids`` and ``seed`` that it names, and with ``config_overrides``.
        attention: one of ``ATTENTION``; default: the model's own choice (sdpa nearly always).
        seed: seed of the initialization.
        zero_init: start the output projections of attention and MLP, and a head that is not tied, at zero, so that
            every layer starts as the identity (from scratch only).
        weights: ``False`` builds the structure only: parameters on the meta device, real buffers. A factory's model
            always has its weights.
        note: called with one line for each thing the user should know (padding, fallbacks).

    Raises:
        RequestError: an unknown type, field or attention kernel, a wrong value, weights that are missing or do
            not fit the tokenizer, or a block longer than the context.
    """
    overrides = dict(config_overrides or {})
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_masks)
    ids = {name: (special_ids or {}).get(name) for name in SPECIAL_IDS}
    for name, value in ids.items():
        if value is not None and vocab_size is not None and not 0 <= value < vocab_size:
            raise RequestError(f"the tokenizer's {name} {value} is outside its vocabulary of {vocab_size}")
    if attention is not None and attention not in ATTENTION:
        raise RequestError(f"model.attention {attention!r} must be one of {', '.join(ATTENTION)}")
    if factory is not None:
        note("model.factory: initialization is the factory's own, under one seed and not one per parameter")
        return _from_factory(factory, overrides, vocab_size, block_size, ids, seed)
    if vocab_size is None:
        raise RequestError("a language model needs a vocabulary: give tokenizer.path, or model.factory")
    if from_pretrained is not None:
        model = _pretrained(from_pretrained, revision, overrides, vocab_size, ids, attention, weights, note)
    else:
        given = {name: value for name, value in ids.items() if value is not None or name in SPECIAL_IDS[:3]}
        config = make_config(type, overrides, vocab_size=pad_vocab(vocab_size), use_cache=False, **given)
        model = _from_scratch(config, ids, attention, seed, weights)
        if zero_init and weights:
            zero_outputs(model)
        model.real_vocab_size = vocab_size
        if config.vocab_size != vocab_size:
            note(f"vocabulary {vocab_size} padded to {config.vocab_size}; the padding takes no probability")
    context = context_length(model)
    if context is not None and block_size > context:
        raise RequestError(
            f"data.block_size {block_size} is more than the model's context of {context} tokens: give a "
            "smaller data.block_size or a larger context in model.config"
        )
    return model


def model_class_of(config: Any) -> Any:
    """The class of transformers' causal language model for a config. Raises ``KeyError`` for a family that has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[config.__class__]


def _take_special_ids(model: Any, ids: Mapping[str, int | None]) -> None:
    for name, value in ids.items():
        if value is None and not hasattr(model.config, name):
            continue  # a field that the family does not know and the tokenizer does not define
        try:
            setattr(model.config, name, value)
        except Exception:
            # A strict config (ModernBERT's) does not accept None for sep and cls, and raises errors of several types. If it
            # refuses a number, that is an error.
            if value is not None:
                raise
            continue
        if getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, name, value)


_REFUSALS = (
    ValueError, TypeError, AssertionError, ImportError, RuntimeError, AttributeError, KeyError,
)  # fmt: skip
"""What the constructors of transformers' models raise for a configuration that they do not accept."""


def _from_scratch(
    config: Any, ids: Mapping[str, int | None], attention: str | None, seed: int, weights: bool
) -> Any:
    from transformers.initialization import no_init_weights

    config.dtype = torch.float32
    if attention is not None:
        config._attn_implementation = attention
    model_class = model_class_of(config)

    def construct() -> Any:
        # The class itself, not from_config, which would follow an enclosing DeepSpeed or meta-device context.
        try:
            return model_class(config)
        except _REFUSALS as error:
            raise RequestError(
                f"{model_class.__name__} refuses this configuration: {message_of(error)}"
            ) from error

    # The constructors draw nothing: weights are drawn below, or come from rank 0.
    with no_init_weights() if weights else without_weights():
        model = construct()
    if not weights:
        _no_padding_row(model)
        model.tie_weights()
    elif _initialize(model, seed, poison=True):
        # The family's rule leaves some parameters to the constructor: run the constructor, then the keyed rule on top.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_key(seed, model_class.__name__))
            model = construct()
        _initialize(model, seed, poison=False)
    model.float()
    _take_special_ids(model, ids)
    return model


_OUTPUT_PROJECTIONS = frozenset((
    "o_proj", "out_proj", "c_proj", "down_proj", "fc2", "fc_out", "dense_4h_to_h", "output_linear", "wo", "w2",
))  # fmt: skip
"""Names of the layers, or of the weights of all experts together, that write into the residual stream, in the families of
transformers."""
_ATTENTION = frozenset(("attention", "self_attention", "self_attn", "attn"))
"""Names of modules whose child ``dense`` is such a layer; in other modules (``intermediate.dense``) it need not be."""


@torch.no_grad()
def zero_outputs(model: Any) -> list[str]:
    """Set the weights that write into the residual stream, and those of an untied head, to zero.

    Returns:
        The names of the modules, and of the weights of experts, that were changed.

    Raises:
        RequestError: no output projection of this family has a known name, or not all of them have, so that a layer
            still changes its input.
    """
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    modules = [name for name, _ in model.named_modules() if _writes_into_the_stream(name)]
    # The weights of all experts are one parameter, (experts, D, I), without their own module.
    experts = [name for name, p in model.named_parameters() if p.ndim == 3 and _writes_into_the_stream(name)]
    if not modules:
        raise RequestError(
            f"model.zero_init: {model.__class__.__name__} names no output projection that is known "
            f"({', '.join(sorted(_OUTPUT_PROJECTIONS))}): leave it out"
        )
    for module in [model.get_submodule(name) for name in modules] + ([] if tied else [head]):
        for parameter in module.parameters(recurse=False):
            parameter.zero_()
    for name in experts:
        model.get_parameter(name).zero_()
    if (layer := _layer_that_is_not_the_identity(model)) is not None:
        raise RequestError(
            f"model.zero_init: with {', '.join(sorted({name.rpartition('.')[2] for name in modules + experts}))} at zero "
            f"a {layer} of {model.__class__.__name__} still changes its input; its other output projections are not known: "
            "leave model.zero_init out"
        )
    return modules + experts


def _writes_into_the_stream(name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return last in _OUTPUT_PROJECTIONS or (last == "dense" and parent.rpartition(".")[2] in _ATTENTION)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """See :func:`lmcore.model.module.decoder_layers`, which also takes a model with its loss."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    named = set(getattr(model, "_no_split_modules", None) or ())
    found = [layer for group in lists for layer in group if layer.__class__.__name__ in named]
    if found:
        return found
    uniform = [group for group in lists if len({layer.__class__ for layer in group}) == 1]
    return max(uniform, key=len) if uniform else []


def _layer_that_is_not_the_identity(model: Any) -> str | None:
    """The class of a layer whose output differs from its input on four tokens, or ``None``, also if it cannot be tested."""
    changing: list[str] = []

    def compare(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        made = output[0] if isinstance(output, tuple) else output
        if not torch.equal(given, made):
            changing.append(layer.__class__.__name__)

    training = model.training
    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in repeated_blocks(model)]
    try:
        model.eval()
        model.base_model(input_ids=torch.arange(4)[None])  # without the expensive head
    except Exception:
        # A family that does not run with token ids alone, and may raise any error, is refused before the run with its error
        # (token_mixing.why_no_language_model).
        return None
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return changing[0] if changing else None


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"lmcore init {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _no_padding_row(model: Any) -> None:
    """Unset the embedding's ``padding_idx``, whose row would start at zero and never be trained.

    Labels are ignored by position here, and if the tokenizer has pad = EOS that row is EOS, which must be trained like
    any other."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def _initialize(model: Any, seed: int, *, poison: bool) -> list[str]:
    """Run the family's own ``_init_weights`` on each module under a generator keyed by the module's name.

    Children come before their parents, as in transformers: GPT-2's attention block re-draws its own output
    projection with the depth-scaled deviation after the projection itself was drawn. With ``poison`` all parameters
    are first filled with NaN; returns the names of those that no rule has set.
    """
    from transformers import PreTrainedModel

    _no_padding_row(model)
    if poison:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))

    def walk(module: nn.Module, name: str, owner: Any) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child_name, child in module.named_children():
            walk(child, f"{name}.{child_name}" if name else child_name, owner)
        torch.manual_seed(_key(seed, name))
        owner._init_weights(module)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        walk(model, "", model)
    # Tie only now, so that the shared tensor is the one drawn under the embedding's name.
    model.tie_weights()
    return [name for name, parameter in model.named_parameters() if poison and bool(parameter.isnan().any())]


def _from_factory(
    path: str,
    overrides: Mapping[str, Any],
    vocab_size: int | None,
    block_size: int,
    ids: Mapping[str, int | None],
    seed: int,
) -> nn.Module:
    function = import_path(path, "model.factory")
    offered = {"vocab_size": vocab_size, "block_size": block_size, "special_ids": dict(ids), "seed": seed}
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    except ValueError:  # written in C
        parameters = {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in overrides:
        if name not in parameters and not takes_any:
            raise RequestError(
                f"model.config.{name} is not an argument of {path}{did_you_mean(name, parameters)}"
            )
    arguments = {name: value for name, value in offered.items() if name in parameters} | dict(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same weights on every rank
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise RequestError(f"model.factory {path} returned {model.__class__.__name__}, not a torch.nn.Module")
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False  # type: ignore[union-attr]  # hasattr above; packing relies on it
    # A checkpoint stores them to build this model again (lmcore.saved.load.describe). The type comment: torch types
    # attributes as tensors.
    model.factory_arguments = arguments  # type: ignore[assignment]
    return model


# -------------------------------------------------------------------------------------------- without weights


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Context manager in which parameters move to the meta device as modules register them; nothing is drawn."""
    from transformers.initialization import no_init_weights

    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
            )
        register(module, name, parameter)

    with no_init_weights(), unittest.mock.patch.object(nn.Module, "register_parameter", register_empty):
        yield


@contextlib.contextmanager
def random_weights(modules: Iterable[nn.Module], *, zeros: bool = False) -> Iterator[None]:
    """Context manager in which the empty parameters of these modules (not of their children) have random values.

    With ``zeros``, parameters that are all zero also get random values.
    """
    generator = torch.Generator().manual_seed(0)
    kept = [
        (module, leaf, parameter)
        for module in modules
        for leaf, parameter in module._parameters.items()
        if parameter is not None and (parameter.is_meta or (zeros and not parameter.any()))
    ]
    for module, leaf, parameter in kept:
        module._parameters[leaf] = nn.Parameter(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        for module, leaf, parameter in kept:
            module._parameters[leaf] = parameter


# ------------------------------------------------------------------------------------------------- pretrained


def _pretrained(
    path: str,
    revision: str | None,
    overrides: Mapping[str, Any],
    vocab_size: int,
    ids: Mapping[str, int | None],
    attention: str | None,
    weights: bool,
    note: Callable[[str], None],
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    source = f"model.from_pretrained {path!r}"
    config, commit = pretrained_config(path, revision, overrides)
    try:
        refuse_unsafe_index(path, source, revision=commit or revision)
        chosen = {} if attention is None else {"attn_implementation": attention}
        if weights:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                revision=commit or revision,
                dtype=torch.float32,
                trust_remote_code=False,
                use_safetensors=True,  # no pickle
                output_loading_info=True,
                **chosen,
            )
            model, report = loaded
            if getattr(model, "peft_config", None):
                raise RequestError(
                    f"{source} holds an adapter (adapter_config.json), which transformers applies and freezes: move it to a "
                    "folder of its own, or merge it into the weights first"
                )
            if missing := sorted(map(str, report["missing_keys"])):
                more = f" and {len(missing) - 1} more are" if missing[1:] else " is"
                raise RequestError(
                    f"{source}: the weight {missing[0]}{more} not in its files, and would be random: give all files of a "
                    "causal language model, and no model.config that adds weights to it"
                )
        else:
            with without_weights():
                model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, trust_remote_code=False, **chosen
                )
            model.tie_weights()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise RequestError(f"{source}: {message_of(error)}") from error
    if getattr(config, "auto_map", None):
        note(
            f"{path} brings code of its own (auto_map), which is not run: {type(config).__name__} is transformers' own"
        )
    if commit:
        note(f"{path}: commit {commit}" + ("" if revision else " (give model.revision to pin it)"))
    have = known_tokens(config, source, vocab_size)
    model.real_vocab_size = have
    if pad_vocab(have) != have:
        model.resize_token_embeddings(pad_vocab(have), mean_resizing=False)
        with torch.no_grad():
            for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                for tensor in () if part is None else part.parameters(recurse=False):
                    tensor[have:] = 0
        note(f"vocabulary {have} padded to {pad_vocab(have)}; the padding takes no probability")
    _take_special_ids(model, ids)
    return model.train()
