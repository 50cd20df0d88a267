"""Exporting a checkpoint to a folder that transformers, lm-eval and vLLM open.

The folder contains ``config.json``, ``model.safetensors`` (split above a size), ``generation_config.json``, the tokenizer's
files, a model card ``README.md`` with its curve, the run's configuration, and a task file with which lm-eval scores the user's
own text; for a LoRA run also the adapter, in ``adapter/``. The padding of the vocabulary is removed. Before the folder appears
under its name, transformers opens it, and its logits are compared with the trainer's. It opens in transformers 5 and 4.57.

Weights are copied from the checkpoint to the files one at a time, and the trainer's logits are computed with one decoder layer
in memory at a time, so that the model need not fit into memory. transformers maps the files into memory if they have the dtype
and layout of the computation. Files in bf16, or of a mixture of experts, need 4 bytes per parameter instead, and the logits are
compared only if that much memory is free. A LoRA run is merged in memory.

Example::

    with open_checkpoint("runs/demo/checkpoints/step-00000500") as opened:
        export(opened, "runs/demo/export", run_dir="runs/demo")
"""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmcore import __version__
from lmcore.checkpoint.reader import Checkpoint
from lmcore.checkpoint.tensors import plan, write_planned
from lmcore.conventions import torch_dtype
from lmcore.disk import DISK, Disk
from lmcore.errors import FaultError, RequestError
from lmcore.humanize import message_of, size
from lmcore.model import lora, module
from lmcore.model.build import without_weights
from lmcore.model.config import SPECIAL_IDS, context_length
from lmcore.process import available_bytes, is_alive
from lmcore.saved import card, load
from lmcore.saved.load import EXPORT_RECORD
from lmcore.saved.weights import Read, layer_by_layer

LOGITS_TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit. Both are computed in float32 from the same weights; only
the shape of the last product differs (without the padding), and with it the order of its sums."""
MOST_OF_MEMORY = 0.8
"""Largest share of the free memory for the check of an export; if it would need more, the check is skipped."""
ADAPTER_FOLDER = "adapter"


def export(
    opened: Checkpoint,
    folder: str | os.PathLike[str],
    *,
    run_dir: str | os.PathLike[str],
    dtype: str = "fp32",
    weights: str = "model",
    max_shard_bytes: int = 5_000_000_000,
    note: Callable[[str], None] = lambda text: None,
    disk: Disk = DISK,
) -> Path:
    """Write the export of a checkpoint. An existing export of this name is replaced at the very end.

    Args:
        opened: an open checkpoint of a transformers model.
        folder: the folder of the export.
        run_dir: the run folder, whose tokenizer, configuration and metrics are exported with the weights.
        dtype: dtype of the weights in the file: ``fp32`` or ``bf16``.
        weights: ``model``, or ``ema`` for the moving average.
        max_shard_bytes: a larger model is split into files of this size.
        note: called with one line about what was written.

    Returns:
        ``folder``.

    Raises:
        RequestError: transformers does not know the model, the tokenizer is not the one trained with, or ``folder`` exists
            and is not an export.
        FaultError: the written folder does not produce the trainer's logits (nothing appears under its name).
    """
    if dtype not in ("fp32", "bf16"):
        raise RequestError(f"export dtype {dtype!r} must be fp32 or bf16")
    description = opened.state.get("model") or {}
    if description.get("kind") != "transformers":
        raise RequestError(
            "only a transformers model can be exported: this one was built by model.factory; "
            f'lmcore.load_model("{opened.path}", factory=...) opens it'
        )
    target, run_dir = Path(os.path.abspath(folder)), Path(run_dir)
    refuse_foreign_folder(target)
    _remove_leftovers(target, disk)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    disk.makedirs(aside)
    try:
        tokenizer = load.tokenizer_of(opened, run_dir, note=note)
        adapter = None
        trained: Any
        if "lora" in description:
            trained = load.model_of(opened, weights=weights)
            adapter = _write_adapter(trained, aside / ADAPTER_FOLDER, opened)
            _merge(trained)
            read: Read = trained.get_parameter
        else:
            trained = load.structure_of(opened)
            read = load.reader_of(opened, trained, weights=weights)
        written = _write_model(trained, read, aside, torch_dtype(dtype), max_shard_bytes, disk)
        tokenizer.save(aside, model_max_length=context_length(trained))
        hashes = load.file_hashes(aside)
        for name, entry in written.items():
            if hashes[name] != entry["sha256"]:
                raise FaultError(f"export: {name} reads back differently than it was written")
        needed, free = opening_bytes(trained, torch_dtype(dtype)), available_bytes()
        if free is None or needed <= MOST_OF_MEMORY * free:
            difference = verify(aside, trained, read, torch_dtype(dtype))
            verified = "logits verified"
        else:
            difference = None
            verified = (
                f"every byte read back, but logits not compared: opened as float32 it takes {size(needed)} of memory, "
                f"{size(free)} are free"
            )
        record = {
            "lmcore": __version__,
            "run": run_dir.resolve().name,
            "step": opened.step,
            "weights": weights,
            "dtype": dtype,
            "data": load.reading_of(opened),
            "largest_logit_difference": difference,
            "files": hashes,
        }
        parameters = module.parameter_counts(trained)["total"]
        card.write(
            aside,
            run_dir,
            opened=opened,
            record=record,
            tokenizer=tokenizer,
            parameters=parameters,
            adapter=adapter,
            disk=disk,
        )
        disk.write_json(aside / EXPORT_RECORD, record | {"names": [*_names_in(aside), EXPORT_RECORD]})
        disk.fsync_tree(aside)
        _replace(aside, target, disk)
    finally:
        disk.remove_quietly(aside)
    note(f"exported step {opened.step} ({weights}, {dtype}) to {folder}; {verified}")
    return Path(folder)


def refuse_foreign_folder(target: Path) -> None:
    """Refuse to replace anything that is not an export of lmcore. Also called before the training.

    Raises:
        RequestError: ``target`` is a file, a link, a folder with other content, or an export to which somebody has added
            files, such as notes or a conversion to another format.
    """
    if target.is_symlink():
        raise RequestError(
            f"{target} is a link and would be replaced by the export: give another folder, or remove it"
        )
    if not target.exists():
        return
    if not target.is_dir() or (not (target / EXPORT_RECORD).is_file() and any(target.iterdir())):
        raise RequestError(
            f"{target} exists and is not an export of lmcore: it would be replaced; give another folder, or remove it"
        )
    added = _added(target)
    if added:
        raise RequestError(
            f"{target} holds {added[0]}{f' and {len(added) - 1} more files' if added[1:] else ''} beside the export, which "
            f"would be removed when it is replaced: move {'them' if added[1:] else 'it'} elsewhere"
        )


def _names_in(folder: Path) -> list[str]:
    """The relative paths of the files in an export, except hidden ones, which programs of the system leave."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _added(target: Path) -> list[str]:
    """Files in an export that lmcore did not write. For an export of an older version this is not known."""
    record = target / EXPORT_RECORD
    try:
        written = json.loads(record.read_bytes())["names"] if record.is_file() else None
        return sorted(set(_names_in(target)) - set(written)) if isinstance(written, list) else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _remove_leftovers(target: Path, disk: Disk) -> None:
    """Remove what killed exports have left next to the target; each is as large as the model."""
    if not target.parent.is_dir():
        return
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        process, _, kind = path.name.removeprefix(f".{target.name}.").partition(".")
        if (
            process.isdecimal()
            and len(process) < 10
            and kind in ("tmp", "old")
            and (int(process) == os.getpid() or not is_alive(int(process)))
        ):
            disk.remove_quietly(path)


