"""A checkpoint -> a folder that transformers, lm-eval and vLLM open.

Comes in: a verified checkpoint and its run folder. Goes out: ``config.json``, ``model.safetensors`` (in
pieces above a size), ``generation_config.json``, the tokenizer's files, a model card ``README.md`` with its
curve, the run's configuration, and a task file with which lm-eval scores the user's own text. What always
holds: the padding of the vocabulary is cut off; the folder is opened again by transformers and its logits
are compared with the trainer's before it appears under its name; it opens in transformers 5 and 4.57.

    >>> with checkpoint.find("runs/demo/checkpoints") as opened:
    ...     export(opened, "runs/demo/export", run_dir="runs/demo")
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmcore import __version__
from lmcore.checkpoint.writer import Checkpoint
from lmcore.conventions import torch_dtype
from lmcore.data.tokenizer import tokenizer as tokenizers
from lmcore.errors import FaultError, RequestError
from lmcore.model import lora, module
from lmcore.model.config import SPECIAL_IDS, context_length
from lmcore.saved import card, load
from lmcore.saved.load import describe

__all__ = ["describe", "export", "push"]

RECORD_FILE = "lmcore_export.json"
"""Marks a folder as ours (only such a one is replaced) and says where it came from."""
LOGITS_TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit. Both sides are float32 of the same weights;
only the shape of the last product differs (the padding is gone), and with it the order of its sums."""


def export(
    opened: Checkpoint,
    folder: str | os.PathLike[str],
    *,
    run_dir: str | os.PathLike[str],
    dtype: str = "fp32",
    weights: str = "model",
    max_shard_bytes: int = 5_000_000_000,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the export of a checkpoint; an older export of this name is replaced at the very end.

    Args:
        run_dir: whose tokenizer, configuration and metrics go with the weights.
        dtype: ``fp32`` or ``bf16`` of the weights in the file.
        weights: ``model``, or ``ema`` for the moving average.
        max_shard_bytes: a larger model is split into files of this size.
        note: gets one line on what was written.

    Raises:
        RequestError: a model that transformers does not know, or a folder that is something else.
        FaultError: the written folder does not give the trainer's logits (nothing appears under its name).
    """
    if dtype not in ("fp32", "bf16"):
        raise RequestError(f"export dtype {dtype!r} must be fp32 or bf16")
    description = opened.state.get("model") or {}
    if description.get("kind") != "transformers":
        raise RequestError(
            "only a transformers model can be exported: yours comes from model.factory, which opens "
            f"{opened.path} by lmcore.saved.load.open_saved"
        )
    target, run_dir = Path(folder), Path(run_dir)
    _refuse_strangers(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        trained: Any = load.model_of(opened, weights=weights)
        if hasattr(trained, "lora"):
            _merge(trained)
        tokenizer = tokenizers.load(run_dir / "tokenizer")
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
        }
        (aside / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        card.write(aside, run_dir, record=record, tokenizer=tokenizer, parameters=_count(trained))
        _replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    note(f"exported step {opened.step} ({weights}, {dtype}) to {target}; logits verified")
    return target


@torch.no_grad()
def _merge(trained: Any) -> None:
    """Low-rank adapters become part of the weights. Raises :class:`FaultError` if that changes what it computes."""
    ids = torch.arange(min(64, trained.real_vocab_size)).reshape(1, -1)[:, : context_length(trained)]
    before = trained(input_ids=ids).logits
    lora.merge(trained)
    difference = float((trained(input_ids=ids).logits - before).abs().max())
    if not difference <= LOGITS_TOLERANCE * float(before.abs().max()):
        raise FaultError(f"export: merging the adapters changes the logits by {difference:.3g}")


def _refuse_strangers(target: Path) -> None:
    if target.exists() and not (target / RECORD_FILE).is_file() and any(target.iterdir()):
        raise RequestError(f"{target} exists and is no export of lmcore: give another folder or remove it")


def _replace(aside: Path, target: Path) -> None:
    """Put the new folder in the place of the old one; killed in between, the old one is still beside it."""
    for path in sorted(aside.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(aside, target)
    shutil.rmtree(old, ignore_errors=True)


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
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(both_versions(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def both_versions(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 with the names that transformers 4, vLLM and llama.cpp look for too.

    Version 5 keeps rotary settings in ``rope_parameters``; version 4 would not see them there and take its
    default base of 10,000 without a word.
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
    reference: Any = trained.to(dtype).float().eval()  # the same rounding as in the file
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
        RequestError: no token, no connection, or a name that the Hub refuses.
    """
    from huggingface_hub import HfApi  # lazily: needs the network, and is rarely asked for
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=os.fspath(folder))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise RequestError(f"--push {repository}: {why}; is a token there (hf auth login)?") from error
    return str(address)


def _count(model: nn.Module) -> int:
    return module.parameter_counts(model)["total"]
