"""What a run has left behind -> a model and its tokenizer, ready to be used.

Comes in: a run folder, one of its checkpoints, or an export. Goes out: :class:`Saved`. What always holds: a
checkpoint is verified to the last byte before it is used; nothing is unpickled and no foreign code is run;
nothing on disk changes.

    >>> saved = open_saved("runs/demo", which="best")
    >>> saved.model, saved.tokenizer, saved.step
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from lmcore.checkpoint import writer
from lmcore.data.tokenizer import tokenizer as tokenizers
from lmcore.errors import RequestError
from lmcore.model import lora
from lmcore.model.config import refuse_unsafe_config, refuse_unsafe_index
from lmcore.plugins import import_path


@final
@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model on its device in evaluation mode, and where it came from.

    ``step`` and ``run_dir`` are ``None`` for an export that has left its run folder.
    """

    model: nn.Module
    tokenizer: Any
    path: Path
    kind: str
    """``checkpoint`` or ``export``."""
    step: int | None
    run_dir: Path | None


def describe(
    model: nn.Module, *, factory: str | None = None, arguments: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What :func:`model_of` needs to build this model again; JSON, kept in every checkpoint as ``model``.

    Args:
        model: what :func:`lmcore.model.build.build_model` gave.
        factory, arguments: ``model.factory`` and its own arguments, for the user's own model; those that
            :func:`lmcore.model.build.build_model` added (``vocab_size``, ...) are known to the model.
    """
    if factory is not None:
        known: Any = getattr(model, "factory_arguments", {})
        return {"kind": "factory", "factory": factory, "arguments": {**known, **(arguments or {})}}
    config = model.config
    return {
        "kind": "transformers",
        "class": model.__class__.__name__,
        # to_dict leaves out nothing that from_dict needs; its JSON form turns dtypes into words.
        "config": json.loads(config.to_json_string(use_diff=False)),  # type: ignore[union-attr, operator]
        "real_vocab_size": getattr(model, "real_vocab_size", None),
        **({"lora": model.lora} if hasattr(model, "lora") else {}),
    }


def resolve(path: str | os.PathLike[str], which: str = "auto", *, quiet: bool = False) -> tuple[str, Path]:
    """(``checkpoint`` or ``export``, its folder) for a run folder, a checkpoint or an export.

    Args:
        which: of a run folder: ``auto`` (the newest good checkpoint), ``best``, or a step.

    Raises:
        RequestError: nothing usable there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RequestError(f"{folder}: there is no such folder; give a run folder, a checkpoint or an export")
    if (folder / writer.MANIFEST).is_file() and (folder / writer.STATE).is_file():
        return "checkpoint", folder.resolve()
    if (folder / "config.json").is_file():
        return "export", folder.resolve()
    if which.isdigit():
        which = writer.step_name(int(which))
    say = (lambda text: None) if quiet else print
    try:
        found = writer.find(folder / "checkpoints", which, repair=False, note=say)
    except RequestError:
        if which != "best":
            raise
        # The run kept no best by a metric of its own: the held-out loss of its checkpoints decides.
        places = folder / "checkpoints"
        found = writer.find(places, which, metric="loss", mode="min", repair=False, note=say)
    if found is not None:
        found.close()
        return "checkpoint", found.path
    if (folder / "export" / "config.json").is_file():
        return "export", (folder / "export").resolve()
    raise RequestError(f"{folder}: neither a checkpoint nor an export is in it; has the run saved yet?")


def open_saved(
    path: str | os.PathLike[str],
    which: str = "auto",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    weights: str = "model",
    factory: str | None = None,
) -> Saved:
    """Open what :func:`resolve` finds.

    Args:
        factory: ``module:function`` of the user's own model; a checkpoint's word for it runs no code.
        device: default: the first GPU, else the CPU.
        dtype: of the parameters.
        weights: ``model``, or ``ema`` for the moving average where the run kept one (checkpoints only).

    Raises:
        RequestError: nothing usable there, or a model that cannot be built again.
    """
    kind, folder = resolve(path, which)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind == "checkpoint":
        # What was found in a run folder has just been verified; a checkpoint given by its path has not.
        given = Path(path).resolve() == folder
        with writer.open_checkpoint(folder, verify_bytes=given) as opened:
            model, step = model_of(opened, weights=weights, factory=factory), opened.step
        run_dir = folder.parent.parent
        tokenizer = tokenizers.load(run_dir / "tokenizer")
    else:
        model, step, run_dir = open_export(folder), None, folder.parent
        tokenizer = tokenizers.load(folder)
        if not (run_dir / "metrics.jsonl").exists():
            run_dir = None
    known = getattr(model, "real_vocab_size", None) or getattr(
        getattr(model, "config", None), "vocab_size", None
    )
    if isinstance(known, int) and tokenizer.vocab_size > known:
        raise RequestError(
            f"{folder}: the model knows {known} tokens, the tokenizer beside it has "
            f"{tokenizer.vocab_size}: that is of another model; bring back the one that was trained with"
        )
    return Saved(
        model=model.to(device=device, dtype=dtype).eval(),
        tokenizer=tokenizer,
        path=folder,
        kind=kind,
        step=step,
        run_dir=run_dir,
    )


def open_export(folder: Path) -> nn.Module:
    """The model of an export on the CPU, in float32."""
    from transformers import AutoModelForCausalLM

    refuse_unsafe_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), str(folder))
    refuse_unsafe_index(str(folder), str(folder))
    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
    )


