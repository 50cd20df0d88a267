"""Opening what a run has saved: a run folder, one of its checkpoints, or an export.

The hash of every tensor is verified before it is used, and the tokenizer's fingerprint is compared with that in the checkpoint.
Nothing is unpickled, code that a folder names is never run, and nothing on the disk changes.

Example::

    saved = load_model("runs/demo", "best")
    saved.model, saved.tokenizer, saved.step
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, final

import torch
from torch import Tensor, nn

from lmcore.checkpoint import manifest, reader
from lmcore.checkpoint.reader import Checkpoint
from lmcore.checkpoint.tensors import TensorFile
from lmcore.data.store.manifest import read_manifest
from lmcore.data.tokenizer.tokenizer import check_tokenizer, load_tokenizer
from lmcore.errors import RequestError
from lmcore.humanize import runs_near
from lmcore.model import lora
from lmcore.model.build import model_class_of, without_weights
from lmcore.model.config import refuse_unsafe_config, refuse_unsafe_index
from lmcore.plugins import import_path
from lmcore.process import available_bytes
from lmcore.saved.weights import Read, fitting, give_weights, layer_by_layer, own_tensors

EXPORT_RECORD: Final = "lmcore_export.json"
"""This file marks an export of lmcore (only such a folder is ever replaced) and contains the hashes of its files."""
_MOST_LAYERS: Final = 2_000
"""A model with more layers than this, and more layers than tensors in its files, is refused before it is built."""
_LARGEST_JSON_BYTES: Final = 64 << 20


@final
@dataclass(frozen=True, kw_only=True)
class Saved:
    """An opened model.

    Attributes:
        model: on its device, in evaluation mode.
        tokenizer: ``None`` for a run on the user's own data without a tokenizer.
        path: the folder of the checkpoint or export.
        kind: ``checkpoint`` or ``export``.
        step: ``None`` for an export.
        run_dir: ``None`` for an export outside its run folder.
        eos: whether every document of the training text ended with the end-of-sequence token.
        document_mask: whether it was trained without attention between the documents of a block.
        unit: ``data.unit`` of the run: what one document of a plain text is.
        block_size: ``data.block_size`` of the run; ``None`` if it was not given, so that blocks were as long as the context.
    """

    model: nn.Module
    tokenizer: Any
    path: Path
    kind: str
    step: int | None
    run_dir: Path | None
    eos: bool = True
    document_mask: bool = False
    unit: str = "auto"
    block_size: int | None = None


def load_model(
    path: str | os.PathLike[str],
    checkpoint: str = "auto",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    weights: str = "model",
    factory: str | Callable[..., nn.Module] | None = None,
    note: Callable[[str], None] = print,
) -> Saved:
    """Open the model of a run, a checkpoint, or an export, with its tokenizer.

    Args:
        path: a run folder, a checkpoint folder, or an export.
        checkpoint: for a run folder: ``auto`` (the newest good one), ``best``, or a step.
        device: default: the first GPU, or the CPU if there is none.
        dtype: of the parameters.
        weights: ``model``, or ``ema`` for the moving average if the run kept one (checkpoints only).
        factory: for your own model: the function, or its ``module:function``. A checkpoint only names it, because the
            content of a file must not decide which code runs.
        note: called with one line for each damaged checkpoint that was skipped.

    If the weights of a checkpoint of several ranks need more memory than is free on the device, they stay in the files, and
    each decoder layer is read whenever it computes. This is slow, and reported by ``note``.

    Raises:
        RequestError: there is nothing usable, files are damaged, the tokenizer is not the one trained with, or the model
            cannot be built.

    Example::

        saved = load_model("runs/mine", factory="my_model:build")
        logits = saved.model(input_ids=torch.tensor([[1, 2, 3]]))
    """
    kind, folder = resolve(path, checkpoint, note=note)
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device).cpu()  # fails on a device without memory (meta), too
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RequestError(
            f"device {device}: {_one_line(error)}; use cpu or one of this machine's GPUs"
        ) from error
    step: int | None = None
    run_dir: Path | None = folder.parent
    if kind == "checkpoint":
        # A checkpoint that was found in a run folder has just been verified; one that was given by its path has not.
        given = Path(os.path.abspath(path)) == folder
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(reader.open_checkpoint(folder, verify_bytes=given))
            step, run_dir = opened.step, folder.parent.parent
            reading = reading_of(opened)
            if said := _too_large(opened, device, dtype):
                note(f"{folder}: {said}; its layers are read from the files one at a time, which is slow")
                model = _layered(opened, stack, weights=weights, device=device, dtype=dtype)
            else:
                model = model_of(opened, weights=weights, factory=factory, device=device)
                model.to(device=device, dtype=dtype)
            tokenizer = tokenizer_of(opened, run_dir, note=note)
            if said:
                model.files = stack.pop_all()  # type: ignore[assignment]  # no parameter: they are open as long as the model lives
    else:
        if weights != "model":
            raise RequestError(
                f"{folder} is an export, which has one set of weights: leave --weights {weights} out"
            )
        model, tokenizer = open_export(folder).to(device=device, dtype=dtype), _tokenizer(folder)
        # A transformers folder from another program has no record.
        record = _json_object(folder / EXPORT_RECORD) if (folder / EXPORT_RECORD).is_file() else {}
        reading = _reading(record.get("data"))
        if not (folder.parent / "metrics.jsonl").exists():
            run_dir = None
    known = getattr(model, "real_vocab_size", None) or getattr(
        getattr(model, "config", None), "vocab_size", None
    )
    if tokenizer is not None and isinstance(known, int) and tokenizer.vocab_size > known:
        raise RequestError(
            f"{folder}: the model has {known} token ids, the tokenizer beside it {tokenizer.vocab_size}: it belongs to "
            "another model; restore the one that was trained with"
        )
    return Saved(
        model=model.eval(),
        tokenizer=tokenizer,
        path=folder,
        kind=kind,
        step=step,
        run_dir=run_dir,
        eos=reading["eos"],
        document_mask=reading["document_mask"],
        unit=reading["unit"],
        block_size=reading["block_size"],
    )


def reading_of(opened: Checkpoint) -> dict[str, Any]:
    """The run's :data:`_READING` options (without ``data.``): how the model expects its input."""
    config = opened.state.get("config")
    found = config if isinstance(config, Mapping) else {}
    return _reading({name: found.get(f"data.{name}") for name in _READING})


