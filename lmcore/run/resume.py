"""Which checkpoint a run resumes from, and whether its data, tokenizer and seed are still the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lmcore.checkpoint import reader
from lmcore.checkpoint.manifest import STATE, Damaged, Hashes, committed, hashes_here, read_json
from lmcore.config.durations import Durations
from lmcore.config.schema import Resume, RunConfig, flatten, keys, ranges
from lmcore.data.cursor import Skips, count_positions
from lmcore.errors import RequestError
from lmcore.humanize import message_of
from lmcore.report.metrics import iterate_metrics
from lmcore.report.redact import redact
from lmcore.report.report import Report
from lmcore.run.folder import RunFolder, local_run_dir


class Change(NamedTuple):
    """An option whose value differs between a checkpoint and the current configuration."""

    key: str
    old: Any
    new: Any
    resume: Resume


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The differences between two results of :func:`~lmcore.config.schema.flatten`, those to be refused first.

    Options that this version does not have are ``free``. An option that the checkpoint does not have counts as having had
    its default.
    """
    found, defaults = [], flatten(RunConfig())
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name, defaults.get(name)), new.get(name)
        if before != after:
            known = keys().get(name) or keys().get(name.split(".config.")[0] + ".config")
            found.append(Change(name, before, after, known.resume if known else "free"))
    return sorted(found, key=lambda change: ["refuse", "warn", "free"].index(change.resume))


SHAPING = frozenset({
    "model.size", "model.config.n_embd", "model.config.hidden_size", "model.config.n_layer", "model.config.num_hidden_layers",
    "model.config.n_inner", "model.config.intermediate_size", "model.config.head_dim",
})  # fmt: skip
"""Options that change the number or the shapes of the weights, so that no checkpoint fits two of their values."""


def refuse_changes(found: list[Change], allowed: list[str]) -> list[Change]:
    """The changes that are worth a warning.

    Raises:
        RequestError: an option of class ``refuse`` differs and is not ``allowed``.
    """
    refused = [change for change in found if change.resume == "refuse" and change.key not in allowed]
    if refused:
        listed = "; ".join(f"{change.key} was {change.old!r}, is {change.new!r}" for change in refused)
        names = " ".join(change.key for change in refused)
        shaping = ", ".join(
            change.key for change in refused if change.key in SHAPING and None not in (change.old, change.new)
        )
        remedy = (
            f"restore them, or choose another --run_dir (the weights of the checkpoint do not fit another {shaping})"
            if shaping
            else f"restore them, choose another --run_dir, or allow the change with --allow_changes {names}"
        )
        raise RequestError(f"the checkpoint was made with other options ({listed}): {remedy}")
    return [change for change in found if change.resume != "free"]


def other_data_is_allowed(before: dict[str, Any], config: RunConfig) -> bool:
    """Whether the blocks may differ from those of the checkpoint: ``allow_changes`` names ``data.train``, or an option of
    data or tokenizer that differs from ``before``, the options of the checkpoint."""
    allowed = set(config.allow_changes)
    # Options of class refuse determine which block a position means.
    found = changes(before, redact(flatten(config)))
    different = {change.key for change in found if change.resume == "refuse"}
    return "data.train" in allowed or any(
        name.startswith(("data.", "tokenizer.")) for name in allowed & different
    )


def kept_before(past: Mapping[str, Any], config: RunConfig) -> int:
    """The step up to which all existing checkpoints are kept, because ``checkpoint.keep_every`` meant other steps until then.

    Args:
        past: the state of the checkpoint that is resumed; empty for a new run.
    """
    before, now = past.get("config", {}), redact(flatten(config))
    every = Durations.parse(before.get("checkpoint.keep_every"))
    names = ["checkpoint.keep_every"] if every else []
    if any(one.unit in ("percent", "epochs") for one in every):
        names += ["train.duration", "data.train"]
    changed = any(before.get(name) != now[name] for name in names)
    return int(past["step"] if changed else past.get("kept_before", 0))


