"""Lines -> texts: what a document is in each format, and which records are bad.

Comes in: numbered lines of :mod:`lmcore.data.text.compression` (or the open file, for parquet). Goes out: (offset or
row, text) in order, with a :class:`Damage` in the place of each bad record. What always holds: a bad record
never costs its neighbours; nothing is raised for content.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

from lmcore.data.text.compression import MAX_DOCUMENT_BYTES, SURROGATE, Damage, is_blank, lines, stream

Numbered = Iterator[tuple[int, bytes | Damage]]
Texts = Iterator[tuple[int, str | Damage]]

_MAX_CSV_LINES = 10_000
_PARQUET_ROWS = 1024


def _checked(text: str) -> str | Damage:
    if "\0" in text:
        return Damage("NUL byte: binary data, or a hole that a crash left")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return Damage("lone surrogate: not a character")
    return text.removeprefix("\ufeff")


def _decoded(raw: bytes, encoding: str) -> str | Damage:
    try:
        text = raw.decode(encoding)
    except UnicodeError as error:
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = "this looks like utf-16; " if wide else ""
        where = f" at its byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        return Damage(
            f"not {encoding}{where}: {hint}set data.encoding (cp932 for Shift-JIS, euc_jp, utf-16, ...)"
        )
    return _checked(text)


def plain_lines(numbered: Numbered, stop: int, encoding: str) -> Texts:
    """``unit: line``. The lines that begin before ``stop``."""
    for offset, line in numbered:
        if offset >= stop:
            return
        yield offset, line if isinstance(line, Damage) else _decoded(line.removesuffix(b"\r"), encoding)


def paragraphs(numbered: Numbered, stop: int, encoding: str, inside: bool) -> Texts:
    """``unit: paragraph``. The paragraphs that begin before ``stop``; ``inside``: first skip the rest of
    one."""
    held: list[bytes] = []
    begin = held_bytes = 0
    skip = inside
    for offset, line in numbered:
        if not held and offset >= stop:
            return
        if isinstance(line, Damage):
            yield (begin if held else offset), line
            held, skip = [], False
        elif is_blank(line):
            if held:
                yield begin, _decoded(b"\n".join(held).removesuffix(b"\r"), encoding)
            held, skip = [], False
        elif not skip:
            if not held:
                begin, held_bytes = offset, 0
            held.append(line)
            held_bytes += len(line) + 1
            if held_bytes > MAX_DOCUMENT_BYTES:
                yield begin, Damage(f"a paragraph of more than {MAX_DOCUMENT_BYTES:,} bytes")
                held, skip = [], True
    if held:
        yield begin, _decoded(b"\n".join(held).removesuffix(b"\r"), encoding)


def whole(stream: Iterable[bytes | Damage], encoding: str) -> Texts:
    """``unit: file``."""
    held: list[bytes] = []
    held_bytes = 0
    for piece in stream:
        if isinstance(piece, Damage):
            yield 0, piece
            return
        held_bytes += len(piece)
        if held_bytes > MAX_DOCUMENT_BYTES:
            yield (
                0,
                Damage(
                    f"a file of more than {MAX_DOCUMENT_BYTES:,} bytes: set data.unit to line or paragraph"
                ),
            )
            return
        held.append(piece)
    yield 0, _decoded(b"".join(held), encoding)


def fields(values: Iterable[tuple[int, Any]], field: str) -> Texts:
    """The text of each record."""
    for offset, value in values:
        yield offset, value if isinstance(value, Damage) else _field(value, field)


def _field(record: Any, field: str) -> str | Damage:
    if not isinstance(record, dict):
        return Damage(f"a record must be an object, not {type(record).__name__}")
    if field not in record:
        return Damage(f"no field {field!r} (it has {', '.join(map(repr, list(record)[:8])) or 'none'})")
    text = record[field]
    if not isinstance(text, str):
        return Damage(f"field {field!r} must be a string, not {type(text).__name__}")
    return _checked(text)


def field_names(path: str, kind: str, compression: str | None, encoding: str) -> list[str]:
    """The names that the first 100 records of a file have, in order; empty if none of them can be read."""
    if kind == "parquet":
        import pyarrow as arrow
        import pyarrow.parquet

        try:
            return list(arrow.parquet.read_schema(path).names)
        except (arrow.ArrowException, OSError, ValueError):
            return []
    with open(path, "rb") as file:
        pieces, encoding = stream(file, compression, encoding)
        if kind in ("csv", "tsv"):
            for _, row in _csv_records(lines(pieces), lambda raw: _csv_row(raw, encoding, kind)):
                return row if isinstance(row, list) else []
            return []
        read = (
            json_file(lines(pieces), encoding)
            if kind == "json"
            else json_lines(lines(pieces), 2**63, encoding)
        )
        records = [value for _, value in itertools.islice(read, 100) if isinstance(value, dict)]
    return list(dict.fromkeys(name for record in records for name in record))


def _json(line: bytes, encoding: str) -> Any:
    text = _decoded(line, encoding)
    if isinstance(text, Damage):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Damage(f"not JSON: {error}")


def json_lines(numbered: Numbered, stop: int, encoding: str) -> Iterator[tuple[int, Any]]:
    """One value a line; blank lines are nothing."""
    for offset, line in numbered:
        if offset >= stop:
            return
        if isinstance(line, Damage):
            # The file may be cut exactly behind a record whose line end is missing: that record is good.
            rest = _json(line.rest, encoding)
            if isinstance(rest, dict):
                yield offset, rest
            yield offset, line
        elif not is_blank(line):
            yield offset, _json(line, encoding)


def json_file(numbered: Numbered, encoding: str) -> Iterator[tuple[int, Any]]:
    """A ``.json`` file: lines of records (as some corpora call them), an array, or objects over many lines."""
    visible = (one for one in numbered if isinstance(one[1], Damage) or not is_blank(one[1]))
    head = list(itertools.islice(visible, 2))
    values = [None if isinstance(line, Damage) else _json(line, encoding) for _, line in head]
    again = itertools.chain(head, visible)
    if head and isinstance(values[0], dict) and (len(head) == 1 or isinstance(values[1], dict)):
        yield from json_lines(again, 2**63, encoding)
    else:
        yield from _json_values(again, encoding)


def _json_values(numbered: Numbered, encoding: str) -> Iterator[tuple[int, Any]]:
    """The values of a file whose records are not its lines; it is held in memory up to each damage."""
    held: list[bytes] = []
    begin = end = 0
    for offset, line in numbered:
        if not held:
            begin = end = offset
        if offset > end:
            held.append(b" " * (offset - end - 1))  # blank lines were left out: the offsets must stay true
        if isinstance(line, Damage):
            yield from _scan(b"\n".join([*held, line.rest]), begin, encoding)
            yield offset, line
            held = []
        else:
            held.append(line)
            end = offset + len(line) + 1
    yield from _scan(b"\n".join(held), begin, encoding)


_OBJECT = re.compile(r'\{\s*"')
_BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")


def _scan(raw: bytes, begin: int, encoding: str) -> Iterator[tuple[int, Any]]:
    """Value after value; behind a broken one, on with the next object that can be read (in a JSON string
    every quote is escaped, so that text cannot look like the beginning of an object)."""
    text = raw.decode(encoding, SURROGATE)
    decoder = json.JSONDecoder()
    at = 0
    healthy = True  # what is tried and fails behind a broken value is not a second broken value
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string
        if at == len(text):
            return
        offset = begin + (at if text.isascii() else len(text[:at].encode("utf-8", "surrogatepass")))
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if healthy:
                yield offset, Damage(f"not JSON: {error}")
            healthy = False
            found = _OBJECT.search(text, at + 1)
            if not found:
                return
            at = found.start()
            continue
        healthy = True
        yield offset, value
        at = end


class _NotCsv(Damage):
    """What looks like a row is none: a quote may be missing, or be one too many."""


def csv_rows(numbered: Numbered, encoding: str, field: str, kind: str) -> Texts:
    """Rows of a CSV file with a header; a row may span lines inside quotes.

    A line with a quote too few or too many is a bad record, and reading goes on with the next line. Weaker than
    the other formats in one case: where a stray quote makes one well-formed row of several lines, it is read as
    that row, because nothing in the file tells otherwise.
    """
    header: list[str] = []

    def parse(raw: bytes) -> list[str] | Damage:
        row = _csv_row(raw, encoding, kind)
        if header and isinstance(row, list) and len(row) != len(header):
            return _NotCsv(f"{len(row)} columns where the header has {len(header)}")
        return row

    for offset, row in _csv_records(numbered, parse):
        if isinstance(row, Damage):
            yield offset, row
        elif not header:
            header += row
        elif field not in header:
            yield offset, Damage(f"no column {field!r} in the header")
        else:
            yield offset, _checked(row[header.index(field)])


def _csv_row(raw: bytes, encoding: str, kind: str) -> list[str] | Damage:
    text = _decoded(raw, encoding)
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    delimiter = "\t" if kind == "tsv" else ","
    try:
        # Several lines that are no row do not become one bad record because one of them cannot be decoded.
        content = io.StringIO(
            raw.decode(encoding, SURROGATE) if isinstance(text, Damage) else text, newline=""
        )
        rows = list(csv.reader(content, delimiter=delimiter, strict=True))
    except csv.Error as error:
        return _NotCsv(f"not CSV: {error}")
    if len(rows) != 1:
        return _NotCsv(f"not CSV: {len(rows)} rows where one was expected")
    return text if isinstance(text, Damage) else rows[0]


def _csv_records(
    numbered: Numbered, parse: Callable[[bytes], list[str] | Damage]
) -> Iterator[tuple[int, list[str] | Damage]]:
    """Lines joined while a quote is open (a doubled quote keeps the count even). Where that gives no row, the
    first of the lines is bad, and all behind it are read again as if it were not there."""
    again: deque[tuple[int, bytes | Damage]] = deque()
    held: list[tuple[int, bytes]] = []
    quotes = 0
    while True:
        item = again.popleft() if again else next(numbered, None)
        row: list[str] | Damage
        if item is not None and isinstance(line := item[1], bytes):
            if not held and is_blank(line):
                continue
            held.append((item[0], line))
            quotes += line.count(b'"')
            if quotes % 2 == 0:
                row = parse(b"\n".join(one for _, one in held))
            elif len(held) > _MAX_CSV_LINES:
                row = _NotCsv(f"a quote that is not closed within {_MAX_CSV_LINES:,} lines")
            else:
                continue
            item = None
        elif held:
            row = _NotCsv("a quote that is not closed" + (" before the damage" if item else ""))
        elif item is None:
            return
        else:
            yield item[0], cast(Damage, item[1])
            continue
        yield held[0][0], row
        behind = held[1:] if isinstance(row, _NotCsv) else []
        again.extendleft(reversed([*behind, item] if item else behind))
        held, quotes = [], 0


def parquet_ranges(path: str, part_bytes: int) -> list[tuple[int, int, int]] | None:
    """Runs of row groups (start, stop, compressed bytes) of about ``part_bytes``; ``None`` if there is no
    footer."""
    import pyarrow as arrow  # 0.2 s, and only where a parquet file is read
    import pyarrow.parquet

    try:
        metadata = arrow.parquet.read_metadata(path)
    except (arrow.ArrowException, OSError, ValueError):
        return None
    result = []
    start = n_bytes = 0
    for group in range(metadata.num_row_groups):
        n_bytes += metadata.row_group(group).total_byte_size
        if n_bytes >= part_bytes or group == metadata.num_row_groups - 1:
            result.append((start, group + 1, n_bytes))
            start, n_bytes = group + 1, 0
    return result


def parquet(file: IO[bytes], field: str, start: int, stop: int) -> Texts:
    """The rows of row groups ``[start, stop)``; a damaged row group costs its rows from the damage on."""
    import pyarrow as arrow
    import pyarrow.parquet

    # OSError: pyarrow raises it for damaged pages, and so does the disk; both are a bad record here.
    errors = (arrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError)
    try:
        opened = arrow.parquet.ParquetFile(file, page_checksum_verification=True)
        metadata = opened.metadata
        groups = range(start, stop if stop >= 0 else metadata.num_row_groups)
        row = sum(metadata.row_group(group).num_rows for group in range(start))
        names = opened.schema_arrow.names
    except errors as error:
        yield 0, Damage(f"not a parquet file, or its footer is damaged: {error}")
        return
    if field not in names:
        if start == 0:  # said once for a file, however many pieces it is read in
            yield 0, Damage(f"no column {field!r} (it has {', '.join(map(repr, names[:8]))})")
        return
    for group in groups:
        rows = metadata.row_group(group).num_rows
        done = 0
        try:
            for batch in opened.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[field]):
                column = batch.column(0)
                kind = column.type
                if arrow.types.is_dictionary(kind):
                    column = column.dictionary_decode()
                    kind = column.type
                if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
                    # As bytes: one invalid string must not cost the batch.
                    column = column.cast(
                        arrow.large_binary() if arrow.types.is_large_string(kind) else arrow.binary()
                    )
                elif not (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)):
                    if start == group == 0:
                        yield row, Damage(f"column {field!r} must hold strings, not {kind}")
                    return
                for value in column.to_pylist():
                    if value is None:
                        yield row + done, Damage(f"column {field!r} is null")
                    else:
                        yield row + done, _decoded(value, "utf-8")
                    done += 1
        except errors as error:
            yield row + done, Damage(f"row group {group} is damaged, {rows - done} rows are lost: {error}")
        row += rows
