"""The cursor: where a run is in its data, and which positions it skips.

A checkpoint stores these few values and nothing else about the data. The next step is the next
``global_batch_blocks`` positions from ``position`` on, without the skipped ranges.

    >>> cursor = Cursor(fingerprint="...", seed=1, skips=((2, 4),))
    >>> next_positions(cursor.position, 4, cursor.skips)[0].tolist()
    [0, 1, 4, 5]
    >>> cursor.advance(4).position
    6
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lmcore.data.order import MAX_POSITION, ORDER_VERSION, ORDER_VERSIONS, Phase
from lmcore.errors import RequestError

Skips = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of positions that are never trained on."""


def merge_skips(*many: Iterable[Sequence[int]]) -> Skips:
    """The union of ranges [start, stop), sorted, with adjacent ranges joined.

    Raises:
        RequestError: a range is empty, negative, or beyond any corpus.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(a), int(b)) for ranges in many for a, b in ranges):
        if start < 0 or stop <= start or stop > MAX_POSITION:
            raise RequestError(
                f"data.skip_positions: [{start}, {stop}) is not a range of positions: give 0 <= start < stop, at most "
                f"{MAX_POSITION}"
            )
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def next_positions(position: int, count: int, skips: Skips = ()) -> tuple[np.ndarray, int]:
    """The next ``count`` positions from ``position`` on without the skipped ones, and the position after them."""
    runs, missing = [], count
    for start, stop in skips:
        if stop <= position:
            continue
        if position + missing <= start:
            break
        if position < start:
            runs.append(np.arange(position, start))
            missing -= start - position
        position = stop
    runs.append(np.arange(position, position + missing))
    return np.concatenate(runs), position + missing


def count_positions(start: int, stop: int, skips: Skips = ()) -> int:
    """The number of positions in [start, stop) that are not skipped."""
    return max(stop - start, 0) - sum(max(min(b, stop) - max(a, start), 0) for a, b in skips)


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run is in its data; the same for every rank.

    Attributes:
        fingerprint: fingerprint of the data (:attr:`lmcore.data.batches.Readable.fingerprint`).
        seed: seed of the order.
        position: the next position, from 0, continuing across epochs.
        phases: the past and future mixtures.
        skips: ranges of positions that are never trained on.
        stream: empty for token stores; for ``data.mode stream``, where the window of each lane began.
        version: the order version with which the run began, and which it keeps.
    """

    fingerprint: str
    seed: int
    position: int = 0
    phases: tuple[Phase, ...] = (Phase(),)
    skips: Skips = ()
    stream: Mapping[str, Any] = field(default_factory=dict)
    version: int = ORDER_VERSION

    def advance(self, count: int) -> Cursor:
        """The cursor after ``count`` more positions; skipped ones do not count."""
        return replace(self, position=next_positions(self.position, count, self.skips)[1])

    def with_skips(self, ranges: Iterable[Sequence[int]]) -> Cursor:
        """Also skip these ranges [start, stop) of positions.

        Raises:
            RequestError: see :func:`merge_skips`.
        """
        return replace(self, skips=merge_skips(self.skips, ranges))

    def with_weights(self, weights: Sequence[float] | None) -> Cursor:
        """Mix by ``weights`` from here on. A no-op for equal weights; earlier positions do not change."""
        new = None if weights is None else tuple(float(weight) for weight in weights)
        if new == self.phases[-1].weights:
            return self
        kept = tuple(phase for phase in self.phases if phase.position < self.position)
        return replace(self, phases=(*kept, Phase(position=self.position, weights=new)))

    def with_phases(self, phases: Sequence[Phase]) -> Cursor:
        """Keep the mixtures of the past positions, and follow the configured ``phases`` from here on."""
        behind = tuple(phase for phase in self.phases if phase.position < max(self.position, 1))
        now = [phase for phase in phases if phase.position <= self.position][-1]
        ahead = tuple(phase for phase in phases if phase.position > self.position)
        here = replace(self, phases=behind).with_weights(now.weights)
        return replace(here, phases=here.phases + ahead)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, well under a kilobyte for token stores."""
        phases = [[phase.position, phase.weights and list(phase.weights)] for phase in self.phases]
        return {
            "version": self.version,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "position": self.position,
            "phases": phases,
            "skips": [list(skip) for skip in self.skips],
            "stream": dict(self.stream),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Cursor:
        """The inverse of :meth:`to_json`. Cursors of unknown versions are accepted here; :meth:`check` refuses them."""
        phases = tuple(
            Phase(position=position, weights=None if weights is None else tuple(weights))
            for position, weights in data["phases"]
        )
        return Cursor(
            version=data["version"],
            # Older fingerprints repeated the order version, which the cursor also holds itself.
            fingerprint=re.sub(r"^(store|stream|own) order=1 ", r"\1 ", data["fingerprint"]),
            seed=data["seed"],
            position=data["position"],
            phases=phases,
            skips=tuple((start, stop) for start, stop in data["skips"]),
            stream=data["stream"],
        )

    def check(
        self,
        *,
        fingerprint: str,
        seed: int,
        former: Collection[str] = (),
        accept: bool = False,
        accept_seed: bool = False,
        override: str = "--allow_changes data.train",
    ) -> Cursor:
        """The cursor to continue with, over data with this fingerprint and seed.

        Args:
            fingerprint: fingerprint of the present dataset.
            seed: seed of the run as it is configured now.
            former: fingerprints of the same data in earlier versions.
            accept: continue even if something differs: the position stays, but refers to other blocks from here on.
            accept_seed: the same, but only if nothing except the seed differs.
            override: the option that sets ``accept``; shown in the message.

        Raises:
            RequestError: the data, the seed or the order version differs; the message shows both values.
        """
        begun = fingerprint if self.fingerprint in former else self.fingerprint
        pairs = {"data": (begun, fingerprint), "seed": (self.seed, seed)}
        changed = [f"{name} was {old}, is {new}" for name, (old, new) in pairs.items() if old != new]
        if self.version not in ORDER_VERSIONS:
            changed.insert(0, f"order version was {self.version}, known are {ORDER_VERSIONS}")
        accept = accept or (accept_seed and len(changed) == 1 and self.seed != seed)
        if changed and not accept:
            raise RequestError(
                f"the checkpoint was trained on other data up to position {self.position}: "
                f"{'; '.join(changed)}; some blocks would come twice and others never: "
                f"restore what changed, or insist with {override}"
            )
        version = self.version if self.version in ORDER_VERSIONS else ORDER_VERSION
        return replace(self, version=version, fingerprint=fingerprint, seed=seed)
