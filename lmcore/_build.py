"""Building the model, a part of the room ``model``: a type and its settings in, a module out.

Three ways to a model: any causal language model of transformers from scratch (``type`` and config fields),
the same from pretrained weights, or the user's own factory ``package.module:function``, which may return any
``nn.Module``.

What always holds for a transformers model: float32 parameters; ``use_cache`` off; the vocabulary padded to a
multiple of 64 (``model.real_vocab_size`` keeps the true one); from scratch, every module is initialized by
its family's own rule from a generator keyed by (seed, module name), so that the weights have the same bits
whatever the strategy, the world size and the order of construction.

Example::

    model = build(type="gpt2", config_overrides={"n_layer": 4}, vocab_size=8000, block_size=256, seed=0)
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from lmcore.errors import RequestError

VOCAB_MULTIPLE = 64
"""Matrix units want such columns: 50,304 instead of 50,257 gave +13.7 % (LLMs-from-scratch, A100)."""
SPECIAL_IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "unk_token_id")
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")

# Fields that lmcore sets itself, and what to use instead.
_OWNED = {
    "vocab_size": "it is the tokenizer's",
    "use_cache": "it is off while training",
    "dtype": "parameters are float32; see train.precision",
    "torch_dtype": "parameters are float32; see train.precision",
    "transformers_version": "it is written on export",
    "architectures": "it is written on export",
    "return_dict": "the model's outputs are lmcore's affair",
    **dict.fromkeys(SPECIAL_IDS, "it is the tokenizer's"),
}


def pad_vocab(vocab_size: int) -> int:
    """The next multiple of ``VOCAB_MULTIPLE``."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name that looks most like ``name``, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


# --------------------------------------------------------------------------------------------- configurations


