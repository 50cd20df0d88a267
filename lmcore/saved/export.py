"""Exporting a checkpoint to a folder that transformers, lm-eval and vLLM open.

The folder holds ``config.json``, ``model.safetensors`` (in pieces above a size), ``generation_config.json``, the
tokenizer's files, a model card ``README.md`` with its curve, the run's configuration, and a task file with which lm-eval
scores the user's own text; of a LoRA run also the adapter, in ``adapter/``. The padding of the vocabulary is cut off.
Before the folder appears under its name it is opened by transformers, and its logits are compared with the trainer's.
It opens in transformers 5 and 4.57.

Example::

    with open_checkpoint("runs/demo/checkpoints/step-00000500") as opened:
        export(opened, "runs/demo/export", run_dir="runs/demo")
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmcore import __version__
from lmcore.checkpoint.reader import Checkpoint
from lmcore.conventions import torch_dtype
from lmcore.disk import DISK, Disk
from lmcore.errors import FaultError, RequestError
from lmcore.model import lora, module
from lmcore.model.config import SPECIAL_IDS, context_length
from lmcore.process import is_alive
from lmcore.saved import card, load
from lmcore.saved.load import EXPORT_RECORD

LOGITS_TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit. Both sides are float32 of the same weights;
only the shape of the last product differs (the padding is gone), and with it the order of its sums."""
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
    """Write the export of a checkpoint; an older export of this name is replaced at the very end.

    Args:
        opened: an open checkpoint of a transformers model.
        folder: where the export appears.
        run_dir: whose tokenizer, configuration and metrics go with the weights.
        dtype: ``fp32`` or ``bf16`` of the weights in the file.
        weights: ``model``, or ``ema`` for the moving average.
        max_shard_bytes: a larger model is split into files of this size.
        note: gets one line on what was written.

    Returns:
        ``folder``.

    Raises:
        RequestError: a model that transformers does not know, another tokenizer than the one trained with, or a folder
            that is something else than an export.
        FaultError: the written folder does not give the trainer's logits (nothing appears under its name).
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
        trained: Any = load.model_of(opened, weights=weights)
        tokenizer = load.tokenizer_of(opened, run_dir)
        adapter = None
        if hasattr(trained, "lora"):
            adapter = _write_adapter(trained, aside / ADAPTER_FOLDER, opened)
            _merge(trained)
        _write_model(trained, aside, torch_dtype(dtype), max_shard_bytes)
        tokenizer.save(aside, model_max_length=context_length(trained))
        difference = verify(aside, trained, torch_dtype(dtype))
        record = {
            "lmcore": __version__,
            "run": run_dir.resolve().name,
            "step": opened.step,
            "weights": weights,
            "dtype": dtype,
            "largest_logit_difference": difference,
            "files": load.file_hashes(aside),
        }
        disk.write_json(aside / EXPORT_RECORD, record)
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
        disk.fsync_tree(aside)
        _replace(aside, target, disk)
    finally:
        disk.remove_quietly(aside)
    note(f"exported step {opened.step} ({weights}, {dtype}) to {folder}; logits verified")
    return Path(folder)


def refuse_foreign_folder(target: Path) -> None:
    """Refuse to replace anything that is not an export of lmcore. Called before the training, too.

    Raises:
        RequestError: ``target`` is a file, a link, or a folder with other content.
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


def _remove_leftovers(target: Path, disk: Disk) -> None:
    """Remove what exports that were killed have left beside the target; each is as large as the model."""
    if not target.parent.is_dir():
        return
    for path in target.parent.glob(f".{target.name}.*"):
        process, _, kind = path.name.removeprefix(f".{target.name}.").partition(".")
        if (
            process.isdigit()
            and kind in ("tmp", "old")
            and (int(process) == os.getpid() or not is_alive(int(process)))
        ):
            disk.remove_quietly(path)


def _replace(aside: Path, target: Path, disk: Disk) -> None:
    """Put the new folder in the place of the old one; killed in between, the old one is still beside it."""
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
    """The adapter as peft saves it, to be applied to the base model by ``PeftModel.from_pretrained``.

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
    tensors = {
        f"base_model.model.{name}": tensor.detach().contiguous()
        for name, tensor in get_peft_model_state_dict(trained).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return {"method": words, "parameters": sum(tensor.numel() for tensor in tensors.values())}


def _write_model(trained: Any, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Weights, ``config.json`` and ``generation_config.json``, with the vocabulary cut back."""
    config = module.export_config(trained)
    small = trained.__class__(config)
    tied = dict(trained.named_parameters())
    load.load_weights(small, module.export_state(tied.items(), trained), "the checkpoint")
    small.load_state_dict(dict(trained.named_buffers()), strict=False)
    small.tie_weights()
    for name in SPECIAL_IDS[:3]:
        setattr(small.generation_config, name, getattr(config, name, None))
    small.to(dtype).save_pretrained(folder, max_shard_size=max_shard_bytes, safe_serialization=True)
    path = folder / "config.json"
    values = both_versions(json.loads(path.read_text(encoding="utf-8")))
    DISK.write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n", durable=False)


def both_versions(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 with the names that transformers 4, vLLM and llama.cpp look for too.

    Version 5 keeps rotary settings in ``rope_parameters``; version 4 ignores that and silently uses its default base
    of 10,000.
    """
    config = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # not the nested form by kind of layer
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    return config


@torch.no_grad()
def verify(folder: Path, trained: nn.Module, dtype: torch.dtype) -> float:
    """Open the folder as a user will and compare its logits with the trainer's; the largest difference.

    Raises:
        FaultError: they differ by more than :data:`LOGITS_TOLERANCE`.
    """
    opened: Any = load.open_export(folder)
    vocabulary = opened.config.get_text_config().vocab_size
    # The same rounding as in the file: of parameters. Buffers (rotary frequencies) are not in it.
    for parameter in trained.parameters():
        parameter.copy_(parameter.to(dtype))
    reference: Any = trained.eval()
    length = min(64, context_length(trained) or 64)
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    expected = reference(input_ids=ids).logits[..., :vocabulary]
    got = opened.eval()(input_ids=ids).logits
    if got.shape != expected.shape:
        raise FaultError(f"export: logits of shape {tuple(got.shape)}, the trainer's {tuple(expected.shape)}")
    difference = float((got - expected).abs().max())
    if not difference <= LOGITS_TOLERANCE * float(expected.abs().max()):
        raise FaultError(f"export: the folder's logits differ from the trainer's by {difference:.3g}")
    return difference


def push(folder: str | os.PathLike[str], repository: str, *, private: bool = True) -> str:
    """Upload an export to the Hugging Face Hub; the address of the model.

    Raises:
        RequestError: no such repository, no token, or no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=os.fspath(folder))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise RequestError(f"--push {repository}: {why}; is there a token (hf auth login)?") from error
    return str(address)
