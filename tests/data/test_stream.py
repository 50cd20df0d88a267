"""Law 4: without a token store the order is still independent of the topology, and a resume costs one window."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest

from lmcore.data.batches import Batches, StepBatch, merge_cursors
from lmcore.data.cursor import Cursor
from lmcore.data.locate import locate
from lmcore.data.order import Phase
from lmcore.data.stream import StreamDataset
from lmcore.data.text import documents, hub
from lmcore.errors import FaultError, RequestError
from tests.support.data import Bytes, Tagged, tagged_text

SIZE = 16
STEPS = 12


def stream(*folders: Path, tokenizer: Any = None, lanes: int = 8, **options: Any) -> StreamDataset:
    sources = documents.resolve_sources([{"path": str(folder), "unit": "line"} for folder in folders])
    defaults = {"block_size": SIZE, "lanes": lanes, "seed": 5, "window_blocks": 4 * lanes}
    return StreamDataset(sources, tokenizer or Tagged(), **{**defaults, **options})


def run(
    dataset: StreamDataset,
    cursor: Cursor | None = None,
    *,
    count: int = STEPS,
    size: int = 16,
    world_size: int = 1,
    micro: int = 1,
    **options: Any,
) -> tuple[np.ndarray, list[Cursor], list[list[StepBatch]]]:
    """(steps, blocks in the order of the positions, 3, T) inputs, labels, position ids; the cursor after each step."""
    cursor = cursor or dataset.new_cursor()
    ranks = []
    for rank in range(world_size):
        batches = Batches(
            dataset,
            cursor=cursor,
            global_batch_blocks=size,
            micro_batch_blocks=micro,
            rank=rank,
            world_size=world_size,
            **options,
        )
        iterator = iter(batches)
        ranks.append([next(iterator) for _ in range(count)])
        iterator.close()
    steps, cursors = [], []
    for number in range(count):
        rows: dict[int, list[Any]] = {}
        for rank, taken in enumerate(ranks):
            first, last = taken[number].positions
            mine = dataset.resumed(cursor).rank_slice(np.arange(first, last + 1), rank, world_size)
            blocks = [
                [batch[key][row].tolist() for key in ("input_ids", "labels", "position_ids") if key in batch]
                for batch in taken[number].micro_batches
                for row in range(len(batch["input_ids"]))
            ]
            rows |= dict(zip(mine.tolist(), blocks))
        steps.append([rows[position] for position in sorted(rows)])
        cursors.append(merge_cursors([taken[number].cursor for taken in ranks]))
    return np.array(steps), cursors, ranks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagged_text(tmp_path_factory.mktemp("corpus"), files=3)


# ---- topology and resume ----


def test_resume_in_later_epochs(tmp_path: Path) -> None:
    """A small corpus, read several times over."""
    folder = tagged_text(tmp_path, n=40)
    expected, cursors, ranks = run(stream(folder), count=60)
    assert ranks[0][-1].epoch > 4
    for first in (17, 38, 58):
        found, _, _ = run(stream(folder), cursors[first], count=59 - first, world_size=2)
        assert np.array_equal(found, expected[first + 1 :])


@pytest.mark.parametrize("weights", [None, (1.0, 1.0), (1.0, 3.0), (3.0, 1.0)])
def test_epoch_of_a_mixture_counts_the_text_of_all_sources(
    tmp_path: Path, weights: tuple[float, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a token store: an epoch is as many blocks as all sources have together, whatever is drawn from each."""
    monkeypatch.setattr("lmcore.data.stream._MIN_PART_BYTES", 256)
    line = "a line of text\n"
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "text.txt").write_text(line * 1000)
    dataset = stream(*folders, tokenizer=Bytes(), phases=(Phase(weights=weights),))
    blocks = 2 * 1000 * len(line) // SIZE  # a byte is a token, and EOS takes the place of the line end
    _, _, ranks = run(dataset, count=blocks // 16)
    # A part counts when it begins: with 8 lanes and about 118 parts that is up to 0.07 for each source.
    assert ranks[0][-1].epoch == pytest.approx(1, abs=0.15)


def test_positions_are_those_of_the_run_though_its_batch_was_changed_later(corpus: Path) -> None:
    """The lanes stay those with which the run began; by default they would follow train.global_batch_blocks."""
    steps, cursors, _ = run(stream(corpus), count=6, size=16)
    blocks = steps[:, :, 0].reshape(-1, SIZE).tolist()
    later = stream(corpus, lanes=16, window_blocks=4 * 8)
    positions = [5, 20, 70]
    for kept in (cursors[3:], cursors[:1] + cursors[3:]):
        found = list(locate(later, positions, kept))
        assert [list(ids or []) for _, ids in found] == [blocks[position] for position in positions]
        assert [place for place, _ in found] == [
            f"position {position}: block {position // 8} of lane {position % 8}" for position in positions
        ]


def test_positions_follow_a_phase_that_was_added_after_a_checkpoint(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        tagged_text(folder, n=40)
    dataset = stream(*folders, phases=(Phase(weights=(1.0, 3.0)),))
    _, before, _ = run(dataset, count=3)
    changed = replace(before[-1], phases=(*dataset.phases, Phase(position=64, weights=(1.0, 0.0))))
    steps, after, _ = run(dataset, changed, count=4)
    blocks = steps[:, :, 0].reshape(-1, SIZE).tolist()
    found = list(locate(dataset, [90, 95], [before[-1], after[-1]]))
    assert [list(ids or []) for _, ids in found] == [blocks[90 - 48], blocks[95 - 48]]


def test_resume_tokenizes_at_most_one_window_per_lane(corpus: Path) -> None:
    _, cursors, _ = run(stream(corpus), count=40)
    for step in (9, 22, 39):
        tokenizer = Tagged()
        dataset = stream(corpus, tokenizer=tokenizer).resumed(cursors[step])
        position = cursors[step].position
        dataset.read(np.arange(position, position + 8))
        window = 4 * SIZE + 1
        # Besides the window: the rest of a document (40 tokens) and twice what was missing, taken ahead.
        assert tokenizer.tokens <= 8 * (2 * window + 80)
        assert len(json.dumps(cursors[step].to_json())) < 1024


def test_global_batch_may_change_by_multiples_of_the_lanes(corpus: Path) -> None:
    dataset = stream(corpus)
    expected, cursors, _ = run(dataset, count=12, size=16)
    found, _, _ = run(dataset, cursors[3], count=16, size=8, world_size=2)
    assert np.array_equal(found.reshape(8, 16, 2, SIZE), expected[4:])


def test_resume_keeps_the_lanes_of_the_checkpoint(corpus: Path) -> None:
    expected, cursors, _ = run(stream(corpus, lanes=8, window_blocks=32))
    found, _, _ = run(stream(corpus, lanes=16, window_blocks=32), cursors[3], count=STEPS - 4)
    assert np.array_equal(found, expected[4:])


# ---- what a lane holds ----


def lane_tokens(batches: np.ndarray, lane: int, lanes: int) -> np.ndarray:
    """The blocks of one lane in order: (k, T + 1)."""
    blocks = batches.reshape(-1, *batches.shape[2:])[lane::lanes]
    return np.concatenate([blocks[:, 0], blocks[:, 1, -1:]], axis=1)


def test_lane_loses_no_token_and_repeats_none(tmp_path: Path) -> None:
    """Unshuffled, a lane is the documents of its parts, one after another, epoch by epoch."""
    folder = tagged_text(tmp_path, n=120, files=5)
    dataset = stream(folder, lanes=4, shuffle="none")
    batches, _, _ = run(dataset, size=8, count=60)
    parts = [
        [list(map(int, one.split())) for one in dataset.documents(0, part) if one]
        for part in dataset._parts[0]
    ]
    for lane in range(4):
        found = lane_tokens(batches, lane, 4)
        assert np.array_equal(found[:-1, -1], found[1:, 0])  # blocks share one token, nothing lies between
        run_of = np.concatenate([found[:, :-1].ravel(), found[-1, -1:]])
        expected: list[int] = []
        cycle = len(parts) // math.gcd(4, len(parts))
        ordinal = 0
        while len(expected) < len(run_of):
            for number, length in parts[(lane + 4 * ordinal + ordinal // cycle) % len(parts)]:
                expected += [*range(1000 * number, 1000 * number + length), Tagged.eos_id]
            ordinal += 1
        assert run_of.tolist() == expected[: len(run_of)]
    everything = sorted(number for part in parts for number, _ in part)
    assert everything == list(range(120))  # each document is in one part


def test_shuffle_window_is_a_permutation(corpus: Path) -> None:
    """The shuffle moves blocks inside windows only; the first window of each lane is shorter, by another share."""
    plain, _, _ = run(stream(corpus, window_blocks=8), count=20, size=8)  # one block a window: nothing moves
    shuffled, _, _ = run(stream(corpus), count=20, size=8)
    moved = 0
    for lane in range(8):
        before, after = lane_tokens(plain, lane, 8).tolist(), lane_tokens(shuffled, lane, 8).tolist()
        start, stop = 0, 1 + lane * 4 // 8
        while stop <= 20:
            assert sorted(before[start:stop]) == sorted(after[start:stop])
            moved += before[start:stop] != after[start:stop]
            start, stop = stop, stop + 4
    assert moved > 20


def test_document_mask_follows_the_documents(corpus: Path) -> None:
    batches, _, _ = run(stream(corpus, document_mask=True), count=6)
    for inputs, _, position_ids in batches.reshape(-1, 3, SIZE):
        expected, count = [], 0
        for token in inputs.tolist():
            expected.append(count)
            count = 0 if token == Tagged.eos_id else count + 1
        assert position_ids.tolist() == expected


def test_compressed_files_are_sharded_by_document(tmp_path: Path) -> None:
    """A file that cannot be cut is read by several lanes; each document still comes once in a pass."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        for number in range(90):
            file.write(json.dumps({"text": f"{number} {number % 30 + 1}"}) + "\n")
    notes: list[str] = []
    sources = documents.resolve_sources([str(tmp_path / "a.jsonl.gz")])
    dataset = StreamDataset(sources, Tagged(), block_size=SIZE, lanes=8, seed=1, note=notes.append)
    numbers = [int(one.split()[0]) for part in dataset._parts[0] for one in dataset.documents(0, part) if one]
    assert sorted(numbers) == list(range(90))
    assert len(dataset._parts[0]) == 8
    expected, cursors, _ = run(dataset, size=8)
    found, _, _ = run(dataset, cursors[2], size=8, count=STEPS - 3, world_size=4)
    assert np.array_equal(found, expected[3:])


def test_too_few_parts_are_noted(tmp_path: Path) -> None:
    notes: list[str] = []
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("1 5\n")
    sources = documents.resolve_sources([str(tmp_path / "a.txt.gz")])
    StreamDataset(sources, Tagged(), block_size=SIZE, lanes=100, seed=1, note=notes.append)
    assert "64 parts for 100 lanes" in notes[0]


# ---- mixtures ----


def test_mixture_holds_in_each_lane_and_resumes(tmp_path: Path) -> None:
    folders = [tagged_text(tmp_path / "x", n=200), tagged_text(tmp_path / "y", n=200, first=5000)]
    phases = (Phase(weights=(3, 1)),)
    dataset = stream(*folders, lanes=2, phases=phases)
    expected, cursors, _ = run(dataset, count=512, size=4)
    blocks = expected.reshape(-1, 2, SIZE)[:, 0]
    second = np.array([[5_000_000 <= t < Tagged.eos_id for t in row] for row in blocks]).any(axis=1)
    first = (blocks < 5_000_000).any(axis=1)
    assert not (first & second).any()  # a block is of one source
    for lane in range(2):
        assert second[lane::2][:1024].sum() == 256
    for step in (3, 100, 400):
        found, _, _ = run(
            stream(*folders, lanes=2, phases=phases), cursors[step], count=40, size=4, world_size=2
        )
        assert np.array_equal(found, expected[step + 1 : step + 41])
    changed = cursors[99].with_weights([1, 3])
    after, later, _ = run(dataset, changed, count=60, size=4)
    again, _, _ = run(dataset, later[20], count=30, size=4, world_size=2)
    assert np.array_equal(again, after[21:51])
    with pytest.raises(RequestError, match="weights throughout"):
        run(dataset, cursors[99].with_weights(None), count=1)


def test_sources_without_weights_are_one_corpus(tmp_path: Path) -> None:
    folders = [tagged_text(tmp_path / "x", n=60), tagged_text(tmp_path / "y", n=60, first=500)]
    dataset = stream(*folders, lanes=2, shuffle="none")
    batches, _, _ = run(dataset, count=200, size=2)
    seen = {int(t) // 1000 for t in batches[:, :, 0].ravel() if t != Tagged.eos_id}
    assert seen == {*range(60), *range(500, 560)}


# ---- refusals, skips, bad input ----


def test_indivisible_lanes_raise(corpus: Path) -> None:
    for size, world_size in ((12, 1), (24, 3)):
        with pytest.raises(
            RequestError, match=rf"8 lanes .* multiple of 8, not {size}.* divides 8, not {world_size}"
        ):
            run(stream(corpus), size=size, world_size=world_size, count=1)


def test_skips_are_whole_rounds_of_the_lanes(corpus: Path) -> None:
    dataset = stream(corpus)
    expected, _, _ = run(dataset, count=8, size=8)
    found, _, _ = run(dataset, dataset.new_cursor().with_skips([(16, 32)]), count=6, size=8, world_size=2)
    assert np.array_equal(found, np.concatenate([expected[:2], expected[4:]]))
    with pytest.raises(RequestError, match=r"take \[16, 32\)"):
        run(dataset, dataset.new_cursor().with_skips([(17, 30)]), count=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_records_raise_or_are_skipped(tmp_path: Path, workers: int) -> None:
    lines = [json.dumps({"text": f"{number} 30"}) for number in range(200)]
    lines[50] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sources = documents.resolve_sources([str(tmp_path / "a.jsonl")])
    options: dict[str, Any] = {"block_size": SIZE, "lanes": 2, "seed": 1}
    with pytest.raises(FaultError, match=r"a\.jsonl, byte .*on_error skip"):
        run(StreamDataset(sources, Tagged(), **options), size=2, count=200, workers=workers)
    dataset = StreamDataset(sources, Tagged(), on_error="skip", **options)
    batches, _, _ = run(dataset, size=2, count=400)
    seen = {int(t) // 1000 for t in batches[:, :, 0].ravel() if t != Tagged.eos_id}
    assert seen == set(range(200)) - {50}


def test_too_many_bad_records_raise(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(["{broken"] * 40 + [json.dumps({"text": "1 3"})] * 40))
    sources = documents.resolve_sources([str(tmp_path / "a.jsonl")])
    dataset = StreamDataset(sources, Tagged(), block_size=SIZE, lanes=1, seed=1, on_error="skip")
    with pytest.raises(FaultError, match=r"more than data\.max_bad_fraction"):
        run(dataset, size=1, count=1)


def test_stream_without_text_raises(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    dataset = StreamDataset(
        documents.resolve_sources([str(tmp_path / "a.txt")]), Bytes(), block_size=4, lanes=1, seed=1
    )
    with pytest.raises(RequestError, match="no text at all"):
        run(dataset, size=1, count=1)


@pytest.mark.parametrize("shuffle", ["full", "none"])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0)])
def test_stream_of_empty_files_is_refused_at_the_start(
    shuffle: str, weights: tuple[float, ...] | None, tmp_path: Path
) -> None:
    """It ended in a ZeroDivisionError at the first batch. One source of several may be empty if they are one corpus."""
    (tmp_path / "a.txt").write_text("words of a line\n" * 40)
    (tmp_path / "e.txt").write_text("")
    paths = [tmp_path / name for name in ("a.txt", "e.txt")]
    with pytest.raises(RequestError, match="source 'e' holds no text at all"):
        stream(paths[1], tokenizer=Bytes(), lanes=1, shuffle=shuffle)
    given: dict[str, Any] = {"tokenizer": Bytes(), "lanes": 1, "shuffle": shuffle}
    if weights is None:
        assert run(stream(*paths, **given), size=1, count=1)
    else:
        with pytest.raises(RequestError, match="source 'e' holds no text at all"):
            stream(*paths, phases=(Phase(weights=weights),), **given)


def test_validation_split_of_a_stream(tmp_path: Path) -> None:
    folder = tagged_text(tmp_path, n=200)
    seen = []
    for side in ("train", "valid"):
        batches, _, _ = run(stream(folder, lanes=2, split=(side, 0.3)), size=2, count=400)
        seen.append({int(t) // 1000 for t in batches[:, :, 0].ravel() if t != Tagged.eos_id})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(200))


def test_resume_with_another_corpus_raises(corpus: Path, tmp_path: Path) -> None:
    cursor = stream(corpus).new_cursor()
    assert cursor.check(fingerprint=stream(corpus).fingerprint, seed=5) == cursor
    for other in (
        stream(tagged_text(tmp_path)),
        stream(corpus, block_size=8),
        stream(corpus, window_blocks=8),
    ):
        with pytest.raises(RequestError, match="other data"):
            cursor.check(fingerprint=other.fingerprint, seed=5)
    with pytest.raises(RequestError, match="multiple of its 8 lanes"):
        stream(corpus).resumed(replace(cursor, position=3))


# ---- the Hub ----


def test_hub_dataset_streams_and_builds_a_store(tmp_path: Path) -> None:
    """From a local folder: the same code path as the Hub, without the network."""
    from lmcore.data.store.build import build_store

    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        rows = [{"content": f"{shard * 50 + number} {number % 20 + 1}"} for number in range(50)]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    [source] = documents.resolve_sources([{"path": f"hf://{folder}", "text_field": "content"}])
    dataset = StreamDataset([source], Tagged(), block_size=SIZE, lanes=2, seed=1)
    expected, cursors, _ = run(dataset, size=2, count=150)
    assert {int(t) // 1000 for t in expected[:, :, 0].ravel() if t != Tagged.eos_id} == set(range(150))
    found, _, _ = run(dataset, cursors[30], size=2, count=20, world_size=2)
    assert np.array_equal(found, expected[31:51])
    store = build_store(source, Tagged(), store_dir=tmp_path / "stores")
    assert store.n_documents == 150
    with pytest.raises(FaultError, match="no text in 'text'"):
        build_store(replace(source, text_field="text"), Tagged(), store_dir=tmp_path / "stores")
    with pytest.raises(RequestError, match="cannot be opened"):
        StreamDataset(
            documents.resolve_sources([f"hf://{tmp_path}/none"]), Tagged(), block_size=4, lanes=1, seed=1
        )
    with pytest.raises(RequestError, match="unknown option splitt; choose from config, split"):
        StreamDataset(
            documents.resolve_sources([f"hf://{folder}?splitt=x"]), Tagged(), block_size=4, lanes=1, seed=1
        )


def test_rows_of_a_hub_dataset_are_checked_like_those_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    class Data(list[dict[str, str]]):
        num_shards = 1

    rows = Data({"text": text} for text in ["good", "with \0", "lone \ud800", "\ufeffmarked"])
    monkeypatch.setattr(hub, "_open", lambda path: (rows, "hash"))
    [source] = documents.resolve_sources(["hf://owner/name"])
    bad: list[documents.BadRecord] = []
    [part] = hub.parts_of(source, part_bytes=2**20)
    found = hub.documents_of(source, part, bad=bad.append)
    assert [document.text for document in found] == ["good", "marked"]
    assert [record.where for record in bad] == ["shard 0, row 1", "shard 0, row 2"]
    assert "NUL byte" in bad[0].reason
    assert "lone surrogate" in bad[1].reason


def test_a_lost_connection_to_the_hub_is_one_line_and_no_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(Exception):
        """As httpx raises: no OSError."""

    class Data:
        num_shards = 1

        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "good"}
            raise Cut("connection reset\nby peer")

    monkeypatch.setattr(hub, "_open", lambda path: (Data(), "hash"))
    [source] = documents.resolve_sources(["hf://owner/name"])
    [part] = hub.parts_of(source, part_bytes=2**20)
    bad: list[documents.BadRecord] = []
    found = hub.documents_of(source, part, bad=bad.append)
    assert next(found).text == "good"
    with pytest.raises(FaultError, match=r"Cut: connection reset.*by peer\): check the connection"):
        next(found)
    assert bad == []


@final
class Numbered:
    """A document is fifteen times its first three digits, and an end."""

    vocab_size, eos_id, fingerprint = 1001, 1000, "numbered"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.full(15, int(one[:3]), dtype=np.int32) for one in texts]


def test_shuffle_window_mixes_as_documented(tmp_path: Path) -> None:
    """Of 1,000 neighbours, how many of 1,000 parts of the corpus: as guarantees.md has it, 16 and 64 lanes."""
    path = tmp_path / "numbered.txt"
    path.write_text("".join(f"{number // 100:03d}{number:045d}\n" for number in range(100_000)))
    [source] = documents.resolve_sources([{"path": str(path), "unit": "line"}])
    for lanes, low, high in ((16, 25, 40), (64, 70, 90)):
        data = StreamDataset([source], Numbered(), block_size=16, lanes=lanes, seed=3, window_blocks=1024)
        data = data.resumed(data.new_cursor())
        seen = np.concatenate([data.read(np.arange(at, at + 64)).ids[:, 1] for at in range(0, 1000, 64)])[
            :1000
        ]
        assert low < len(np.unique(seen)) < high


@pytest.mark.parametrize("shuffle", ["full", "none"])
@pytest.mark.parametrize("document_count", [1, 3])
def test_stream_of_fewer_documents_than_lanes_trains(
    tmp_path: Path, shuffle: str, document_count: int
) -> None:
    """Empty files beside it change nothing: every lane meets the documents sooner or later."""
    folder = tagged_text(tmp_path, n=document_count)
    for name in ("0.txt", "z.txt"):
        (folder / name).write_text("\n\n")
    dataset = stream(folder, shuffle=shuffle)
    expected, cursors, _ = run(dataset, count=10)
    seen = {int(token) // 1000 for token in expected[:, :, 0].ravel() if token != Tagged.eos_id}
    assert seen == set(range(document_count))
    found, _, _ = run(stream(folder, shuffle=shuffle), cursors[4], count=5, world_size=2)
    assert np.array_equal(found, expected[5:])


def test_stream_of_a_tokenizer_that_was_called_otherwise_goes_on(corpus: Path) -> None:
    class Renamed(Tagged):
        fingerprint = "as it is called today"
        former_fingerprints = ("other", Tagged.fingerprint)

    begun = stream(corpus)
    now = stream(corpus, tokenizer=Renamed())
    assert now.fingerprint != begun.fingerprint
    assert begun.fingerprint in now.former_fingerprints
    cursor = replace(begun.new_cursor(), position=16)
    same = {"fingerprint": now.fingerprint, "seed": cursor.seed, "former": now.former_fingerprints}
    goes_on = cursor.check(**same)
    assert (goes_on.fingerprint, goes_on.position) == (now.fingerprint, 16)
    ids = [one.read(np.arange(16, 24)).ids for one in (now.resumed(goes_on), begun.resumed(cursor))]
    assert np.array_equal(*ids)
    with pytest.raises(RequestError, match="trained on other data"):
        replace(cursor, fingerprint=stream(corpus, eos=False).fingerprint).check(**same)