MEASURED_ON = (
    "evaluate.blocks", "data.train", "data.valid", "data.valid_fraction", "data.block_size", "data.document_mask",
)  # fmt: skip
"""Options that determine the text of evaluations, in addition to those that change only with ``allow_changes``."""


def measured_otherwise(
    past: Mapping[str, Any], config: RunConfig, valid: Mapping[str, str] | None = None
) -> bool:
    """Whether evaluations up to a checkpoint used other data, or another loss, than those from now on.

    Args:
        past: the state of the checkpoint.
        valid: fingerprints of the validation sets by name, because a file may have changed.
    """
    found = changes(redact(past["config"]), redact(flatten(config)))
    of_data = ("data.", "tokenizer.", "loss.")
    other = any(
        change.key in MEASURED_ON or (change.key in config.allow_changes and change.key.startswith(of_data))
        for change in found
    )
    return other or (valid is not None and past.get("valid", valid) != valid)


def stop_values_of(
    past: Mapping[str, Any], config: RunConfig, valid: Mapping[str, str] | None = None
) -> list[float]:
    """The values that early stopping has seen, from the state of a checkpoint; none if the metric or the data has changed since
    (see :func:`measured_otherwise`)."""
    metric = "evaluate.early_stopping.metric"
    found = changes(redact(past["config"]), redact(flatten(config)))
    watched_other = any(change.key == metric for change in found)
    return [] if watched_other or measured_otherwise(past, config, valid) else list(past["stop_values"])


def skips_left_out(before: Any, now: Skips) -> list[str]:
    """The ranges of the checkpoint's ``data.skip_positions``, as they were written (``FIRST-LAST``), that ``now`` does not
    skip."""
    found = []
    for word in before or []:
        ((start, stop),) = ranges([word], "data.skip_positions")
        if count_positions(start, stop, now):
            found.append(str(word))
    return found