def empty_model(description: dict[str, Any], *, factory: str | None = None) -> nn.Module:
    """The model that :func:`describe` described, on the CPU, with weights that mean nothing yet.

    Raises:
        RequestError: it is of a factory that the caller has not named: what stands in a checkpoint must not
            decide which code runs (``os:system`` is an import path too); or nothing that can be built.
    """
    if description.get("kind") == "factory":
        named = description.get("factory")
        if factory is None or factory != named:
            raise RequestError(
                f"this checkpoint's model is made by {named!r}, which is code: if you know it, say --factory {named}"
            )
        return import_path(factory, "--factory")(**description["arguments"])
    try:
        return _empty_transformers_model(description)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"this checkpoint describes no model that can be built: {error!r}") from error


def _empty_transformers_model(description: dict[str, Any]) -> nn.Module:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    values = dict(description["config"])
    refuse_unsafe_config(values, "state.json")
    config = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
    config.dtype = torch.float32
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config.__class__]
    model = model_class(config)
    model.real_vocab_size = description["real_vocab_size"]
    if "lora" in description:
        lora.adapt(model, **description["lora"])
    return model


def tensors_of(opened: writer.Checkpoint, *, weights: str = "model") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the weights; of ``ema`` those that have an average, and the others as they are."""
    for name in opened.keys("model"):
        tensor = opened.read("ema", name) if weights == "ema" else None
        if tensor is None:
            tensor = opened.read("model", name)
        assert tensor is not None
        yield name, tensor


def model_of(opened: writer.Checkpoint, *, weights: str = "model", factory: str | None = None) -> nn.Module:
    """The checkpoint's model on the CPU, with its padded vocabulary, in evaluation mode."""
    description = opened.state.get("model")
    if description is None:
        raise RequestError(f"{opened.path}: its state does not say how the model is built")
    model = empty_model(description, factory=factory)
    load_weights(model, tensors_of(opened, weights=weights), str(opened.path))
    return model.eval()


def load_weights(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], where: str) -> None:
    """Copy named tensors into a model; every weight must come, and nothing else.

    Tied weights come once, under any of their names.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    missing = {id(p): name for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in tensors:
            target = own.get(name)
            if target is None or target.shape != tensor.shape:
                have = "no such weight" if target is None else f"shape {tuple(target.shape)}"
                raise RequestError(f"{where}: weight {name} {tuple(tensor.shape)} does not fit: {have}")
            target.copy_(tensor)
            missing.pop(id(target), None)
    if missing:
        raise RequestError(f"{where}: the weight {next(iter(missing.values()))} is missing")
