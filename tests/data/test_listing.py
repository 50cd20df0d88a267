"""A start asks the disk once for each folder and file, and reads a file again only if it has changed."""

from __future__ import annotations

import builtins
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lmcore.config.parse import parse
from lmcore.data.store import samples
from lmcore.data.text import listing
from lmcore.data.text.sources import resolve_sources
from lmcore.run import own_text, setup
from lmcore.run.preflight import preflight


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    for number in range(12):
        (folder / str(number % 3)).mkdir(parents=True, exist_ok=True)
        (folder / str(number % 3) / f"{number}.txt").write_text(f"words of file {number} and others\n" * 20)
    return folder


def start(tmp_path: Path, text: Path) -> setup.Data:
    words = (
        f"--data.train {text} --run_dir {tmp_path}/run --data.store_dir {tmp_path}/stores --data.processes 1"
    )
    config = parse([*words.split(), "--tokenizer.vocab_size", "300"], own_text=own_text.defaults)
    preflight(config)
    return setup.open_data(config, tmp_path / "run" / "tokenizer", note=lambda line: None)


class Asked:
    """Counts what the disk is asked about files below a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, Counter[str]] = {"stat": Counter(), "scandir": Counter(), "open": Counter()}
        for module, name in ((os, "stat"), (os, "scandir"), (builtins, "open")):
            monkeypatch.setattr(module, name, self._counting(name, getattr(module, name), str(folder)))

    def _counting(self, name: str, real: Any, folder: str) -> Any:
        def counting(path: Any, *rest: Any, **options: Any) -> Any:
            if isinstance(path, str) and path.startswith(folder):
                self.counts[name][path] += 1
            return real(path, *rest, **options)

        return counting


def test_start_walks_once_and_looks_once_at_each_file(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "REMEMBERED_FROM", 5)
    monkeypatch.setattr(samples, "_SETTLED_NS", 0)
    first = start(tmp_path, text).train
    asked = Asked(text, monkeypatch)
    listing.remember()
    again = start(tmp_path, text).train
    files = [str(path) for path in text.rglob("*.txt")]
    assert {asked.counts["stat"][path] for path in files} == {1}
    assert set(asked.counts["scandir"].values()) == {1}
    assert sum(asked.counts["open"][path] for path in files) == 0  # neither text nor samples are read again
    assert again.fingerprint == first.fingerprint


def test_changed_file_is_read_again_whatever_its_time_says(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "REMEMBERED_FROM", 5)
    monkeypatch.setattr(samples, "_SETTLED_NS", 0)
    paths = [str(path) for path in sorted(text.rglob("*.txt"))]
    before = samples.samples_of(paths)
    assert samples.samples_of(paths) == before == [samples.sample_of(path) for path in paths]
    stat = os.stat(paths[3])
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes().replace(b"others", b"OTHERS"))
    os.utime(paths[3], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = samples.samples_of(paths)
    assert after[3] != before[3]
    assert after[3][0] == before[3][0]  # the same size
    assert after[:3] + after[4:] == before[:3] + before[4:]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_damaged_memory_of_files_is_not_used(
    content: bytes, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "REMEMBERED_FROM", 5)
    paths = [str(path) for path in sorted(text.rglob("*.txt"))]
    before = samples.samples_of(paths)
    memory = samples._memory_file(paths)
    assert memory is not None
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_bytes(content)
    assert samples.samples_of(paths) == before


def test_file_that_was_just_written_is_not_remembered(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "REMEMBERED_FROM", 5)  # it may change again within the clock's resolution
    paths = [str(path) for path in sorted(text.rglob("*.txt"))]
    samples.samples_of(paths)
    memory = samples._memory_file(paths)
    assert memory is not None
    assert not memory.exists()


def test_outside_of_a_start_the_disk_is_asked_each_time(tmp_path: Path, text: Path) -> None:
    with listing.remembered():
        assert len(resolve_sources([str(text)])[0].paths) == 12
        (text / "0" / "more.txt").write_text("more")
        assert len(resolve_sources([str(text)])[0].paths) == 12
    assert len(resolve_sources([str(text)])[0].paths) == 13
    assert listing.stat(str(tmp_path / "later")) is None
    (tmp_path / "later").write_text("there")
    assert listing.stat(str(tmp_path / "later")) is not None