def _replace(aside: Path, target: Path, disk: Disk) -> None:
    """Replace the old folder by the new one. After a kill in between, the old one still exists next to it."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        disk.rename(target, old)
    disk.rename(aside, target)
    disk.fsync_dir(target.parent)
    disk.remove_quietly(old)


# ---- the files ----------------------------------------------------------------------------------------------


@torch.no_grad()
def _merge(trained: Any) -> None:
    """Merge low-rank adapters into the weights. Raises ``FaultError`` if that changes what the model computes."""
    ids = torch.arange(min(64, trained.real_vocab_size)).reshape(1, -1)[:, : context_length(trained)]
    before = trained(input_ids=ids).logits
    lora.merge(trained)
    difference = float((trained(input_ids=ids).logits - before).abs().max())
    if not difference <= LOGITS_TOLERANCE * float(before.abs().max()):
        raise FaultError(f"export: merging the adapters changes the logits by {difference:.3g}")


def _write_adapter(trained: Any, folder: Path, opened: Checkpoint) -> dict[str, Any]:
    """Write the adapter in peft's format, so that ``PeftModel.from_pretrained`` can apply it to the base model.

    Returns:
        What the model card says about it.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    DISK.mkdir(folder)
    words = lora.describe(trained)
    config = trained.peft_config["default"]
    config.base_model_name_or_path = card.base_model(opened)
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.save_pretrained(os.fspath(folder))
    # The vocabulary keeps its size here. peft would ask the Hub for the base model to find that out.
    tensors = {
        f"base_model.model.{name}": tensor.detach().contiguous()
        for name, tensor in get_peft_model_state_dict(trained, save_embedding_layers=False).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return {"method": words, "parameters": sum(tensor.numel() for tensor in tensors.values())}


def _write_model(
    trained: Any, read: Read, folder: Path, dtype: torch.dtype, max_shard_bytes: int, disk: Disk
) -> dict[str, dict[str, Any]]:
    """Write the weights, ``config.json`` and ``generation_config.json`` in the layout of ``save_pretrained``, without the
    padding of the vocabulary. One weight (for a mixture of experts: one layer) is in memory at a time.

    Args:
        trained: its parameters may be empty.

    Returns:
        ``bytes`` and ``sha256`` of the weight files by name.
    """
    with without_weights():
        small = trained.__class__(module.export_config(trained))
    small.tie_weights()
    small.config.dtype = str(dtype).removeprefix("torch.")
    small.config.save_pretrained(folder)
    for name in SPECIAL_IDS[:3]:
        setattr(small.generation_config, name, getattr(small.config, name, None))
    small.generation_config.save_pretrained(folder)
    path = folder / "config.json"
    values = both_versions(json.loads(path.read_text(encoding="utf-8")))
    disk.write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n", durable=False)

    buffers = dict(trained.named_buffers())
    kept = set(small.state_dict()) - set(small._keys_to_ignore_on_save or ())
    own = dict(small.named_parameters()) | dict(small.named_buffers())  # a tied weight appears once
    groups = _converted_together(small, [name for name in own if name in kept])

    def type_of(tensor: Tensor) -> torch.dtype:
        return dtype if tensor.is_floating_point() else tensor.dtype

    def in_file() -> Iterator[Tensor]:
        names = itertools.chain.from_iterable(groups)
        tensors = ((name, buffers[name] if name in buffers else read(name).detach()) for name in names)
        cut = module.export_state(tensors, small)
        for group in groups:
            converted = _as_in_files(small, dict(itertools.islice(cut, len(group))))
            yield from (tensor.to(type_of(tensor)) for tensor in converted.values())

    layout = [
        ("model", name, None, tuple(empty.shape), type_of(empty))
        for group in groups
        for name, empty in _as_in_files(
            small, {name: own[name].detach().to("meta") for name in group}
        ).items()
    ]
    planned = plan(layout, shard_bytes=max_shard_bytes)
    written = write_planned(disk, folder, planned, in_file())
    if len(written) > 1:
        index = {
            "metadata": {
                "total_parameters": small.num_parameters(),
                "total_size": sum(planned.data_bytes.values()),
            },
            "weight_map": {entry.key: entry.file for entry in planned.entries},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        disk.write_text(folder / "model.safetensors.index.json", text, durable=False)
    return written


def _converted_together(model: Any, names: list[str]) -> list[list[str]]:
    """The names in groups that transformers converts together to the layout of its files: alone, or by decoder layer if a
    family stores several weights as one (mixtures of experts)."""
    if not _is_converted(model):
        return [[name] for name in names]
    layers = {id(layer): name for name, layer in model.named_modules()}
    prefixes = [f"{layers[id(layer)]}." for layer in module.decoder_layers(model)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(next(filter(name.startswith, prefixes), name), []).append(name)
    return list(groups.values())


def _is_converted(model: Any) -> bool:
    """Whether transformers uses different layouts of the weights in memory and in files."""
    nothing: dict[str, Tensor] = {}
    return _as_in_files(model, nothing) is not nothing


def _as_in_files(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion  # lazily: the import takes seconds

    found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return found


def opening_bytes(trained: Any, dtype: torch.dtype) -> int:
    """The memory for the weights of an export when transformers opens it in float32; 0 if they are mapped."""
    mapped = dtype is torch.float32 and not _is_converted(trained)
    return 0 if mapped else 4 * module.parameter_counts(trained)["total"]


def both_versions(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 with the additional names that transformers 4, vLLM and llama.cpp read.

    Version 5 stores rotary settings in ``rope_parameters``; version 4 ignores them and silently uses its default base of
    10,000.
    """
    config = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # not the form that is nested by layer type
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    return config


@torch.no_grad()
def verify(folder: Path, trained: nn.Module, read: Read, dtype: torch.dtype) -> float:
    """Open the folder as a user would, and compare its logits with the trainer's. Returns the largest difference.

    Args:
        trained: its parameters may be empty; they get their weights layer by layer.
        read: reads a weight by name.

    Raises:
        FaultError: they differ by more than :data:`LOGITS_TOLERANCE`, or the trainer's are not finite.
    """
    opened: Any = load.open_export(folder)
    # As in training; not every family supports the cache.
    opened.config.use_cache = opened.config.get_text_config().use_cache = False
    vocabulary = opened.config.get_text_config().vocab_size
    reference: Any = trained.eval()
    length = min(64, context_length(trained) or 64)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    # Round the parameters as in the file. Buffers (rotary frequencies) are not in the file.
    with layer_by_layer(reference, lambda name: read(name).detach().to(dtype).float()):
        expected = reference(input_ids=ids).logits[..., :vocabulary]
    if not bool(expected.isfinite().all()):
        raise FaultError(
            "export: the trained model's own logits are not finite: its weights diverged. Train with a lower optim.lr, or export "
            "an earlier checkpoint (lmcore export RUN/checkpoints/step-...)"
        )
    got = opened.eval()(input_ids=ids).logits
    if got.shape != expected.shape:
        raise FaultError(f"export: logits of shape {tuple(got.shape)}, the trainer's {tuple(expected.shape)}")
    difference = float((got - expected).abs().max())
    if not difference <= LOGITS_TOLERANCE * float(expected.abs().max()):
        raise FaultError(f"export: the folder's logits differ from the trainer's by {difference:.3g}")
    return difference


def push(folder: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload an export to the Hugging Face Hub. Returns the address of the model.

    Raises:
        RequestError: there is no such repository, no token, or no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=os.fspath(folder))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        why = message_of(error)
        raise RequestError(f"--push {repository}: {why}; is there a token (hf auth login)?") from error
    return str(address)