_READING = ("eos", "document_mask", "unit", "block_size")
"""Options of ``data`` that say how a text becomes the input of the model."""


def _reading(found: Any) -> dict[str, Any]:
    """The options of :data:`_READING`; what an older version did not record gets the default of a training."""
    known = found if isinstance(found, Mapping) else {}
    unit, block_size = known.get("unit"), known.get("block_size")
    return {
        "eos": known.get("eos") is not False,
        "document_mask": known.get("document_mask") is True,
        "unit": unit if unit in ("line", "paragraph", "file") else "auto",
        "block_size": block_size if type(block_size) is int and block_size > 0 else None,
    }


def resolve(
    path: str | os.PathLike[str], checkpoint: str = "auto", *, note: Callable[[str], None] = print
) -> tuple[str, Path]:
    """(``checkpoint`` or ``export``, its folder) for a run folder, a checkpoint or an export.

    Args:
        checkpoint: for a run folder: ``auto`` (the newest good one), ``best``, or a step.

    Raises:
        RequestError: there is nothing usable.
    """
    folder = Path(os.path.abspath(path))  # links are kept: a linked checkpoint belongs to the run of the link
    if not folder.is_dir():
        raise RequestError(
            f"{path}: no such folder; give a run folder, a checkpoint or an export{runs_near(path)}"
        )
    kind = None
    if (folder / manifest.MANIFEST).exists() and (folder / manifest.STATE).exists():
        kind = "checkpoint"
    elif (folder / "config.json").is_file():
        kind = "export"
    if kind is not None:
        if checkpoint != "auto":
            raise RequestError(
                f"{path} is one {kind}: checkpoint {checkpoint} is chosen from a run folder; give that"
            )
        return kind, folder
    if checkpoint.isdecimal() and len(checkpoint) < 20:
        checkpoint = manifest.step_name(int(checkpoint))
    checkpoints = folder / "checkpoints"
    try:
        found = reader.find(checkpoints, checkpoint, repair=False, note=note)
    except RequestError:
        if checkpoint != "best":
            raise
        # The run did not keep the best checkpoints, so choose by the validation loss.
        found = reader.find(checkpoints, checkpoint, metric="loss", mode="min", repair=False, note=note)
    if found is not None:
        found.close()
        return "checkpoint", Path(os.path.abspath(found.path))
    if (folder / "export" / "config.json").is_file():
        return "export", folder / "export"
    near = runs_near(path) or "; has the run saved yet?"
    raise RequestError(f"{path}: neither a checkpoint nor an export is in it{near}")


