"""What is left out of the text is said: how much, where, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcore.data.store import build
from lmcore.data.stream import StreamDataset
from lmcore.data.text import documents
from tests.support.data import Bytes


@pytest.fixture
def source(tmp_path: Path) -> documents.Source:
    lines = [json.dumps({"text": f"document {number} of this file"}) for number in range(200)]
    lines[50], lines[120] = "{broken", '{"text": 5}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    [found] = documents.resolve_sources([str(tmp_path / "a.jsonl")])
    return found


def test_a_store_says_its_bad_records_at_each_start(
    tmp_path: Path, source: documents.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"store_dir": tmp_path / "stores", "on_error": "skip", "max_bad_fraction": 0.5}
    for _ in range(2):
        notes: list[str] = []
        store = build.build_store(source, Bytes(), note=notes.append, **options)
        first, second = (record for part in store.manifest["parts"] for record in part["bad_records"])
        assert notes == [
            "a: 2 bad records are left out",
            f"  a.jsonl, {first['where']}: {first['reason']}",
            f"  a.jsonl, {second['where']}: {second['reason']}",
        ]
    assert "not JSON" in first["reason"]
    monkeypatch.setattr(build, "_SAID_RECORDS", 1)
    notes = []
    build.build_store(source, Bytes(), note=notes.append, **options)
    assert notes[2:] == [f"  and 1 more, in {store.folder}/manifest.json"]


def test_a_stream_says_each_bad_record_once(
    source: documents.Source, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = StreamDataset(
        [source], Bytes(), block_size=50, lanes=1, seed=1, on_error="skip", max_bad_fraction=0.5
    )
    for position in range(300):  # three times through the file
        dataset.read(np.array([position]))
    said = [record.getMessage() for record in caplog.records if record.name == "lmcore.data.stream"]
    assert len(said) == 2
    assert all(line.startswith(f"left out: {source.paths[0]}, byte ") for line in said)
