"""Going on: which checkpoint, whether the past it holds is still the same, and where its cursor stands now.

Comes in: the configuration as it is now and the checkpoints of a run folder. Goes out: the checkpoint's path and state,
and the cursor to read on from. What always holds: a changed corpus, tokenizer or seed is refused with both values;
what may change is said; the mixtures of the past never move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lmcore.checkpoint import writer
from lmcore.config.schema import RunConfig, changes, flatten, refuse_changes
from lmcore.data.order import Cursor, Phase
from lmcore.report.redact import redact
from lmcore.report.report import Report
from lmcore.run.folder import RunFolder


def find_checkpoint(
    config: RunConfig, folder: RunFolder, report: Report
) -> tuple[str, dict[str, Any]] | None:
    """Rank 0: the checkpoint to go on from and its state, verified to the last byte.

    Raises:
        RequestError: no good checkpoint although there should be one, or a changed past.
    """
    if config.resume == "never":
        writer.abandon_after(folder.checkpoints, -1, note=report.note)
        return None
    best = config.checkpoint.keep_best if config.resume == "best" else None
    found = writer.find(
        folder.checkpoints,
        config.resume,
        metric=best.metric if best else None,
        mode=best.mode if best else None,
        note=report.note,
    )
    if found is None:
        return None
    with found:
        now = redact(flatten(config))  # as it was saved
        changed = refuse_changes(changes(found.state["config"], now), config.allow_changes)
        for change in changed:
            report.warn_once(f"{change.key} was {change.old} up to step {found.step}, is {change.new} now")
        writer.abandon_after(folder.checkpoints, found.step, note=report.note)
        return str(found.path), found.state


def cursor_of(
    state: Mapping[str, Any],
    *,
    fingerprint: str,
    seed: int,
    phases: Sequence[Phase],
    skips: Sequence[tuple[int, int]],
    accept_other_data: bool,
) -> Cursor:
    """The cursor of a checkpoint over the data that is there now: what lies behind it never moves, and from here on
    the mixtures and skips of the configuration hold.

    Raises:
        RequestError: the data, the seed or the order is another one, and that was not accepted.
    """
    cursor = Cursor.from_json(state["cursor"]).check(
        fingerprint=fingerprint, seed=seed, accept=accept_other_data
    )
    behind = tuple(phase for phase in cursor.phases if phase.position < max(cursor.position, 1))
    now = [phase for phase in phases if phase.position <= cursor.position][-1]
    ahead = tuple(phase for phase in phases if phase.position > cursor.position)
    cursor = replace(cursor, phases=behind).with_weights(now.weights)
    return replace(cursor, phases=cursor.phases + ahead).with_skips(skips)


def topology(
    *,
    world_size: int,
    strategy: str,
    precision: str,
    device: str,
    compiled: bool,
    micro_batch_blocks: int,
) -> dict[str, Any]:
    """What has to be the same for a bit-exact continuation (law 13)."""
    return {
        "world size": world_size,
        "strategy": strategy,
        "precision": precision,
        "device": device,
        "compiled": compiled,
        "micro_batch_blocks": micro_batch_blocks,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words, what of the topology is another one than that of the checkpoint."""
    return [
        f"{name} was {old[name]}, is {new[name]}" for name in new if name in old and old[name] != new[name]
    ]