def known_types() -> list[str]:
    """The model types of transformers that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_config(type: str, overrides: Mapping[str, Any], **owned: Any) -> Any:
    """A transformers config of this type; ``owned`` are fields that lmcore sets.

    Raises:
        RequestError: unknown type or field (with the nearest name), a field that lmcore sets, a wrong value.
    """
    from transformers import CONFIG_MAPPING

    if type not in known_types():
        raise RequestError(
            f"model.type {type!r} is no causal language model of transformers{nearest(type, known_types())}"
        )
    config_class = CONFIG_MAPPING[type]
    if is_dataclass(config_class):
        known = {f.name for f in fields(config_class)}
    else:
        known = set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs"}
    known |= set(config_class.attribute_map)
    for name in overrides:
        if name in _OWNED:
            raise RequestError(f"model.config.{name} cannot be set: {_OWNED[name]}")
        if name not in known:
            raise RequestError(
                f"model.config.{name} is no field of {config_class.__name__}{nearest(name, known)}"
            )
    if "is_decoder" in known:
        owned.setdefault("is_decoder", True)  # BERT and its kin see the future without it
    try:
        return config_class(**{**owned, **overrides})
    except Exception as error:  # strict dataclasses and __post_init__ raise many types
        raise RequestError(f"model.config: {_one_line(error)}") from error


def context_length(type: str, overrides: Mapping[str, Any]) -> int | None:
    """Tokens that the model sees at once, by its config; ``None`` where positions have no end."""
    return _context(make_config(type, overrides))


def _context(config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------------ build


def _is_not_about_masks(record: logging.LogRecord) -> bool:
    # Where pad and EOS are one id, transformers asks for a mask: our ignored labels are set by position, and
    # a mask would switch packing by position_ids off.
    return "passing in an `attention_mask`" not in record.getMessage()


def build(
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
    note: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """Build the model on the CPU, with float32 parameters.

    The result carries ``real_vocab_size``, the columns of its head that count.

    Args:
        type: transformers model type (``"gpt2"``, ``"llama"``), for a model from scratch.
        config_overrides: fields of that type's config; with a factory, further arguments of it.
        vocab_size: V, ids that the tokenizer has; the model gets ``pad_vocab(V)`` rows. ``None`` (own data,
            no tokenizer) only with a factory.
        special_ids: the tokenizer's ``bos_token_id`` and so on; what it does not define becomes ``None``.
        block_size: T; refused if the model cannot see as far.
        from_pretrained: folder or Hub id (safetensors only; no code of the repository is ever run).
        revision: commit, tag or branch of the Hub id; the commit that it stands for is noted.
        factory: ``package.module:function``, called with those of ``vocab_size``, ``block_size``,
            ``special_ids`` and ``seed`` that it names, and with ``config_overrides``.
        attention: one of ``ATTENTION``; default: the model's own choice (sdpa nearly always).
        seed: of the initialization.
        note: called with one line for each thing that should be said (padding, fallbacks).

    Raises:
        RequestError: anything of the above that cannot be had.
    """
    overrides = dict(config_overrides or {})
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_about_masks)
    ids = {name: (special_ids or {}).get(name) for name in SPECIAL_IDS}
    for name, value in ids.items():
        if value is not None and vocab_size is not None and not 0 <= value < vocab_size:
            raise RequestError(f"the tokenizer's {name} {value} is outside of its vocabulary of {vocab_size}")
    if attention is not None and attention not in ATTENTION:
        raise RequestError(f"model.attention {attention!r} is not one of {', '.join(ATTENTION)}")
    if factory is not None:
        note("model.factory: initialization is the factory's own, under one seed and not one per parameter")
        return _from_factory(factory, overrides, vocab_size, block_size, ids, seed)
    if vocab_size is None:
        raise RequestError("a language model needs a vocabulary: give tokenizer.path, or model.factory")
    if from_pretrained is not None:
        model = _pretrained(from_pretrained, revision, overrides, vocab_size, ids, attention, note)
    else:
        given = {name: value for name, value in ids.items() if value is not None or name in SPECIAL_IDS[:3]}
        config = make_config(type, overrides, vocab_size=pad_vocab(vocab_size), use_cache=False, **given)
        model = _from_scratch(config, ids, attention, seed)
        model.real_vocab_size = vocab_size
        if config.vocab_size != vocab_size:
            note(f"vocabulary {vocab_size} padded to {config.vocab_size}; the padding takes no probability")
    context = _context(model.config)
    if context is not None and block_size > context:
        raise RequestError(
            f"data.block_size {block_size} is more than the model's context of {context} tokens: give a "
            "smaller data.block_size or a larger context in model.config"
        )
    return model


def _model_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[config.__class__]


def _take_special_ids(model: Any, ids: Mapping[str, int | None]) -> None:
    for name, value in ids.items():
        if value is None and not hasattr(model.config, name):
            continue  # a field that the family does not know and the tokenizer does not define
        setattr(model.config, name, value)
        if getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, name, value)


def _from_scratch(config: Any, ids: Mapping[str, int | None], attention: str | None, seed: int) -> Any:
    from transformers.initialization import no_init_weights

    config.dtype = torch.float32
    if attention is not None:
        config._attn_implementation = attention
    model_class = _model_class(config)

    def construct() -> Any:
        # The class itself, not from_config: that one would obey a DeepSpeed or meta-device context around us.
        try:
            return model_class(config)
        except (
            ValueError,
            TypeError,
            AssertionError,
            ImportError,
            RuntimeError,
            AttributeError,
            KeyError,
        ) as error:
            raise RequestError(
                f"{model_class.__name__} refuses this configuration: {_one_line(error)}"
            ) from error

    with no_init_weights():  # what the constructors would draw is drawn again below
        model = construct()
    untouched = _initialize(model, seed, poison=True)
    if (
        untouched
    ):  # a family whose rule leaves some parameters to the constructor: let it run, then ours on top
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_key(seed, model_class.__name__))
            model = construct()
        _initialize(model, seed, poison=False)
    model.float()
    _take_special_ids(model, ids)
    return model


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"lmcore init {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _initialize(model: Any, seed: int, *, poison: bool) -> list[str]:
    """Run the family's own ``_init_weights`` on each module under a generator keyed by the module's name.

    Children come before their parents, as in transformers: GPT-2's attention block re-draws its own output
    projection with the depth-scaled deviation after the projection itself was drawn. Returns the parameters
    that no rule touched (known because they were poisoned with NaN before).
    """
    from transformers import PreTrainedModel

    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        # A padding row is never trained and starts at zero; labels are ignored by position here, and where
        # the tokenizer has pad = EOS that row is EOS, which must learn like any other.
        embedding.padding_idx = None
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
    # Tied only now, so that the shared tensor is the one drawn under the embedding's name.
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
            raise RequestError(f"model.config.{name} is no argument of {path}{nearest(name, parameters)}")
    arguments = {name: value for name, value in offered.items() if name in parameters} | dict(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same weights on every rank
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise RequestError(f"model.factory {path} returned {model.__class__.__name__}, not a torch.nn.Module")
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False  # type: ignore[union-attr]  # hasattr above; packing relies on it
    # What a checkpoint must hold to build this model again (lmcore.saved.describe); torch types attributes
    # as tensors.
    model.factory_arguments = arguments  # type: ignore[assignment]
    return model


def import_path(path: str, option: str) -> Callable[..., Any]:
    """The callable that ``package.module:name`` stands for; the working directory counts."""
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise RequestError(f"{option} {path!r} is not of the form package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `accelerate launch` puts the script's folder there, not this one
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RequestError(f"{option} {path!r}: cannot import {module_name}: {_one_line(error)}") from error
    target = getattr(module, name, None)
    if not callable(target):
        raise RequestError(
            f"{option} {path!r}: {module_name} has no callable {name}{nearest(name, vars(module))}"
        )
    return target


# ------------------------------------------------------------------------------------------------- pretrained


def refuse_unsafe_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json with keys through which a loader could be made to fetch or run code.

    ``_attn_implementation_internal`` (CVE-2026-4372), ``trust_remote_code`` in a nested config
    (CVE-2026-5241), a kernel repository as attention implementation, and every other private key: none
    belongs into a saved config.
    """
    for key, value in config.items():
        text = str(key)
        private = text.startswith("_") and text not in ("_name_or_path", "_commit_hash")
        kernel = text.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value)
        if private or kernel or text == "trust_remote_code":
            raise RequestError(
                f"{where}: config.json holds the unsafe key {text!r}: remove it if you trust the source"
            )
        if isinstance(value, Mapping):
            refuse_unsafe_config(value, where)


