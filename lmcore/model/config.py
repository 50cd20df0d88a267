"""The transformers config of a model, checked before anything is built.

It comes from a model type and fields, or from a folder (or Hub id) that holds weights. Refused are unknown fields (the
message gives the nearest name), fields that lmcore sets itself, sizes that no memory could hold, and everything in a
``config.json`` of other origin that could make a loader fetch or run code. No weights are read.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lmcore.conventions import CONTEXT_FIELDS
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, message_of

VOCAB_MULTIPLE = 64
"""Matrix units are faster with such column counts: 50,304 instead of 50,257 gave +13.7 % (LLMs-from-scratch, A100)."""
SPECIAL_IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "unk_token_id")

# Fields that lmcore sets itself, and what to use instead.
_OWNED = {
    "vocab_size": "it is the tokenizer's",
    "use_cache": "it is off while training",
    "dtype": "parameters are float32; see train.precision",
    "torch_dtype": "parameters are float32; see train.precision",
    "transformers_version": "it is written on export",
    "architectures": "it is written on export",
    "return_dict": "lmcore chooses the form of the model's outputs",
    **dict.fromkeys(SPECIAL_IDS, "it is the tokenizer's"),
}


def pad_vocab(vocab_size: int) -> int:
    """``vocab_size`` rounded up to a multiple of ``VOCAB_MULTIPLE``."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# --------------------------------------------------------------------------------------------- configurations


def known_types() -> list[str]:
    """The model types of transformers that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads")


def make_config(type: str, overrides: Mapping[str, Any], **owned: Any) -> Any:
    """A transformers config of this type; ``owned`` are fields that lmcore sets.

    Raises:
        RequestError: unknown type or field (with the nearest name), a field that lmcore sets, a wrong value.
    """
    from transformers import CONFIG_MAPPING

    if type not in known_types():
        raise RequestError(
            f"unknown model.type {type!r}: not a causal language model of transformers{did_you_mean(type, known_types())}"
        )
    config_class = CONFIG_MAPPING[type]
    known = _field_names(config_class)
    for name in overrides:
        if name in _OWNED:
            raise RequestError(f"model.config.{name} cannot be set: {_OWNED[name]}")
        if name not in known:
            raise RequestError(
                f"model.config.{name} is not a field of {config_class.__name__}{did_you_mean(name, known)}"
            )
    refuse_absurd_sizes(overrides, "model.config")
    if "is_decoder" in known:
        owned.setdefault("is_decoder", True)  # without it BERT and similar families see later tokens
    try:
        made = config_class(**{**owned, **overrides})
    except Exception as error:  # strict dataclasses and __post_init__ raise many types
        raise RequestError(f"model.config: {message_of(error)}") from error
    _refuse_several_models(type, made)
    sizes = {*_SIZES, *(config_class.attribute_map.get(name, name) for name in _SIZES)}
    for name in sizes & set(overrides):  # transformers builds some such models, which fail at the first token
        if getattr(made, name) < 1:
            raise RequestError(f"model.config.{name} {getattr(made, name)} must be at least 1")
    return made


def _field_names(config_class: Any) -> set[str]:
    """The names by which fields of a config can be set, including aliases."""
    if is_dataclass(config_class):
        known = {f.name for f in fields(config_class)}
    else:
        known = set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs"}
    return known | set(config_class.attribute_map)


def shape_of_family(type: str, shape: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``shape`` that a family has and ``overrides`` does not set, under the family's own names.

    Empty if the family's config refuses them, or if the type is unknown.

    Args:
        shape: values by the names that transformers uses for all families (``num_hidden_layers``, ``hidden_size``, ...).
        overrides: what the user sets, under either name.

    Example::

        shape_of_family("bloom", {"num_hidden_layers": 2, "head_dim": 8}, {})  # {"n_layer": 2}
    """
    from transformers import CONFIG_MAPPING

    if type not in known_types():
        return {}
    names = CONFIG_MAPPING[type].attribute_map
    known = _field_names(CONFIG_MAPPING[type])
    given = {names.get(name, name) for name in overrides}
    found = {names.get(name, name): value for name, value in shape.items() if name in known}
    found = {name: value for name, value in found.items() if name not in given}
    try:
        make_config(type, {**found, **overrides})
    except RequestError:
        return {}
    return found


def _refuse_several_models(type: str, config: Any) -> None:
    """Refuse the config of a multimodal model (text and images or sound).

    There the fields of the language model, such as its vocabulary size, are in a nested config, and setting them on the
    outer one would have no effect."""
    try:
        text = config.get_text_config()
    except ValueError:  # several text models
        text = None
    if text is config:
        return
    own = getattr(text, "model_type", None)
    hint = f"give model.type {own}, its language model" if own in known_types() else "take another family"
    raise RequestError(
        f"model.type {type} is a language model with other models around it, which cannot be trained from scratch on text: {hint}"
    )


