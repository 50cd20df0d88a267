"""Checks that need neither data nor torch, so that they refuse a request within a second, before any work.

``train_lm.py``, ``--dry_run`` and ``lmcore plan`` call :func:`preflight`. What depends on the tokenizer, the model or the text
is checked later, once these are known.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcore.config.schema import global_batches
from lmcore.conventions import DS_CONFIGS, context_in, deepspeed_file, flag
from lmcore.data.steps import share_of
from lmcore.data.text import sources
from lmcore.errors import RequestError
from lmcore.humanize import did_you_mean, one_line
from lmcore.run.folder import local_run_dir
from lmcore.storage import Store, is_url

if TYPE_CHECKING:
    from lmcore.config.schema import RunConfig

TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""The trackers of accelerate. The list is repeated here because accelerate imports torch; a test compares the two."""
RESUME = ("auto", "never", "best")


def preflight(config: RunConfig, *, processes: int = 1) -> None:
    """Check files, sizes and names of a configuration.

    Args:
        processes: number of data-parallel processes, among which the global batch is divided.

    Raises:
        RequestError: a missing file, a batch that cannot be divided, an unknown tracker, a block longer than the
            model's context, a prompt that is not UTF-8.
    """
    _check_run_dir(config)
    _check_batch(config, processes)
    _check_model(config)
    _check_files(config)
    _check_deepspeed(config)
    _check_trackers(config)
    _check_text(config)
    _check_prompts(config)


def _check_run_dir(config: RunConfig) -> None:
    if is_url(config.run_dir):
        Store(str(config.run_dir))  # refuses credentials in the URL, an unknown scheme, a missing driver
    elif config.local_dir is not None:
        raise RequestError(
            f"local_dir {config.local_dir} is for a run_dir that is a URL (run_dir is {config.run_dir}): remove it"
        )
    if is_url(config.data.store_dir):
        Store(config.data.store_dir)
    path = os.path.abspath(local_run_dir(config.run_dir, config.local_dir))
    try:
        path.encode()
    except UnicodeEncodeError:  # the checkpoints would be written, and could not be read
        raise RequestError(
            f"run_dir {one_line(path)} is not UTF-8, and safetensors opens no file below such a path; choose another name"
        ) from None


def _check_batch(config: RunConfig, processes: int) -> None:
    if config.train.global_batch_tokens is not None and config.data.block_size is None:
        return  # the block size is known only when the model is
    micro, shared = config.train.micro_batch_blocks, config.train.context_parallel
    if processes % shared == 0:  # otherwise the engine refuses it
        processes //= shared
    unit = "" if shared == 1 else f"{processes} groups of {shared} processes"
    exact = micro if config.train.micro_batch_exact and isinstance(micro, int) else None
    for blocks in global_batches(config, config.data.block_size or 1):
        share_of(blocks, processes, micro=exact, whom=unit)


def _check_model(config: RunConfig) -> None:
    source, block_size = config.model.from_pretrained, config.data.block_size
    if source is None:
        return
    folder = Path(source)
    if not folder.exists():
        if _is_path(source):
            raise RequestError(f"model.from_pretrained {source!r}: no such folder{_near(source)}")
        return
    if not (folder / "config.json").is_file():
        export = folder / "export"
        hint = f"; did you mean {export}?" if (export / "config.json").is_file() else ""
        raise RequestError(f"model.from_pretrained {source!r}: no config.json in it{hint}")
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(
            f"model.from_pretrained {source!r}: config.json is not readable: {error}"
        ) from error
    fields = {**fields, **config.model.config} if isinstance(fields, dict) else {}
    context = context_in(fields)
    if context is not None and block_size is not None and block_size > context:
        raise RequestError(
            f"data.block_size {block_size} is larger than the context {context} of {source}: reduce it"
        )


def _check_files(config: RunConfig) -> None:
    path = config.tokenizer.path
    if (
        path is not None
        and not Path(path).exists()
        and (_is_path(path) or path.endswith((".model", ".json")))
    ):
        raise RequestError(f"tokenizer.path {path!r}: no such file or folder{_near(path)}")
    if config.engine.deepspeed is not None and not deepspeed_file(config.engine.deepspeed).is_file():
        known = [f"ds_configs/{file.name}" for file in DS_CONFIGS.glob("*.json")]
        raise RequestError(
            f"engine.deepspeed {config.engine.deepspeed!r}: no such file"
            f"{did_you_mean(config.engine.deepspeed, known)}"
        )
    # By its path, or by its name in this run (as in reader.find). A checkpoint that only a bucket has is looked up later.
    of_run = local_run_dir(config.run_dir or "", config.local_dir) / "checkpoints" / config.resume
    fetched = is_url(config.run_dir) and config.resume.startswith("step-")
    if (
        config.resume not in RESUME
        and not Path(config.resume).exists()
        and not of_run.exists()
        and not fetched
    ):
        raise RequestError(
            f"resume {config.resume!r}: no such checkpoint; give {', '.join(RESUME)}, the name of one of this run "
            "(lmcore checkpoints RUN lists them), or the path of a checkpoint"
            f"{did_you_mean(config.resume, RESUME)}"
        )


def _check_deepspeed(config: RunConfig) -> None:
    asked = config.engine.deepspeed is not None or flag(os.environ, "ACCELERATE_USE_DEEPSPEED")
    if asked and importlib.util.find_spec("deepspeed") is None:
        raise RequestError(
            "ZeRO needs deepspeed, which is not installed: pip install deepspeed ninja, or choose another strategy "
            "(accelerate_configs/fsdp2.yaml)"
        )


def _check_trackers(config: RunConfig) -> None:
    for name in config.report.trackers:
        if name not in TRACKERS:
            remedy = did_you_mean(name, TRACKERS)
            if "," in name:
                remedy = f"; several are given as separate words: --report.trackers {name.replace(',', ' ')}"
            elif name.lower() in ("none", "no", "off", "false"):
                remedy = "; for none give --report.trackers '[]'"
            raise RequestError(
                f"report.trackers: unknown tracker {name!r}; choose from {', '.join(TRACKERS)}{remedy}"
            )
        if importlib.util.find_spec(name) is None:
            raise RequestError(
                f"report.trackers: {name} is not installed: pip install {name.replace('_', '-')}, or choose others "
                "(--report.trackers '[]': none)"
            )


def _check_text(config: RunConfig) -> None:
    if config.data.factory is not None:
        return
    for entries in (config.data.train, config.data.valid, config.data.test):
        if entries:
            # Only look up the files: with a fixed unit, resolve_sources reads none of them.
            plain: list[Any] = [
                {**entry, "unit": "line"} if isinstance(entry, dict) else entry for entry in entries
            ]
            sources.resolve_sources(
                plain, text_field=config.data.text_field, unit="line", encoding=config.data.encoding
            )


def _check_prompts(config: RunConfig) -> None:
    for prompt in config.evaluate.prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are not UTF-8: no tokenizer reads them
            raise RequestError(
                f"evaluate.prompts: {prompt!a} is not valid UTF-8; write it in a UTF-8 terminal or in a YAML file"
            ) from None


def _is_path(text: str) -> bool:
    """Whether a name can only be a path, not a Hub id (``name`` or ``owner/name``)."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1


def _near(path: str) -> str:
    parent = Path(path).parent
    return did_you_mean(path, [str(parent / name) for name in os.listdir(parent)]) if parent.is_dir() else ""