def refuse_unsafe_index(path: str, where: str, *, revision: str | None = None) -> None:
    """Refuse an index of weights that names anything but safetensors files of its own folder.

    transformers follows it to any file, and gives one that is not safetensors to torch's unpickler.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

    missing_is_fine = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, revision=revision, **missing_is_fine)
    if index is None:
        return
    with open(index, encoding="utf-8") as file:
        names = json.load(file)["weight_map"].values()
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\\" in name:
            raise RequestError(
                f"{where}: its index of weights names {name!r}, which is no safetensors file there"
            )


def _pretrained(
    path: str,
    revision: str | None,
    overrides: Mapping[str, Any],
    vocab_size: int,
    ids: Mapping[str, int | None],
    attention: str | None,
    note: Callable[[str], None],
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    source = f"model.from_pretrained {path!r}"
    try:
        raw, _ = PretrainedConfig.get_config_dict(path, revision=revision)
        refuse_unsafe_config(raw, source)
        refuse_unsafe_index(path, source, revision=raw.get("_commit_hash") or revision)
        commit = raw.get("_commit_hash")
        config = AutoConfig.from_pretrained(path, revision=commit or revision, trust_remote_code=False)
        for name, value in overrides.items():
            if name in _OWNED or not hasattr(config, name):
                reason = _OWNED.get(name) or f"no field of {config.__class__.__name__}"
                raise RequestError(
                    f"model.config.{name} cannot be set: {reason}{nearest(name, config.to_dict())}"
                )
            setattr(config, name, value)
        config.use_cache = False
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            revision=commit or revision,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,  # no pickle
            **({} if attention is None else {"attn_implementation": attention}),
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise RequestError(f"{source}: {_one_line(error)}") from error
    if commit:
        note(f"{path}: commit {commit}" + ("" if revision else " (give model.revision to pin it)"))
    have = model.real_vocab_size = model.config.get_text_config().vocab_size
    if vocab_size > have:
        raise RequestError(
            f"{source} knows {have} tokens, the tokenizer has {vocab_size}: bring the model's own tokenizer"
        )
    if pad_vocab(have) != have:
        model.resize_token_embeddings(pad_vocab(have), mean_resizing=False)
        with torch.no_grad():
            for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                for tensor in () if part is None else part.parameters(recurse=False):
                    tensor[have:] = 0
        note(f"vocabulary {have} padded to {pad_vocab(have)}; the padding takes no probability")
    _take_special_ids(model, ids)
    return model.train()
