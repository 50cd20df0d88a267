"""Inspection of a corpus before training: documents, bytes, tokens, bad records and a few samples of each source.

Nothing is written. Numbers that were measured on a sample are marked as such, and the sample is the same each time.

    reports = inspect_sources(["corpus/*.jsonl"], load_tokenizer("tokenizer"))
    print("\\n".join(report_lines(reports)))
"""

from __future__ import annotations

import hashlib
import heapq
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcore.data.text.documents import BadRecord, Document, Source, parts, read, resolve_sources
from lmcore.data.tokenizer.tokenizer import Tokenizer
from lmcore.humanize import amount, one_line, size

_BATCH_CHARACTERS = 2**20
_ENCODED_CHARACTERS = 2**22
"""A longer document is encoded in pieces, because the time of a tokenizer can grow faster than linearly with the text."""
_SHOWN_BAD = 10


@dataclass(kw_only=True)
class SourceReport:
    """Statistics of one source. The counts cover what was read.

    Attributes:
        read_share: share of the source's bytes on disk that was read; ``None`` if reading ended inside a part.
        bytes, longest_bytes: UTF-8 bytes of all text, and of the longest document.
        tokens: ``None`` without a tokenizer.
        documents_unchanged: number of documents that are decoded exactly from their ids; ``first_changed`` is the place of
            the first one that is not.
        bad: number of documents that are bad or lost, at least this many if ``bad_unknown``.
        samples: (where, decoded text) of a few documents.
    """

    name: str
    files: int
    ignored_files: int
    unit: str
    encoding: str
    read_share: float | None = 1.0
    documents: int = 0
    empty: int = 0
    bytes: int = 0
    longest_bytes: int = 0
    tokens: int | None = None
    unknown_tokens: int = 0
    documents_unchanged: int = 0
    first_changed: str | None = None
    bad: int = 0
    bad_unknown: bool = False
    bad_records: list[BadRecord] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_byte(self) -> float | None:
        """Fertility: tokens per byte of text."""
        return self.tokens / self.bytes if self.tokens is not None and self.bytes else None

    @property
    def round_trip(self) -> float | None:
        """Share of the documents that are decoded exactly from their ids."""
        return (
            self.documents_unchanged / self.documents if self.tokens is not None and self.documents else None
        )


