"""Blocks without a token store: text is tokenized while the model trains (``data.mode stream``).

A stream starts at once, needs no disk space, and can also read the Hub (``hf://``). :class:`StreamDataset` provides blocks
by position to :class:`lmcore.data.batches.Batches`, like :class:`lmcore.data.blocks.StoreBlocks`.

    dataset = StreamDataset(sources, tokenizer, block_size=1024, lanes=64, seed=1)
    batches = Batches(dataset, cursor=dataset.new_cursor(), global_batch_blocks=64, micro_batch_blocks=8)

The order does not depend on the number of ranks or workers, because there is a fixed number V of *lanes* (stored in the
cursor; default: the blocks of the global batch). Position p is block p // V of lane p % V. Lane l reads the parts l,
l + V, l + 2V, ... of the permuted list of parts, one epoch after another, as one sequence of tokens, cuts it into blocks,
and shuffles them within windows. Ranks own ranges of lanes, and workers own lanes of their rank. The state of a lane is
where its window began (part, document, token). It is returned with each batch, and a resume tokenizes at most one window
per lane again. In a pass of a lane no token of a good document is lost or repeated.

Guarantees are weaker than with a store (docs/guarantees.md): lanes read at different speeds, so that epochs overlap at
their boundaries; blocks are shuffled within windows only; the length of an epoch in positions is not known.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, final

import numpy as np

from lmcore.data.blocks import Blocks, position_ids_of
from lmcore.data.cursor import Cursor
from lmcore.data.order import ORDER_VERSION, Order, Phase, keys, permute
from lmcore.data.store.build import identity_of
from lmcore.data.store.workers import EncodesBatches
from lmcore.data.text import documents as text
from lmcore.data.text import hub
from lmcore.data.text.split import part_of
from lmcore.errors import FaultError, RequestError

PARTS_PER_LANE = 8
"""The corpus is cut into about this many parts per lane, so that lanes end their epochs at similar positions."""
_MIN_PART_BYTES, _MAX_PART_BYTES = 2**16, 2**23
_MAX_STRIDES = 64
_ENCODED_CHARACTERS = 2**15
"""Text that a lane encodes ahead in one call, in the long run; after a start it encodes only what it needs."""
_ENDLESS = 2**60
_LOCATED_AHEAD = 64
_BARREN_EPOCHS = 20
"""Epochs without a document after which a lane gives up."""


@final
class StreamDataset:
    """Blocks by position, tokenized on the fly; satisfies :class:`lmcore.data.batches.Readable`.

    Args:
        sources: files or ``hf://`` datasets.
        block_size: T.
        lanes: V; the global batch must be a multiple of V, and V a multiple of the world size. The V of a resumed cursor
            takes precedence.
        window_blocks: size of the shuffle window in blocks, over all lanes together.
        shuffle: ``none`` keeps the order of the files; any other value shuffles parts and windows.
        phases: mixtures; without weights all sources are one corpus.
        split: ``("train", f)`` or ``("valid", f)``: one side of a split by content.
        on_error, max_bad_fraction: as in :func:`lmcore.data.store.build.build_store`; the fraction is computed by each
            process over what it has read so far.

    Raises:
        RequestError: a source without text, or some phases with weights and some without.
    """

    can_pad = False

    def __init__(
        self,
        sources: Sequence[text.Source],
        tokenizer: EncodesBatches,
        *,
        block_size: int,
        lanes: int,
        seed: int,
        window_blocks: int = 1024,
        shuffle: str = "full",
        phases: tuple[Phase, ...] = (Phase(),),
        split: tuple[str, float] = ("all", 0.0),
        eos: bool = True,
        document_mask: bool = False,
        on_error: str = "raise",
        max_bad_fraction: float = 0.001,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.block_size = block_size
        self.lanes = lanes
        self.seed = seed
        self.shuffle = shuffle
        self.phases = phases
        self.version = ORDER_VERSION
        self.window_blocks = window_blocks
        self.document_mask = document_mask
        self._sources = tuple(sources)
        self._tokenizer = tokenizer
        self._split = split
        self._dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self._eos = np.array([tokenizer.eos_id] if eos else [], dtype=np.int32)
        self._on_error, self._max_bad_fraction = on_error, max_bad_fraction
        # (documents, size of text) that were read, and that were bad or lost; each bad one counts once.
        self._read_good, self._read_bad = [0, 0], [0, 0]
        self._first_bad: text.BadRecord | None = None
        self._said: set[tuple[str, str]] = set()  # reported already: later epochs and other lanes meet them
        self._identities = [identity_of(source, tokenizer, split, eos) for source in sources]
        self._cursor: Cursor | None = None
        self._lanes: dict[int, _Lane] = {}
        self._parts = [_cut(source, lanes) for source in sources]
        empty = [source.name for source, parts in zip(sources, self._parts) if not parts]
        if empty and (phases[0].weights is not None or len(empty) == len(sources)):
            raise RequestError(f"source {empty[0]!r} holds no text at all: its files are empty")
        few = min(len(parts) for parts in self._parts)
        if few < lanes and note is not None:
            note(
                f"the stream has only {few} parts for {lanes} lanes: its epochs overlap widely, and each "
                f"file is read several times; data.mode store has neither fault"
            )
        self._check_weights()

    @property
    def fingerprint(self) -> str:
        """A string of everything, except seed and lanes, that determines which block a position refers to."""
        return self._fingerprint(self._identities)

    @property
    def former_fingerprints(self) -> tuple[str, ...]:
        """Fingerprints of the same stream in versions that computed another fingerprint for its tokenizer."""
        return tuple(
            self._fingerprint([{**identity, "tokenizer": one} for identity in self._identities])
            for one in getattr(self._tokenizer, "former_fingerprints", ())
        )

    def _fingerprint(self, identities: list[dict[str, Any]]) -> str:
        digest = hashlib.sha256(json.dumps(identities, sort_keys=True).encode()).hexdigest()[:32]
        return (
            f"stream block_size={self.block_size} shuffle={self.shuffle} window={self.window_blocks} {digest}"
        )

    def new_cursor(self) -> Cursor:
        """The cursor at the beginning."""
        return Cursor(
            fingerprint=self.fingerprint,
            seed=self.seed,
            phases=self.phases,
            stream={"lanes": self.lanes},
            version=self.version,
        )

    def resumed(self, cursor: Cursor) -> StreamDataset:
        """This stream, ready to be read from a cursor on."""
        lanes = int(cursor.stream.get("lanes", self.lanes))
        if cursor.position % lanes:
            raise RequestError(
                f"position {cursor.position} of a stream is not a multiple of its {lanes} lanes"
            )
        for start, stop in cursor.skips:
            if start % lanes or stop % lanes:
                raise RequestError(
                    f"data.skip_positions [{start}, {stop}) must begin and end at multiples of the "
                    f"stream's {lanes} lanes: take [{start // lanes * lanes}, {-(-stop // lanes) * lanes})"
                )
        new = copy(self)
        new.lanes, new.phases, new.version = lanes, cursor.phases, cursor.version
        new._parts = self._parts if lanes == self.lanes else [_cut(source, lanes) for source in self._sources]
        new._cursor, new._lanes = cursor, {}
        new._check_weights()
        return new

    def _check_weights(self) -> None:
        weighted = [phase.weights is not None for phase in self.phases]
        if any(weighted) and not all(weighted):
            raise RequestError(
                "a stream cannot change between weighted sources and none: give weights throughout"
            )

    def _groups(self) -> list[list[tuple[int, int]]]:
        """The groups of parts that are drawn from separately, [(source, part), ...] each; one group without weights."""
        numbered = [[(s, p) for p in range(len(parts))] for s, parts in enumerate(self._parts)]
        if self.phases[0].weights is not None:
            return numbered
        return [[pair for group in numbered for pair in group]]

    # ---- slicing ----

    def rank_slice(self, positions: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """The positions of a rank's lanes."""
        if len(positions) % self.lanes or self.lanes % world_size:
            raise RequestError(
                f"a stream of {self.lanes} lanes (data.stream_lanes, fixed when the run began) needs a "
                f"train.global_batch_blocks that is a multiple of {self.lanes}, not {len(positions)}, and a "
                f"number of processes that divides {self.lanes}, not {world_size}"
            )
        share = self.lanes // world_size
        return positions[(positions % self.lanes) // share == rank]

    def rows_of_worker(self, positions: np.ndarray, worker: int, workers: int) -> np.ndarray:
        """The indices of a rank's rows that are in the lanes of one worker."""
        return np.flatnonzero(positions % self.lanes % workers == worker)

    def count_labels(self, positions: np.ndarray) -> int:
        return len(positions) * self.block_size

    def epoch_of(self, cursor: Cursor) -> float:
        """The epochs of lane 0, which always belongs to rank 0; on other ranks the average over the rank's lanes.

        A part counts as a whole when it begins. With weights a lane reads the parts of each source separately; as with a
        token store an epoch is then as much text as all sources have together."""
        total = sum(len(parts) for parts in self._parts)
        begun = {
            lane: sum(ordinal for ordinal, _, _ in feeds) * self.lanes
            for lane, feeds in cursor.stream.items()
            if lane != "lanes"
        }
        if "0" in begun:
            return begun["0"] / total
        return float(np.mean([int(lane) + parts for lane, parts in begun.items()])) / total if begun else 0.0

    # ---- reading ----

    def read(self, positions: np.ndarray) -> Blocks:
        """The blocks at these positions, which must ascend from call to call in each lane."""
        n, size = len(positions), self.block_size
        ids = np.empty((n, size + 1), dtype=self._dtype)
        position_ids = np.zeros((n, size), dtype=np.int32) if self.document_mask else None
        lanes = [self._lane(number) for number in (positions % self.lanes).tolist()]
        numbers = (positions // self.lanes).tolist()
        # One round per block of a lane: the text of all lanes that need some is encoded in one call.
        for rows in np.split(np.arange(n), np.flatnonzero(np.diff(positions // self.lanes)) + 1):
            feeds = [lanes[row].feed_for(numbers[row]) for row in rows.tolist()]
            self._fill(feeds)
            for row, (feed, block) in zip(rows.tolist(), feeds):
                start, ids[row] = feed.block(block)
                if position_ids is not None:
                    position_ids[row] = position_ids_of(feed.ends_after(start) - start, size)
                feed.close(block + 1)
        return Blocks(
            ids=ids,
            n_labels=np.full(n, size),
            position_ids=position_ids,
            state={"lanes": self.lanes} | {str(lane.number): lane.state() for lane in lanes[-self.lanes :]},
        )

    def _lane(self, number: int) -> _Lane:
        lane = self._lanes.get(number)
        if lane is None:
            cursor = self._cursor or self.new_cursor()
            state = cursor.stream.get(str(number))
            lane = self._lanes[number] = _Lane(
                self, number, self._groups(), state, cursor.position // self.lanes
            )
        return lane

    def _fill(self, feeds: list[tuple[_Feed, int]]) -> None:
        """Encode, for all feeds at once, the tokens that each needs for its requested block."""
        while True:
            hungry = [(feed, missing) for feed, block in feeds if (missing := feed.missing(block)) > 0]
            if not hungry:
                return
            texts = [feed.take(missing) for feed, missing in hungry]
            encoded = iter(self._tokenizer.encode_batch([one for some in texts for one in some]))
            for (feed, _), some in zip(hungry, texts):
                feed.accept([np.concatenate((next(encoded), self._eos)) for _ in some])

    def documents(self, source: int, part: tuple[text.Part, int, int]) -> Iterator[str | None]:
        """The texts of a part; ``None`` for a document on the other side of the split."""
        piece, stride, strides = part
        for number, document in enumerate(hub.documents_of(self._sources[source], piece, bad=self._on_bad)):
            self._read_good[0] += 1
            self._read_good[1] += len(document.text)
            if number % strides == stride:
                yield part_of(document.text, self._split)

    def _on_bad(self, record: text.BadRecord) -> None:
        if self._on_error == "raise":
            raise FaultError(f"{record}: fix the record, or skip bad records with --data.on_error skip")
        self._first_bad = self._first_bad or record
        if (record.path, record.where) in self._said:
            return
        self._said.add((record.path, record.where))
        logging.getLogger(__name__).warning("left out: %s", record)  # in a worker this goes to standard error
        self._read_bad[0] += record.documents
        self._read_bad[1] += record.n_bytes
        bad, bad_bytes = self._read_bad
        total, total_bytes = bad + self._read_good[0], bad_bytes + self._read_good[1]
        on_disk = sum(part.n_bytes for parts in self._parts for part, stride, _ in parts if stride == 0)
        total_bytes = max(total_bytes, on_disk)
        # A few bad records at the beginning do not tell anything about the whole text.
        limit = self._max_bad_fraction
        if bad > max(10, limit * total) or bad_bytes > max(2**20, limit * total_bytes):
            share = bad_bytes / max(total_bytes, 1)
            raise FaultError(
                f"{bad:,} of {total:,} documents so far are bad or lost, {share:.2%} of the text, more than "
                f"data.max_bad_fraction {limit:g}; the last: {record}"
            )

    @property
    def has_text(self) -> bool:
        """Whether this process has read a good document."""
        return self._read_good[0] > 0

    def no_text(self, lane: int) -> RequestError:
        """The error for a lane whose share of the corpus has no document."""
        if self.has_text:
            return RequestError(
                f"a stream of {self.lanes} lanes needs at least as many documents, and lane {lane} has none: give more "
                f"text, fewer lanes (data.stream_lanes), or train with --data.mode store"
            )
        first = f"; the first bad record: {self._first_bad}" if self._first_bad else ""
        return RequestError(f"the sources hold no text at all{first}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lanes": {}}  # readers are opened where they are used


def _cut(source: text.Source, lanes: int) -> list[tuple[text.Part, int, int]]:
    """The parts of a source as [(part, stride, strides)].

    What cannot be cut (compressed files, few shards of the Hub) is read by several lanes, each of which takes every
    ``strides``-th document."""
    total = sum(part.n_bytes for part in hub.parts_of(source, part_bytes=2**40))
    part_bytes = min(max(total // (PARTS_PER_LANE * lanes), _MIN_PART_BYTES), _MAX_PART_BYTES)
    pieces = hub.parts_of(source, part_bytes=part_bytes)
    strides = min(max(-(-lanes // max(len(pieces), 1)), 1), _MAX_STRIDES)
    return [(piece, stride, strides) for stride in range(strides) for piece in pieces]


@final
class _Lane:
    """One of V independent readers. Its block k comes from the only feed, or from the feed of the source that the mixture
    draws."""

    def __init__(
        self,
        stream: StreamDataset,
        number: int,
        groups: list[list[tuple[int, int]]],
        state: list[list[int]] | None,
        first: int,
    ) -> None:
        self.number = number
        seed = int.from_bytes(
            hashlib.blake2b(f"{stream.seed} {number}".encode(), digest_size=8).digest(), "little"
        )
        phases = tuple(
            Phase(position=phase.position // stream.lanes, weights=phase.weights) for phase in stream.phases
        )
        # The order of an endless, unshuffled corpus, whose block number is the number of the draw from a source.
        self._order = (
            Order(
                lengths=(_ENDLESS,) * len(groups),
                seed=seed,
                shuffle="none",
                phases=phases,
                version=stream.version,
                lane=number,
                lanes=stream.lanes,
            )
            if len(groups) > 1
            else None
        )
        # The number of a block, and (source, draw) of that block and the following ones
        self._located = (0, np.zeros((2, 0), dtype=np.int64))
        drawn = self._order.drawn_before(first) if self._order else (first,)
        self._feeds = [
            _Feed(stream, number, group, which, state[which] if state else None, drawn[which])
            for which, group in enumerate(groups)
        ]

    def feed_for(self, number: int) -> tuple[_Feed, int]:
        """The feed that provides block ``number`` of this lane, and the number of the block in that feed."""
        if self._order is None:
            return self._feeds[0], number
        first, known = self._located
        if not first <= number < first + known.shape[1]:
            source, _, draw = self._order.locate(np.arange(number, number + _LOCATED_AHEAD))
            first, known = self._located = (number, np.stack([source, draw]))
        source, draw = known[:, number - first].tolist()
        return self._feeds[source], draw

    def state(self) -> list[list[int]]:
        return [feed.state for feed in self._feeds]


@final
class _Feed:
    """The sequence of tokens that a lane reads from one group of parts, and its current shuffle window.

    Tokens are numbered from where this reader began. ``state`` is [part ordinal, document, token] at the start of the window
    of the next block, from which a resume continues.
    """

    def __init__(
        self,
        stream: StreamDataset,
        lane: int,
        group: list[tuple[int, int]],
        which: int,
        state: list[int] | None,
        first: int,
    ) -> None:
        self._stream, self._lane, self._group, self._which = stream, lane, group, which
        self.state = list(state) if state else [0, 0, 0]
        self._size = stream.block_size
        self._window = max(stream.window_blocks // stream.lanes, 1)
        # The first windows of the lanes have different lengths, so that lanes do not all refill in the same step.
        self._first_window = 1 + lane * self._window // stream.lanes
        self._origin = self._window_of(first)[0]
        self._tokens = np.zeros(0, dtype=stream._dtype)
        self._base = 0  # the number of the first token in self._tokens
        self._marks: deque[tuple[int, int, int]] = deque()  # (first token, part ordinal, document)
        self._drop = self.state[2]
        self._texts = self._read(self.state[0], self.state[1])
        self._taken: list[tuple[int, int]] = []
        self._ahead = 0
        self._places_of, self._places = -1, np.zeros(0, dtype=np.int64)

    def _window_of(self, block: int) -> tuple[int, int]:
        """[first, stop) of the window that contains a block."""
        if block < self._first_window:
            return 0, self._first_window
        number = (block - self._first_window) // self._window
        first = self._first_window + number * self._window
        return first, first + self._window

    def missing(self, block: int) -> int:
        """The number of tokens that must still be encoded before ``block`` is available."""
        stop = self._window_of(block)[1]
        return (stop - self._origin) * self._size + 1 - (self._base + len(self._tokens))

    def take(self, missing: int) -> list[str]:
        """The next texts, about enough for ``missing`` tokens."""
        texts: list[str] = []
        characters = 0
        wanted = max(2 * missing, self._ahead)
        self._ahead = min(2 * wanted, _ENCODED_CHARACTERS + 97 * self._lane % _ENCODED_CHARACTERS)
        while characters < wanted:
            ordinal, document, one = next(self._texts)
            self._taken.append((ordinal, document))
            texts.append(one)
            characters += len(one) + 1
        return texts

    def accept(self, runs: list[np.ndarray]) -> None:
        """Append the ids of the texts that :meth:`take` returned."""
        end = self._base + len(self._tokens)
        for (ordinal, document), run in zip(self._taken, runs):
            # If this reader began inside a document, the first tokens of the document were used before.
            self._marks.append((end - self._drop, ordinal, document))
            end += len(run) - self._drop
            if self._drop:
                runs[0], self._drop = run[self._drop :], 0
        self._taken = []
        self._tokens = np.concatenate((self._tokens, *(run.astype(self._tokens.dtype) for run in runs)))

    def block(self, block: int) -> tuple[int, np.ndarray]:
        """(number of its first token, its T + 1 tokens) of a block, taken from its shuffled place in the window."""
        first, stop = self._window_of(block)
        if self._places_of != first:
            self._places_of, self._places = first, np.arange(stop - first)
            if self._stream.shuffle != "none":
                key = keys(self._stream.seed, "stream window", self._lane, self._which, first)
                self._places = permute(self._places, stop - first, key)
        start = (first - self._origin + int(self._places[block - first])) * self._size
        return start, self._tokens[start - self._base : start - self._base + self._size + 1]

    def ends_after(self, start: int) -> np.ndarray:
        """(E,) int64: the ends of documents inside the block that begins at ``start``."""
        return np.array(
            [mark[0] for mark in self._marks if start < mark[0] < start + self._size], dtype=np.int64
        )

    def close(self, following: int) -> None:
        """Drop the tokens before the window of ``following``, the next block that will be requested."""
        first = (self._window_of(following)[0] - self._origin) * self._size
        if first == self._base:
            return
        self._tokens = self._tokens[first - self._base :].copy()
        self._base = first
        while len(self._marks) > 1 and self._marks[1][0] <= first:
            self._marks.popleft()
        start, ordinal, document = self._marks[0]
        self.state = [ordinal, document, first - start]

    def _read(self, ordinal: int, skip: int) -> Iterator[tuple[int, int, str]]:
        """An endless iterator of (part ordinal, document, text), from document ``skip`` of part ``ordinal`` on."""
        lanes, total = self._stream.lanes, len(self._group)
        cycle = total // math.gcd(lanes, total)
        barren = 0
        while True:
            number = self._lane + ordinal * lanes
            if self._stream.shuffle == "none" and self._stream.version > 1:
                number += ordinal // cycle  # so that a lane visits all parts, even if lanes and parts divide
            place = number % total
            if self._stream.shuffle != "none":
                key = keys(self._stream.seed, "stream parts", self._which, number // total)
                place = int(permute(np.array([place]), total, key)[0])
            source, part = self._group[place]
            barren += 1
            documents = self._stream.documents(source, self._stream._parts[source][part])
            for document, one in enumerate(documents):
                if document >= skip and one is not None:
                    barren = 0
                    yield ordinal, document, one
            # The parts of a lane differ from epoch to epoch, so that it reaches a part with text in some epoch.
            if barren > (_BARREN_EPOCHS if self._stream.has_text else 2) * total:
                raise self._stream.no_text(self._lane)
            ordinal, skip = ordinal + 1, 0