# ---- describing and building a model ------------------------------------------------------------------------


def describe(
    model: nn.Module, *, factory: str | None = None, arguments: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What :func:`model_of` needs to rebuild this model, as JSON; every checkpoint stores it as ``model``.

    Args:
        model: as built by :func:`lmcore.model.build.build_model`.
        factory, arguments: ``model.factory`` and ``model.config``, for the user's own model. Arguments that
            ``build_model`` added (``vocab_size``, ...) are read from the model.
    """
    if factory is not None:
        known: Any = getattr(model, "factory_arguments", {})
        return {"kind": "factory", "factory": factory, "arguments": {**known, **(arguments or {})}}
    config = model.config
    return {
        "kind": "transformers",
        "class": model.__class__.__name__,
        # to_dict has everything that from_dict needs; its JSON form turns dtypes into strings.
        "config": json.loads(config.to_json_string(use_diff=False)),  # type: ignore[union-attr, operator]
        "real_vocab_size": getattr(model, "real_vocab_size", None),
        **({"lora": model.lora} if hasattr(model, "lora") else {}),
    }


def _too_large(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> str:
    """Why the weights do not fit into the memory of the device; empty if they do, or need none."""
    description = opened.state.get("model")
    if not isinstance(description, Mapping) or description.get("kind") == "factory":
        return ""
    mapped = device.type == "cpu" and dtype is torch.float32  # whole tensors in a file are then only mapped
    needed = sum(
        math.prod(stored.shape) * dtype.itemsize
        for name in opened.keys("model")
        if (stored := opened.stored("model", name)) is not None and not (mapped and stored.whole)
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if free is None or needed <= 0.8 * free:
        return ""
    return f"weights of {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free on {device}"


def _layered(
    opened: Checkpoint, stack: contextlib.ExitStack, *, weights: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The model, whose layers are read from the files as long as ``stack`` is open."""
    model = structure_of(opened)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    read = reader_of(opened, model, weights=weights)
    stack.enter_context(layer_by_layer(model, lambda name: read(name).to(device, dtype)))
    return model


def model_of(
    opened: Checkpoint,
    *,
    weights: str = "model",
    factory: str | Callable[..., nn.Module] | None = None,
    device: torch.device | None = None,
) -> nn.Module:
    """The model of an open checkpoint, with its padded vocabulary, in evaluation mode.

    A weight that is stored in one file is a view of that file; one that several ranks have written is assembled in memory. The
    model of a factory gets copies. With ``device`` the weights are moved there one by one (except those of a factory).

    Raises:
        RequestError: the model cannot be built, or does not fit the tensors.
    """
    description = opened.state.get("model")
    if not isinstance(description, Mapping):
        raise RequestError(f"{opened.path}: its {manifest.STATE} does not say how the model is built")
    _refuse_no_average(opened, weights)
    where = str(opened.path)
    model = empty_model(dict(description), shapes=opened.shapes("model"), factory=factory, where=where)
    if description.get("kind") == "factory":
        # Copied in place, because the model may also refer to its tensors elsewhere.
        load_weights(model, tensors_of(opened, weights=weights), where)
    else:
        tensors = ((name, tensor.to(device)) for name, tensor in tensors_of(opened, weights=weights))
        give_weights(model, tensors, where)
    return model.eval()


def structure_of(opened: Checkpoint) -> nn.Module:
    """The transformers model of an open checkpoint without its weights: empty parameters, and its buffers.

    Raises:
        RequestError: the model cannot be built, or does not fit the tensors.
    """
    model = empty_model(dict(opened.state["model"]), shapes=opened.shapes("model"), where=str(opened.path))
    buffers = dict(model.named_buffers())
    for name in opened.keys("model"):
        if name in buffers:
            stored = opened.read("model", name)
            assert stored is not None
            buffers[name].copy_(stored)
    return model.eval()


def _refuse_no_average(opened: Checkpoint, weights: str) -> None:
    if weights == "ema" and not opened.keys("ema"):
        raise RequestError(
            f"{opened.path} has no moving average (optim.ema_decay was 0): use --weights model"
        )


def reader_of(opened: Checkpoint, model: nn.Module, *, weights: str = "model") -> Read:
    """A function that reads the weights of ``model`` from a checkpoint, one at a time, as float32.

    Raises:
        RequestError: a weight is missing, or there is no moving average.
    """
    _refuse_no_average(opened, weights)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    stored = set(opened.keys("model"))
    found: dict[str, str] = {}
    for same in names.values():
        kept = next((name for name in same if name in stored), None)
        if kept is None:
            raise RequestError(f"{opened.path}: the weight {same[0]} is missing")
        found |= dict.fromkeys(same, kept)
    return lambda name: _weight(opened, found.get(name, name), weights).float()


def empty_model(
    description: dict[str, Any],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    factory: str | Callable[..., nn.Module] | None = None,
    where: str = "this checkpoint",
) -> nn.Module:
    """The model that :func:`describe` described, with empty parameters (on the meta device) and buffers on the CPU. A model of
    a factory has the weights that the factory gives it.

    Args:
        shapes: names and shapes of the weights that will be loaded. They are compared with the model's before any memory is
            allocated for it, because a configuration could request any size.
        factory: as in :func:`load_model`.

    Raises:
        RequestError: the model is of a factory that the caller has not named, cannot be built, or does not fit the weights.
    """
    if description.get("kind") == "factory":
        named = description.get("factory")
        if factory is None or (isinstance(factory, str) and factory != named):
            raise RequestError(
                f"the model of {where} is built by {named!r}, which is code: if you trust it, add --factory {named}, or in "
                f"Python factory={named!r}"
            )
        build = import_path(factory, "--factory") if isinstance(factory, str) else factory
        arguments = description.get("arguments")
        if not isinstance(arguments, dict):
            _cannot_build(where, f"arguments of the factory are {arguments!r}")
        built: nn.Module = build(**arguments)
        return built
    from transformers.initialization import no_init_weights

    try:
        if shapes is not None:
            _refuse_deep(description["config"], len(shapes), where)
            with torch.device("meta"), no_init_weights():
                _refuse_misfit(_transformers_model(description), shapes, where)
        with without_weights():
            return _transformers_model(description)
    except RequestError:
        raise
    except Exception as error:  # a configuration from a file may cause any error in transformers
        _cannot_build(where, f"{type(error).__name__}: {_one_line(error)}")


def _cannot_build(where: str, why: str) -> NoReturn:
    raise RequestError(f"{where} describes no model that can be built: {why}")


def _transformers_model(description: dict[str, Any]) -> nn.Module:
    """Build the transformers model. Called in a context in which parameters are created without memory."""
    from transformers import CONFIG_MAPPING

    values = dict(description["config"])
    refuse_unsafe_config(values, manifest.STATE)
    config = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
    config.dtype = torch.float32
    model = model_class_of(config)(config)
    model.real_vocab_size = description["real_vocab_size"]
    if "lora" in description:
        lora.adapt(model, **description["lora"], weights=False)
    model.tie_weights()
    return model


def _refuse_deep(config: Any, tensors: int, where: str) -> None:
    """Refuse a model with too many layers: millions would take hours to build even without memory for their weights."""
    if not isinstance(config, Mapping):
        _cannot_build(where, "its configuration is no JSON object")
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_deep(value, tensors, where)
        if "layer" in str(key):
            count = len(value) if isinstance(value, list) else value
            if type(count) is int and count > max(_MOST_LAYERS, tensors):
                _cannot_build(where, f"{key} is {count:,}, but its files hold {tensors:,} tensors")


def _refuse_misfit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    own = own_tensors(model)
    for name, shape in shapes.items():
        fitting(own, name, shape, where)


def tensors_of(opened: Checkpoint, *, weights: str = "model") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights. For ``ema``, weights without an average are those of the model."""
    for name in opened.keys("model"):
        yield name, _weight(opened, name, weights)


def _weight(opened: Checkpoint, name: str, weights: str) -> Tensor:
    tensor = opened.read("ema", name) if weights == "ema" else None
    if tensor is None:
        tensor = opened.read("model", name)
    assert tensor is not None
    return tensor


def load_weights(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], where: str) -> None:
    """Copy named tensors into a model. Tied weights are given once, under any of their names.

    Raises:
        RequestError: the model has no weight for a tensor, or a weight of the model is missing.
    """
    own = own_tensors(model)
    missing = {id(p): name for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in tensors:
            target = fitting(own, name, tensor.shape, where)
            target.copy_(tensor)
            missing.pop(id(target), None)
    if missing:
        raise RequestError(f"{where}: the weight {next(iter(missing.values()))} is missing")


# ---- tokenizer ----------------------------------------------------------------------------------------------


def tokenizer_of(opened: Checkpoint, run_dir: Path, *, note: Callable[[str], None] = print) -> Any:
    """The tokenizer of a checkpoint's run, or ``None`` if the run has none (the user's own data).

    Args:
        note: called with a line if it is not known which tokenizer the checkpoint was trained with.

    Raises:
        RequestError: it is missing, or not the one that the checkpoint was trained with.
    """
    known = opened.state.get("tokenizer")
    folder = run_dir / "tokenizer"
    description = opened.state.get("model")
    own_model = isinstance(description, Mapping) and description.get("kind") == "factory"
    if not folder.exists() and known is None and (own_model or "tokenizer" in opened.state):
        return None
    if not folder.exists():
        raise RequestError(
            f"{folder} is missing: {opened.path.name} needs the tokenizer of its run; give the run folder, or restore it"
        )
    tokenizer = _tokenizer(folder)
    if "tokenizer" not in opened.state:
        known = _tokenizer_of_stores(opened, run_dir)
        if known is None:
            note(
                f"{opened.path.name} is of a version that did not write down its tokenizer, and its token store is not "
                f"there: {folder} is taken to be the one that it was trained with"
            )
    check_tokenizer(known, tokenizer, folder=folder)
    return tokenizer


def _tokenizer_of_stores(opened: Checkpoint, run_dir: Path) -> str | None:
    """The fingerprint of the tokenizer of a checkpoint of version 0.1.0, from the token stores that it used; ``None`` if they no
    longer exist."""
    config, cursor = opened.state.get("config"), opened.state.get("cursor")
    if not isinstance(config, Mapping) or not isinstance(cursor, Mapping):
        return None
    stores = str(config.get("data.store_dir"))
    for start in re.findall(r":([0-9a-f]{16})(?=,|$)", str(cursor.get("fingerprint"))):
        for place in (Path(stores), run_dir / stores):
            # There may be no store, or a damaged one.
            with contextlib.suppress(RequestError, OSError, ValueError, StopIteration):
                return str(read_manifest(next(place.glob(f"*-{start}")))["identity"]["tokenizer"])
    return None


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except RequestError:
        raise
    except Exception as error:  # untrusted files may cause any error in the libraries that read them
        raise RequestError(
            f"{folder}: its tokenizer cannot be opened: {type(error).__name__}: {_one_line(error)}"
        ) from error


# ---- exports ------------------------------------------------------------------------------------------------


def open_export(folder: Path) -> nn.Module:
    """The model of an export, or of any folder that transformers opens, on the CPU in float32.

    Raises:
        RequestError: files changed since the export, weights are missing, or transformers cannot open it.
    """
    where = str(folder)
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):  # a FIFO would block on open
            raise RequestError(f"{path} is neither a file nor a folder: remove it")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / name).exists():
            raise RequestError(
                f"{folder} holds {name}, which transformers would apply to the model: move the adapter to a folder of "
                "its own, and merge it or load it with peft"
            )
    config = _json_object(folder / "config.json")
    refuse_unsafe_config(config, where)
    if config.get("quantization_config") is not None:
        raise RequestError(f"{folder}: config.json asks for quantization, which lmcore does not open")
    try:
        _compare_with_record(folder)
        refuse_unsafe_index(where, where)
        _refuse_too_large(folder, config)
        return _from_folder(folder)
    except RequestError:
        raise
    except Exception as error:  # untrusted files may cause any error in transformers
        raise RequestError(
            f"{folder}: transformers cannot open it: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _from_folder(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, report = loaded
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise RequestError(f"{folder}: the weight {missing[0]} is missing in its files")
    return model


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of an export that affect what the model computes, by name."""
    names = [path.name for path in folder.glob("*.safetensors")] + ["config.json", "tokenizer.json"]
    return {name: manifest.digest(folder / name) for name in sorted(names) if (folder / name).is_file()}