def inspect_sources(
    entries: Iterable[str | Mapping[str, Any]],
    tokenizer: Tokenizer | None = None,
    *,
    text_field: str = "text",
    unit: str = "auto",
    encoding: str = "utf-8",
    max_bytes: int = 256 * 2**20,
    samples: int = 3,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[SourceReport]:
    """Read the sources and compute a report for each.

    Args:
        entries: as in ``data.train``, see :func:`lmcore.data.text.documents.resolve_sources`.
        tokenizer: if given, tokens are counted, and every document is encoded and decoded.
        max_bytes: a source with more bytes on disk is sampled, by parts of 1 MiB in seeded random order. Reading also
            ends after this many bytes of text (compressed files).
        samples: number of decoded documents to keep for each source, drawn by a hash of their place.
        progress: called with the bytes on disk of each part that was read.

    Raises:
        RequestError: see :func:`lmcore.data.text.documents.resolve_sources`.
    """
    sources = resolve_sources(entries, text_field=text_field, unit=unit, encoding=encoding, join_files=True)
    return [_inspect(one, tokenizer, max_bytes, samples, seed, progress) for one in sources]


def _inspect(
    source: Source,
    encoder: Tokenizer | None,
    max_bytes: int,
    samples: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> SourceReport:
    report = SourceReport(
        name=source.name,
        files=len(source.paths),
        ignored_files=source.ignored,
        unit=f"{source.unit} ({source.unit_reason})" if source.unit_reason else source.unit,
        encoding=source.encoding,
        notes=source.notes,
        tokens=None if encoder is None else 0,
    )
    # Small parts, so that a sample covers many files.
    work = parts(source, part_bytes=2**20)
    total = sum(part.n_bytes for part in work)
    if total > max_bytes:
        random.Random(f"{seed} inspect").shuffle(work)
    done = 0
    drawn: list[tuple[int, Document]] = []
    batch: list[Document] = []

    def bad(record: BadRecord) -> None:
        report.bad += record.documents
        report.bad_unknown |= record.at_least
        if len(report.bad_records) < _SHOWN_BAD:
            report.bad_records.append(record)

    def empty(where: str) -> None:
        report.empty += 1

    for part in work:
        held = 0
        for document in read(source, part, bad=bad, empty=empty):
            key = hashlib.blake2b(
                f"{seed} {document.where}".encode("utf-8", "replace"), digest_size=8
            ).digest()
            heapq.heappush(drawn, (-int.from_bytes(key), document))
            if len(drawn) > samples:
                heapq.heappop(drawn)
            batch.append(document)
            held += len(document.text)
            if held >= _BATCH_CHARACTERS:
                _count(report, encoder, batch)
                held = 0
                if report.bytes >= max_bytes:
                    report.read_share = None
                    break
        _count(report, encoder, batch)
        done += part.n_bytes
        if progress is not None:
            progress(part.n_bytes)
        if report.read_share is None:
            break
        if max(done, report.bytes) >= max_bytes and done < total:
            report.read_share = done / total
            break
    for _, document in sorted(drawn, reverse=True):
        shown = document.text if encoder is None else encoder.decode(encoder.encode(document.text[:2000]))
        report.samples.append((document.where, shown))
    return report


def _count(report: SourceReport, encoder: Tokenizer | None, batch: list[Document]) -> None:
    for document in batch:
        length = len(document.text.encode())
        report.documents += 1
        report.bytes += length
        report.longest_bytes = max(report.longest_bytes, length)
    if encoder is not None and report.tokens is not None:
        pieces = [(document, piece) for document in batch for piece in _pieces(document.text)]
        changed = set()
        for (document, piece), ids in zip(pieces, encoder.encode_batch([piece for _, piece in pieces])):
            report.tokens += len(ids)
            if encoder.unk_id is not None:
                report.unknown_tokens += int((ids == encoder.unk_id).sum())
            if encoder.decode(ids.tolist()) != piece:
                changed.add(document.where)
                report.first_changed = report.first_changed or document.where
        report.documents_unchanged += len(batch) - len(changed)
    batch.clear()


def _pieces(text: str) -> list[str]:
    starts = range(0, len(text), _ENCODED_CHARACTERS)
    return [text] if len(starts) < 2 else [text[start : start + _ENCODED_CHARACTERS] for start in starts]


def report_lines(reports: Iterable[SourceReport], *, width: int = 100) -> list[str]:
    """The reports as lines of plain text."""
    result: list[str] = []
    for report in reports:
        result += _lines(report, width)
    return result


def _lines(report: SourceReport, width: int) -> list[str]:
    files = amount(report.files, "file")
    if report.ignored_files:
        files += f", {report.ignored_files:,} of no known kind left out"
    rows = [("files", files), ("unit of text", report.unit), ("encoding", report.encoding)]
    for note in report.notes:
        _, left_out, what = note.rpartition("left out: ")
        rows.append(("left out" if left_out else "note", what))
    if report.read_share is None:
        rows.append(("sampled", f"reading ended after {size(report.bytes)} of text; the counts are of these"))
    elif report.read_share < 1:
        rows.append(("sampled", f"{report.read_share:.1%} of the bytes were read; the counts are of these"))
    mean = report.bytes / report.documents if report.documents else 0
    rows.append(("documents", f"{report.documents:,} ({report.empty:,} empty ones dropped)"))
    rows.append(("bytes", f"{report.bytes:,} of text (mean {mean:,.0f}, longest {report.longest_bytes:,})"))
    if report.tokens is not None:
        fertility = report.tokens_per_byte
        if fertility:
            rows.append(
                ("tokens", f"{report.tokens:,}, {fertility:.4f} a byte ({1 / fertility:.2f} bytes a token)")
            )
        else:
            rows.append(("tokens", f"{report.tokens:,}"))
        if report.round_trip is not None:
            changed = f"; the first that does not: {report.first_changed}" if report.first_changed else ""
            rows.append(
                ("round trip", f"{report.round_trip:.2%} of the documents come back exactly{changed}")
            )
        if report.unknown_tokens:
            rows.append(
                ("unknown", f"{amount(report.unknown_tokens, 'token')} for text that the tokenizer loses")
            )
    at_least = "at least " if report.bad_unknown else ""
    rows.append(("bad records", f"{at_least}{report.bad:,}"))
    # File names and text are untrusted: their control characters must not reach the terminal.
    result = [f"source {one_line(report.name)}"] + [f"  {name:<13} {one_line(value)}" for name, value in rows]
    result += [f"    {record}" for record in report.bad_records]
    more = report.bad - sum(record.documents for record in report.bad_records)
    if more > 0:
        result.append(f"    ... and {more:,} more")
    for where, sample in report.samples:
        shown = one_line(sample[: 4 * width].replace("\t", "\\t"))
        shown = shown if len(shown) <= width and len(sample) <= 4 * width else shown[: width - 3] + "..."
        result += [f"  sample {one_line(os.path.basename(where))}", f"    {shown}"]
    return result