@contextlib.contextmanager
def state_of(path: Any) -> Iterator[None]:
    """Context for reading the state of a checkpoint, which may be malformed: anybody can compute the hashes of a changed one.

    Raises:
        RequestError: something in the state is missing or has another type.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = f"{type(error).__name__}: {message_of(error)}"
        raise RequestError(
            f"{path}: its state.json is not one that this lmcore writes ({what}); resume from another checkpoint"
        ) from error


def precision_so_far(config: RunConfig) -> str | None:
    """The precision of the checkpoint to resume from (for ``auto`` and ``best``, the newest in the run folder); ``None`` if
    there is none. The checkpoint is verified later.
    """
    if config.resume == "never" or config.fast_dev_run:
        return None
    here = local_run_dir(config.run_dir or "", config.local_dir) / "checkpoints"
    named = config.resume not in ("auto", "best")
    found = [here / config.resume, Path(config.resume)] if named else committed(here)
    for path in reversed(found):
        try:
            return str(read_json(path / STATE)["topology"]["precision"])
        except (Damaged, KeyError, TypeError):
            continue
    return None


def with_sources_of(config: RunConfig, state: Mapping[str, Any]) -> RunConfig:
    """The configuration with the same sources as when the run of a checkpoint began.

    Since order version 2, files that ``data.train`` names one by one are one source; before, each was a source of its own.

    Args:
        state: the state of the checkpoint; empty for a new run.
    """
    cursor = state.get("cursor")
    if not isinstance(cursor, Mapping) or cursor.get("version") != 1:
        return config
    entries: list[str | dict[str, Any]] = [
        {"path": entry} if isinstance(entry, str) else entry for entry in config.data.train
    ]
    return replace(config, data=replace(config.data, train=entries))


def find_checkpoint(
    config: RunConfig,
    folder: RunFolder,
    report: Report,
    hashes: Hashes = hashes_here,
    *,
    fetch: Callable[[str], object] = lambda asked: None,
) -> tuple[str, dict[str, Any]] | None:
    """On rank 0: the checkpoint to resume from and its state, with every byte verified; ``None`` starts at step 0.

    Args:
        fetch: called first with the value of ``--resume`` that applies; downloads a checkpoint that may be in a bucket.

    Raises:
        RequestError: there is no usable checkpoint although there should be one, or an option of class ``refuse`` changed.
    """
    status = folder.read_status()
    before = status or {}
    saved_step = before.get("checkpoint_step") if status is not None else _saved_step_in_metrics(folder.path)
    folder.remember(checkpoint_step=saved_step)  # also in the status of a start that fails
    asked, command = _asked_once(config, folder, report, before)
    if asked != config.resume:
        folder.remember(resume_command=command)  # also in the status of a start that fails now
    fetch(asked)
    if asked == "never":
        folder.remember(checkpoint_step=None, resume_command=command)
        reader.abandon_after(folder.checkpoints, -1, note=report.note)
        return None
    best = config.checkpoint.keep_best if asked == "best" else None
    found = reader.find(
        folder.checkpoints,
        asked,
        metric=best.metric if best else None,
        mode=best.mode if best else None,
        note=report.note,
        hashes=hashes,
    )
    if found is None:
        if isinstance(saved_step, int) and saved_step > 0:
            # Never start at step 0 over a run that had a checkpoint: somebody moved or removed its checkpoints.
            raise RequestError(
                f"{folder.checkpoints} has no checkpoint, but {'status.json' if status else 'metrics.jsonl'} says that this "
                f"run saved step {saved_step}: "
                f"move its checkpoints back, give one with --resume PATH, or start over with --resume never"
            )
        if command is not None:
            folder.remember(resume_command=command)
        return None
    with found:
        now = redact(flatten(config))  # as it was saved
        with state_of(found.path):
            before = redact(found.state["config"])  # an older version redacted less
            changed = refuse_changes(changes(before, now), config.allow_changes)
        for change in changed:
            report.warn_once(f"{change.key} was {change.old} up to step {found.step}, is {change.new} now")
        if asked == "auto" and isinstance(saved_step, int) and saved_step > found.step:
            report.note(
                f"this run saved step {saved_step}, but {folder.checkpoints} has nothing newer than step {found.step} that can "
                f"be used: resuming from there"
            )
        folder.remember(checkpoint_step=found.step)
        if command is not None:  # only now, because a refused command has not been carried out
            folder.remember(resume_command=command)
        reader.abandon_after(folder.checkpoints, found.step, note=report.note)
        return str(found.path), found.state


def _saved_step_in_metrics(run_dir: Path) -> int | None:
    """The step of the last save according to ``metrics.jsonl``, for a folder whose ``status.json`` was lost."""
    step: int | None = None
    with contextlib.suppress(OSError):
        for record in iterate_metrics(run_dir):
            if record["kind"] == "event" and record.get("event") in ("start", "checkpoint"):
                saved = record.get("step")
                step = saved if record["event"] == "checkpoint" and isinstance(saved, int) else None
    return step


def _asked_once(
    config: RunConfig, folder: RunFolder, report: Report, before: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The value of ``--resume`` that applies, and the hash of the command. All values but ``auto`` apply once per command.

    A command that is started again after an interruption (a requeued job, a loop around exit code 75) must not start over, or
    go back, each time. ``status.json`` records which command has been carried out; once that run is finished, the same options
    apply again.
    """
    if config.resume == "auto" or config.fast_dev_run:
        return config.resume, None
    options = json.dumps(redact(flatten(config)), sort_keys=True, default=str)
    command = hashlib.sha256(options.encode()).hexdigest()
    if before.get("resume_command") == command and before.get("state") != "finished":
        report.note(
            f"--resume {config.resume} was carried out when this command was first started; resuming that run from its "
            f"newest checkpoint (for a fresh start, remove {folder.path} or choose another --run_dir)"
        )
        return "auto", command
    return config.resume, command