def _compare_with_record(folder: Path) -> None:
    if not (folder / EXPORT_RECORD).is_file():
        return  # a transformers folder from another program
    listed = _json_object(folder / EXPORT_RECORD).get("files")
    if not isinstance(listed, Mapping):
        return  # an export of lmcore 0.1.0
    found = file_hashes(folder)
    for name in listed.keys() | found.keys():
        if listed.get(name) != found.get(name):
            raise RequestError(
                f"{folder}: {name} is damaged or was changed after the export; export again, or remove {EXPORT_RECORD} "
                "if the change is yours"
            )


def _refuse_too_large(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that is larger than its files, before memory is allocated for it."""
    from transformers import CONFIG_MAPPING
    from transformers.initialization import no_init_weights

    files = [TensorFile(path) for path in folder.glob("*.safetensors")]
    shapes = [file.shape(name) for file in files for name in file.names()]
    _refuse_deep(config, len(shapes), str(folder))
    values = dict(config)
    parsed = CONFIG_MAPPING[str(values.pop("model_type", None))].from_dict(values)
    with torch.device("meta"), no_init_weights():
        skeleton = model_class_of(parsed)(parsed)
        skeleton.tie_weights()
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    stored = sum(math.prod(shape) for shape in shapes)
    if wanted > stored:
        raise RequestError(
            f"{folder}: config.json describes {wanted:,} parameters, its files hold {stored:,} numbers"
        )


def _json_object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise RequestError(f"{path} is larger than {_LARGEST_JSON_BYTES:,} bytes: not a file of lmcore")
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path} is no JSON object")
    return value


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if len(text) <= 300 else f"{text[:300]}..."