def configured_context_length(
    type: str | None,
    overrides: Mapping[str, Any],
    from_pretrained: str | None = None,
    revision: str | None = None,
) -> int | None:
    """The context length in tokens according to the model's config; ``None`` if positions are unbounded."""
    if from_pretrained is not None:
        return context_length(pretrained_config(from_pretrained, revision, overrides)[0])
    return context_length(make_config(type or "", overrides))


def context_length(model: Any) -> int | None:
    """The context length of a model in tokens; ``None`` if positions are unbounded or the model does not say.

    Args:
        model: a transformers model or its config, or the user's module with such an attribute.
    """
    for module in model.modules() if hasattr(model, "modules") else ():
        # RoBERTa and similar families count positions from the row after the padding row; rows up to it are never read.
        table: Any = getattr(module, "position_embeddings", None)
        if isinstance(reserved := getattr(table, "padding_idx", None), int):
            return int(table.num_embeddings) - reserved - 1
    config = getattr(model, "config", None)
    places = [model, config]
    if hasattr(config or model, "get_text_config"):
        places.append((config or model).get_text_config(decoder=True))
    for place in places:
        for name in (*CONTEXT_FIELDS, "block_size"):  # block_size: modules written like nanoGPT's
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


MOST_LAYERS = 4096
LARGEST_NUMBER = 2**31
"""Largest allowed value of a config field. Larger ones are an error or an attack: building the model would never end, or
would request terabytes of memory."""


def refuse_absurd_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that could not be built in any memory, before anything is built from it.

    Raises:
        RequestError: more than ``MOST_LAYERS`` layers, or a whole number above ``LARGEST_NUMBER``.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_absurd_sizes(value, where)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        counts_layers = str(key).endswith(("n_layer", "n_layers", "num_layers", "_hidden_layers", "_layers"))
        most = MOST_LAYERS if counts_layers else LARGEST_NUMBER
        if abs(value) > most:
            raise RequestError(f"{where}: {key} {value:,} is too large (at most {most:,})")


def refuse_unsafe_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json with keys through which a loader could be made to fetch or run code.

    These are ``_attn_implementation_internal`` (CVE-2026-4372), ``trust_remote_code`` in a nested config
    (CVE-2026-5241), a kernel repository as attention implementation, and every other private key whose value is not a
    number. None of them belongs in a saved config. Numbers cannot name code, and some families (OPT, Gemma 3) save
    private numeric fields.
    """
    for key, value in config.items():
        text = str(key)
        number = value is None or isinstance(value, bool | int | float)
        private = text.startswith("_") and text not in ("_name_or_path", "_commit_hash") and not number
        kernel = text.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value)
        if private or kernel or text == "trust_remote_code":
            raise RequestError(
                f"{where}: config.json holds the unsafe key {text!r}: remove it if you trust the source"
            )
        if isinstance(value, Mapping):
            refuse_unsafe_config(value, where)
    refuse_absurd_sizes(config, f"{where}: config.json")


def refuse_unsafe_index(path: str, where: str, *, revision: str | None = None) -> None:
    """Refuse an index of weights that names anything but safetensors files in its own folder.

    transformers would open any file that it names, and pass a file that is not safetensors to torch's unpickler.
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
                f"{where}: its index of weights names {name!r}, which is not a safetensors file of that folder"
            )


def pretrained_config(
    path: str, revision: str | None, overrides: Mapping[str, Any]
) -> tuple[Any, str | None]:
    """The config of pretrained weights with ``overrides`` applied, and the commit of a Hub id (else ``None``).

    Raises:
        RequestError: there is no config, it has an unsafe key, or it lacks an overridden field.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.utils import CONFIG_NAME, cached_file
    from transformers.utils.hub import extract_commit_hash

    source = f"model.from_pretrained {path!r}"
    try:
        raw, _ = PretrainedConfig.get_config_dict(path, revision=revision)
        refuse_unsafe_config(raw, source)
        commit = extract_commit_hash(cached_file(path, CONFIG_NAME, revision=revision), None)
        config = AutoConfig.from_pretrained(path, revision=commit or revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise RequestError(f"{source}: {message_of(error)}") from error
    refuse_absurd_sizes(overrides, "model.config")
    for name, value in overrides.items():
        if name in _OWNED or not hasattr(config, name):
            reason = _OWNED.get(name) or f"not a field of {config.__class__.__name__}"
            raise RequestError(
                f"model.config.{name} cannot be set: {reason}{did_you_mean(name, config.to_dict())}"
            )
        setattr(config, name, value)
    config.use_cache = False
    config.get_text_config().use_cache = False  # a model of images and text has a nested text config
    return config, commit


def known_tokens(config: Any, source: str, vocab_size: int) -> int:
    """The vocabulary size of the weights. Raises :class:`RequestError` if the tokenizer has more tokens than that."""
    have = config.get_text_config().vocab_size
    if vocab_size > have:
        raise RequestError(
            f"{source} knows {have} tokens, the tokenizer has {vocab_size}: bring the model's own tokenizer"
        )
    return int(have)
