"""Inspect: the numbers are those of the corpus, and what is a sample says so."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from lmcore.data import inspect
from lmcore.data.inspect import inspect_sources, report_lines
from lmcore.data.tokenizer.tokenizer import Tokenizer
from lmcore.data.tokenizer.training import train_tokenizer
from lmcore.errors import RequestError

TEXTS = ["吾輩は猫である。", "名前はまだ無い。\n\tどこで", "plain text  with ▁ in it"]


@pytest.fixture(scope="module")
def encoder() -> Tokenizer:
    return train_tokenizer(TEXTS * 5, vocab_size=330)


def corpus(folder: Path, copies: int = 1) -> str:
    rows = [json.dumps({"text": text}) for text in [*TEXTS, ""] * copies]
    (folder / "a.jsonl").write_text("\n".join([*rows, "{", '{"text": 1}']) + "\n")
    (folder / "image.png").write_bytes(b"\x89PNG")
    return str(folder)


def test_corpus_statistics(tmp_path: Path, encoder: Tokenizer) -> None:
    read: list[int] = []
    [report] = inspect_sources([corpus(tmp_path)], encoder, progress=read.append)
    assert (report.files, report.ignored_files, report.documents, report.empty, report.bad) == (1, 1, 3, 1, 2)
    assert report.bytes == sum(len(text.encode()) for text in TEXTS)
    assert report.longest_bytes == max(len(text.encode()) for text in TEXTS)
    assert report.tokens == sum(len(encoder.encode(text)) for text in TEXTS)
    assert report.tokens_per_byte == report.tokens / report.bytes
    assert report.round_trip == 2 / 3  # the literal U+2581 comes back as a space
    assert report.first_changed is not None
    assert sorted(text for _, text in report.samples) == sorted(
        encoder.decode(encoder.encode(t)) for t in TEXTS
    )
    assert [b.reason.split(":")[0] for b in report.bad_records] == [
        "not JSON",
        "field 'text' must be a string, not a number",
    ]
    assert sum(read) == (tmp_path / "a.jsonl").stat().st_size
    shown = "\n".join(report_lines([report]))
    for words in (
        "1 file, 1 of no known kind left out",
        "3 (1 empty ones dropped)",
        "66.67%",
        "a.jsonl, byte",
        "\\n\\tどこで",
    ):
        assert words in shown


def test_without_a_tokenizer(tmp_path: Path) -> None:
    [report] = inspect_sources([corpus(tmp_path)], samples=1)
    assert (report.tokens, report.tokens_per_byte, report.round_trip) == (None, None, None)
    assert len(report.samples) == 1
    assert report.samples[0][1] in TEXTS
    assert "tokens" not in "\n".join(report_lines([report]))


def test_large_source_is_sampled(tmp_path: Path) -> None:
    path = corpus(tmp_path, copies=30_000)
    [whole], [some] = inspect_sources([path]), inspect_sources([path], max_bytes=2 * 2**20)
    assert (whole.read_share, whole.documents) == (1.0, 90_000)
    assert 0.2 < some.read_share < 0.6
    assert abs(some.documents / 90_000 - some.read_share) < 0.02
    assert "of the bytes were read" in "\n".join(report_lines([some]))
    assert some == inspect_sources([path], max_bytes=2 * 2**20)[0]
    assert some.samples != inspect_sources([path], max_bytes=2 * 2**20, seed=1)[0].samples


def test_reading_of_a_compressed_file_ends_after_so_many_bytes_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"the same line again\n" * 200_000))
    [report] = inspect_sources([str(path)], max_bytes=2**20)
    assert 2**20 <= report.bytes < 3 * 2**20
    assert "reading ended after" in "\n".join(report_lines([report]))


def test_long_document_is_counted_in_pieces(
    tmp_path: Path, encoder: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "吾輩は猫である。" * 1000
    (tmp_path / "a.txt").write_text(text)
    [whole] = inspect_sources([str(tmp_path)], encoder)
    monkeypatch.setattr(inspect, "_ENCODED_CHARACTERS", 801)
    [cut] = inspect_sources([str(tmp_path)], encoder)
    assert whole.tokens is not None
    assert cut.tokens is not None
    assert whole.tokens <= cut.tokens < 1.02 * whole.tokens
    assert (cut.documents, cut.documents_unchanged) == (1, 1)


def test_terminal_escape_codes_are_neutralised(tmp_path: Path, encoder: Tokenizer) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"
    (tmp_path / f"{hostile}a.jsonl").write_text(
        json.dumps({"text": f"good {hostile} text"}) + "\n" + json.dumps({hostile: 1}) + "\n{" + hostile
    )
    (tmp_path / f"{hostile}runs").mkdir()
    (tmp_path / f"{hostile}runs" / "tokenizer_config.json").write_text("{}")
    reports = inspect_sources([str(tmp_path)], encoder)
    assert (reports[0].documents, reports[0].bad) == (1, 2)
    shown = "\n".join(report_lines(reports))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "\\x1b]0;title" in shown


def test_several_sources_and_wrong_requests(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    (tmp_path / "c.bin").write_bytes(b"\0\0")
    assert [
        report.name
        for report in inspect_sources([f"{path}/a.jsonl", {"path": f"{path}/b.txt", "name": "lines"}])
    ] == ["a", "lines"]
    assert inspect_sources([f"{path}/b.txt"])[0].unit == "line (auto: no blank lines in b.txt)"
    for entry, message in {"nothing.txt": "no such file", "c.bin": "holds tokens"}.items():
        with pytest.raises(RequestError, match=message):
            inspect_sources([f"{path}/{entry}"])
    with pytest.raises(RequestError, match="only training and prepare read datasets of the Hub"):
        inspect_sources(["hf://owner/name"])
