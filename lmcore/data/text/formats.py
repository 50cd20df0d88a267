"""Lines -> texts: what a document is in each format, and which records are bad.

Each reader yields (offset or row, text) in the order of the file, with a :class:`Damage` instead of the text of a bad
record. The content of a file never raises an error.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import IO, Any

from lmcore.data.text.compression import (
    MAX_DOCUMENT_BYTES,
    SURROGATE,
    UNDECODABLE,
    Damage,
    as_lines_of_bytes,
    chunks,
    compression_of,
    is_blank,
    lines,
)
from lmcore.data.text.remote import open_file
from lmcore.humanize import amount

Numbered = Iterable[tuple[int, bytes | Damage]]
Texts = Iterator[tuple[int, str | Damage]]
Values = Iterator[tuple[int, Any, int]]
"""JSON values as (offset, value or damage, bytes of the record)."""

_ISO_2022 = (
    (re.compile(r"\x1b\$(?:[@B]|\(D)"), "iso2022_jp"),
    (re.compile(r"\x1b\$(?:A|\(C)"), "iso2022_jp_2"),
    (re.compile(r"\x1b\$\)C"), "iso2022_kr"),
)
"""Escape sequences that switch to two-byte characters, and the encodings that use them."""
_RECORD_SEPARATOR = b"\x1e"
"""Before each record of a JSON text sequence (RFC 7464)."""
_PARQUET_ROWS = 1024
_ONLY_CR = "; a carriage return alone (old Macs) is no line end, tr '\\r' '\\n' makes it one"
_JSON_TYPES: dict[type, str] = {
    **{type(None): "null", bool: "true or false", int: "a number", float: "a number"},
    **{str: "a string", list: "an array", dict: "an object"},
}
_MOST_DIGITS = 4000  # Python refuses to convert longer integers; the text field is a string in any case


def checked(text: str, n_bytes: int) -> str | Damage:
    """The text without a byte order mark, or a ``Damage`` if it is not valid text; used for every format."""
    if "\0" in text:
        return Damage("NUL byte: binary data, or a hole that a crash left", n_bytes=n_bytes)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return Damage("lone surrogate: not a character", n_bytes=n_bytes)
    return text.removeprefix("\ufeff")


def _decoded(raw: bytes, encoding: str) -> str | Damage:
    try:
        text = raw.decode(encoding)
    except UnicodeError as error:
        where = f" at its byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        return _not_encoded(raw, encoding, where)
    if "\0" in text and _wide_encoding(raw):
        return _not_encoded(raw, encoding, "")
    return checked(text, len(raw))


def _read_as(raw: bytes, encoding: str) -> str | Damage:
    """:func:`_decoded` with ``data.encoding``; also refuses ISO-2022 (JP, KR), whose bytes are valid ASCII."""
    text = _decoded(raw, encoding)
    if isinstance(text, str) and _iso_2022(text):
        return _not_encoded(raw, encoding, "")
    return text


def _iso_2022(text: str) -> str:
    """The encoding if this is ISO-2022-JP (JIS) or ISO-2022-KR decoded as another encoding, else an empty string.

    These encodings switch to kanji or hangul by an escape sequence."""
    if "\x1b$" not in text or not text.isascii():
        return ""
    return next((name for pattern, name in _ISO_2022 if pattern.search(text)), "")


def _not_encoded(raw: bytes, encoding: str, where: str) -> Damage:
    if encoding == "utf-8" and UNDECODABLE in raw:  # converted: raw is not what the file contains
        reason = "bytes that are not in data.encoding: the file is damaged or cut off here, or has another encoding"
        return Damage(reason, n_bytes=len(raw))
    real = _other_encoding(raw) or ("utf-8" if _is_utf_8(raw) else "")
    hint = f"this looks like {real}; " if real else ""
    remedy = "set data.encoding (cp932 for Shift-JIS, euc_jp, utf-16, ...)"
    if codecs.lookup(encoding).name != "utf-8":  # it was set by the user, and may be right for other files
        remedy += f", or give this file its own: '{{path: FILE, encoding: {real or 'utf-8'}}}'"
    return Damage(f"not {encoding}{where}: {hint}{remedy}", n_bytes=len(raw))


def _is_utf_8(raw: bytes) -> bool:
    """Whether these bytes are certainly UTF-8: valid, and not only ASCII. Other encodings are rarely valid UTF-8."""
    try:
        return not raw.decode("utf-8").isascii()
    except UnicodeDecodeError:
        return False


def _other_encoding(raw: bytes) -> str:
    """The encoding that these bytes appear to have, as a value for ``data.encoding``, or an empty string."""
    return _wide_encoding(raw) or _iso_2022(raw.decode("latin-1"))


def _wide_encoding(raw: bytes) -> str:
    """``utf-16`` or ``utf-32`` according to a byte order mark or the places of zero bytes, else an empty string."""
    head = raw[:1000]
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    # By place modulo 4, because a line begins inside a character, with the remaining bytes of a line end.
    zeros = [head[place::4].count(0) for place in range(4)]
    most = 0.9 * (len(head) // 4)
    if min(zeros) < most / 2 and any(min(zeros[place], zeros[place - 1]) >= most for place in range(4)):
        return "utf-32"  # in UTF-16 no two adjacent bytes are always zero
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (
        len(head) > 2 and abs(zeros[0] + zeros[2] - zeros[1] - zeros[3]) > len(head) // 3
    ):
        return "utf-16"
    return ""


def plain_lines(numbered: Numbered, stop: int, encoding: str) -> Texts:
    """``unit: line``: the lines that begin before ``stop``."""
    for offset, line in numbered:
        if offset >= stop:
            return
        yield offset, line if isinstance(line, Damage) else _read_as(line.removesuffix(b"\r"), encoding)


def paragraphs(numbered: Numbered, stop: int, encoding: str, inside: bool) -> Texts:
    """``unit: paragraph``: the paragraphs that begin before ``stop``.

    Args:
        inside: the first lines belong to a paragraph that began before, and are skipped.
    """
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
                yield begin, _read_as(b"\n".join(held).removesuffix(b"\r"), encoding)
            held, skip = [], False
        elif not skip:
            if not held:
                begin, held_bytes = offset, 0
            held.append(line)
            held_bytes += len(line) + 1
            if held_bytes > MAX_DOCUMENT_BYTES:
                reason = f"a paragraph of more than {MAX_DOCUMENT_BYTES:,} bytes"
                yield begin, Damage(reason, n_bytes=held_bytes)
                held, skip = [], True
    if held:
        yield begin, _read_as(b"\n".join(held).removesuffix(b"\r"), encoding)


def whole(pieces: Iterable[bytes | Damage], encoding: str) -> Texts:
    """``unit: file``: the file is one document."""
    held: list[bytes] = []
    held_bytes = 0
    for piece in pieces:
        if isinstance(piece, Damage):
            yield 0, Damage(piece.reason, n_bytes=held_bytes + piece.n_bytes)
            return
        held_bytes += len(piece)
        if held_bytes > MAX_DOCUMENT_BYTES:
            reason = f"a file of more than {MAX_DOCUMENT_BYTES:,} bytes: set data.unit to line or paragraph"
            yield 0, Damage(reason, n_bytes=held_bytes)
            return
        held.append(piece)
    yield 0, _read_as(b"".join(held), encoding)


# ---- JSON ----


def _integer(digits: str) -> int:
    return int(digits) if len(digits) < _MOST_DIGITS else 0


_DECODER = json.JSONDecoder(parse_int=_integer)


def fields(values: Values, field: str) -> Texts:
    """The text of each record."""
    for offset, value, n_bytes in values:
        yield offset, value if isinstance(value, Damage) else _field(value, field, n_bytes)


def _field(record: Any, field: str, n_bytes: int) -> str | Damage:
    if not isinstance(record, dict):
        hint = "; name a file that is one array .json" if isinstance(record, list) else ""
        return Damage(f"a record must be an object, not {_json_type(record)}{hint}", n_bytes=n_bytes)
    if field not in record:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        return Damage(f"no field {field!r} (it has {names})", n_bytes=n_bytes)
    text = record[field]
    if not isinstance(text, str):
        return Damage(f"field {field!r} must be a string, not {_json_type(text)}", n_bytes=n_bytes)
    return checked(text, n_bytes)


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value), type(value).__name__)


def _json(line: bytes, encoding: str) -> Any:
    text = _read_as(line.lstrip(_RECORD_SEPARATOR), encoding)
    if isinstance(text, Damage):
        return text
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        hint = "; name a file of records over several lines .json" if line.strip() in (b"{", b"[") else ""
        if re.search(rb"}\s*\r\s*{", line):
            hint = _ONLY_CR
        return Damage(f"not JSON: {error}{hint}", n_bytes=len(line))


def json_lines(numbered: Numbered, stop: int, encoding: str) -> Values:
    """One value per line, for the lines that begin before ``stop``; blank lines are skipped."""
    for offset, line in numbered:
        if offset >= stop:
            return
        if isinstance(line, Damage):
            # The file may be truncated between a record and its line end; then that record is good.
            rest = _json(line.rest, encoding)
            if isinstance(rest, dict):
                yield offset, rest, len(line.rest)
            yield offset, line, 0
        elif not is_blank(line.lstrip(_RECORD_SEPARATOR)):
            yield offset, _json(line, encoding), len(line)


def json_file(pieces: Iterable[bytes | Damage], encoding: str) -> Values:
    """A ``.json`` file: one record per line (as in some corpora), an array, or objects over several lines.

    In the latter two a syntax error ends the file: everything before it is kept, the rest is one bad record.
    """
    iterator = iter(pieces)
    head: list[bytes | Damage] = []
    visible: list[bytes] = []  # the first three lines of the file that are not blank
    numbered = lines(_recorded(iterator, head))
    for _, line in numbered:
        if isinstance(line, Damage) or len(visible) == 3:
            break
        if not is_blank(line):
            visible.append(line)
    again = itertools.chain(head, iterator)
    if _are_records(visible, encoding):
        return json_lines(lines(again), 2**63, encoding)
    return _json_values(again, encoding, next((piece for piece in head if isinstance(piece, bytes)), b""))


def _are_records(visible: list[bytes], encoding: str) -> bool:
    """Whether each of these first lines of a file is a record (JSON Lines); the first may be broken."""
    first = visible[0].removeprefix(codecs.BOM_UTF8).lstrip(_RECORD_SEPARATOR) if visible else b""
    if not first.lstrip().startswith(b"{"):
        return False
    whole = [isinstance(_json(line, encoding), dict) for line in visible]
    if whole[0] or not any(whole[1:2]):
        return whole[0]
    # Either a broken record before a good one, or an object over several lines of which one is itself an object. The lines
    # of such an object can be parsed together; a broken record and its successors cannot.
    text = b"\n".join(visible).decode(encoding, SURROGATE).removeprefix("\ufeff").rstrip()
    try:
        _DECODER.raw_decode(text.lstrip())
    except json.JSONDecodeError as error:
        return error.pos < len(error.doc) or len(visible) < 3
    except (ValueError, RecursionError):
        return True
    return False


def _recorded(pieces: Iterator[bytes | Damage], into: list[bytes | Damage]) -> Iterator[bytes | Damage]:
    for piece in pieces:
        into.append(piece)
        yield piece


_BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")


class _Text:
    """The decoded text of a file from the current value on; more is read when needed."""

    def __init__(self, pieces: Iterable[bytes | Damage], encoding: str) -> None:
        self.text, self.at, self.offset = "", 0, 0
        self.damage: Damage | None = None
        self._pieces = iter(pieces)
        self._decoder = codecs.getincrementaldecoder(encoding)(SURROGATE)
        self._ended = False

    def take(self, end: int) -> int:
        """Advance to the character ``end``. Returns the number of bytes in between."""
        taken = self.text[self.at : end]
        n_bytes = len(taken) if taken.isascii() else len(taken.encode("utf-8", "surrogatepass"))
        self.at, self.offset = end, self.offset + n_bytes
        return n_bytes

    def more(self) -> bool:
        """Read more, about doubling the text. Returns false at the end of the file and for a value above the limit."""
        kept = self.text[self.at :]
        if self._ended or len(kept) > MAX_DOCUMENT_BYTES:
            return False
        read, size = [kept], 0
        while not self._ended and size <= len(kept):
            piece = next(self._pieces, None)
            if piece is None or isinstance(piece, Damage):
                self.damage, self._ended = piece, True
                read.append(self._decoder.decode(b"", final=True))
            else:
                read.append(self._decoder.decode(piece))
            size += len(read[-1])
        self.text, self.at = "".join(read), 0
        return size > 0


def _json_values(pieces: Iterable[bytes | Damage], encoding: str, head: bytes) -> Values:
    """The values one by one, with any commas and brackets between them; memory grows only with the largest value.

    ``head`` is the beginning of the file, from which another encoding is recognized if a value cannot be read.
    """
    source = _Text(pieces, encoding)
    depth = 0
    while True:
        between = _BETWEEN.match(source.text, source.at)
        assert between is not None  # the expression matches the empty string
        depth += between.group().count("[") - between.group().count("]")
        source.take(between.end())
        if source.at == len(source.text):
            if source.more():
                continue
            break
        try:
            value, end = _DECODER.raw_decode(source.text, source.at)
        except (ValueError, RecursionError) as error:
            if not isinstance(error, RecursionError) and source.more():
                continue
            if source.damage is not None:
                break
            reason: Any = error.msg if isinstance(error, json.JSONDecodeError) else error
            if len(source.text) - source.at > MAX_DOCUMENT_BYTES:
                reason = f"a value of more than {MAX_DOCUMENT_BYTES:,} bytes, or {reason}"
            begin, lost = source.offset, source.take(len(source.text))
            while source.more():
                lost += source.take(len(source.text))
            said = _not_encoded(head, encoding, "").reason if _other_encoding(head) else f"not JSON: {reason}"
            yield begin, Damage(said, n_bytes=lost, at_least=True), 0
            return
        if end == len(source.text) and source.more():
            continue  # a number may continue
        begin = source.offset
        yield begin, value, source.take(end)
    if source.damage is not None:
        pending = len(source.text) - source.at
        yield source.offset, replace(source.damage, n_bytes=source.damage.n_bytes + pending), 0
    elif depth > 0:
        yield source.offset, Damage("the array is not closed: the file is cut off", at_least=True), 0


# ---- CSV ----


_SEPARATORS = {"csv": ",", "tsv": "\t"}


class _CsvLines:
    """The lines of a file for ``csv.reader``; keeps track of where the current row began."""

    def __init__(self, numbered: Numbered, encoding: str) -> None:
        self._numbered, self._encoding = iter(numbered), encoding
        self.damage: tuple[int, Damage] | None = None
        self.start_row()

    def start_row(self) -> None:
        self.begin: int | None = None
        self.first_line = b""
        self.n_lines = self.n_bytes = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        if self.damage is not None:
            raise StopIteration
        offset, line = next(self._numbered)
        if self.begin is None:
            self.begin = offset
        if isinstance(line, Damage):
            self.damage = offset, line
            raise StopIteration
        self.first_line = self.first_line or line
        self.n_lines += 1
        self.n_bytes += len(line) + 1
        text = line.decode(self._encoding, SURROGATE)
        # Remove a byte order mark here, because csv would take a quote after it as part of the text.
        return (text if offset else text.removeprefix("\ufeff")) + "\n"


def csv_records(
    numbered: Numbered, encoding: str, kind: str
) -> Iterator[tuple[int, list[str] | Damage, int]]:
    """(offset, cells, bytes) of each row, by the rules of Python's csv module (strict).

    A stray quote makes all lines up to the next quote one bad record.
    """
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    source = _CsvLines(numbered, encoding)
    reader = csv.reader(source, delimiter=_SEPARATORS[kind], strict=True)
    while True:
        source.start_row()
        row: list[str] | Damage
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if source.damage is not None:
                break  # caused by the damage, which is yielded below
            # csv's own message says how to open the file in Python
            is_cr = str(error).startswith("new-line character")
            reason = f"not CSV: a carriage return outside quotes{_ONLY_CR}" if is_cr else f"not CSV: {error}"
            row = Damage(reason, n_bytes=source.n_bytes, at_least=is_cr or source.n_lines > 1)
            if _wide_encoding(source.first_line):  # the file has another encoding, in which it may be CSV
                row = replace(row, reason=_not_encoded(source.first_line, encoding, "").reason)
        else:
            if len(row) < 2 and not "".join(row).strip():
                continue  # a blank line
            content = "".join(row)
            zeros = "\0" in content and _wide_encoding(source.first_line)
            if "\udc80" in content or zeros or _iso_2022(content):
                row = replace(_not_encoded(source.first_line, encoding, ""), n_bytes=source.n_bytes)
        yield source.begin or 0, row, source.n_bytes
    if source.damage is not None:
        yield (*source.damage, 0)


def csv_rows(numbered: Numbered, encoding: str, field: str, kind: str) -> Texts:
    """The column ``field`` of a CSV or TSV file with a header; a row may span lines inside quotes."""
    header: list[str] | None = None
    for offset, row, n_bytes in csv_records(numbered, encoding, kind):
        if isinstance(row, Damage):
            yield offset, row
            header = [] if header is None else header  # so that the next row is not taken for the header
        elif header is None:
            header = row
        elif not header:
            yield offset, Damage("the header of the file cannot be read", n_bytes=n_bytes)
        elif len(row) != len(header):
            reason = f"{amount(len(row), 'column')} where the header has {len(header)}"
            yield offset, Damage(reason, n_bytes=n_bytes)
        elif field not in header:
            names = ", ".join(map(repr, header[:8]))
            hint = wrong_separator(header, kind)
            reason = f"no column {field!r} (the header has {names}{f'; {hint}' if hint else ''})"
            yield offset, Damage(reason, n_bytes=n_bytes)
        elif header.count(field) > 1:
            yield offset, Damage(several_columns(header, field), n_bytes=n_bytes)
        else:
            yield offset, checked(row[header.index(field)], n_bytes)


def several_columns(names: list[str], field: str) -> str:
    """The error message if several columns have the name of the text field."""
    return f"{names.count(field)} columns are called {field!r}: rename all but the one that holds the text"


def wrong_separator(header: list[str], kind: str) -> str:
    """What to do if the columns of a CSV or TSV file appear to be separated by another character; empty if they do not.

    A spreadsheet writes semicolons where a comma separates decimals."""
    if header[0].startswith("sep=") and kind in _SEPARATORS:
        return (
            "remove its first line, which is not the header but a note of a spreadsheet about the separator"
        )
    if kind not in _SEPARATORS or len(header) != 1:
        return ""
    found = next((one for one in ";\t|," if one in header[0]), None)
    if found is None:
        return ""
    right = next((other for other, separator in _SEPARATORS.items() if separator == found), None)
    if right is not None:
        return f"its columns are separated as in a .{right} file: give it a name that ends in .{right}"
    return f"its columns are separated by {found!r}, not by a comma: write it with commas, or as JSON lines"


# ---- parquet ----


def parquet_ranges(path: str, part_bytes: int) -> list[tuple[int, int, int]] | None:
    """Ranges of row groups (start, stop, bytes) of about ``part_bytes``; ``None`` if the footer cannot be read."""
    import pyarrow as arrow  # takes 0.2 s; imported only if a parquet file is read
    import pyarrow.parquet

    try:
        with open_file(path) as file:
            metadata = arrow.parquet.read_metadata(file)
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    except (arrow.ArrowException, OSError, ValueError):
        return None
    result = []
    start = n_bytes = 0
    for group, size in enumerate(sizes):
        n_bytes += size
        if n_bytes >= part_bytes or group == len(sizes) - 1:
            result.append((start, group + 1, n_bytes))
            start, n_bytes = group + 1, 0
    return result


def parquet(file: IO[bytes], field: str, encoding: str, start: int, stop: int, size: int) -> Texts:
    """The rows of row groups ``[start, stop)``; in a damaged row group the rows from the damage on are lost.

    Args:
        encoding: of a column of bytes; a column of strings is UTF-8 by the format.
        size: bytes of the file, which are reported as lost if its footer cannot be read.
    """
    import pyarrow as arrow
    import pyarrow.parquet

    # OSError is raised by pyarrow for damaged pages and by the disk; both give a bad record here.
    errors = (arrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError)
    try:
        opened = arrow.parquet.ParquetFile(file, page_checksum_verification=True)
        metadata = opened.metadata
        groups = range(start, stop if stop >= 0 else metadata.num_row_groups)
        counts = [metadata.row_group(group).num_rows for group in groups]
        # Sizes over all columns: reading that of one column crashes if its metadata are damaged (pyarrow 26).
        sizes = [metadata.row_group(group).total_byte_size for group in groups]
        row = sum(metadata.row_group(group).num_rows for group in range(start))
        names = opened.schema_arrow.names
    except errors as error:
        reason = f"not a parquet file, or its footer is damaged: {error}"
        yield 0, Damage(reason, n_bytes=size, at_least=True)
        return
    wrong = None
    if field not in names:
        wrong = f"no column {field!r} (it has {', '.join(map(repr, names[:8]))})"
    elif names.count(field) > 1:
        wrong = several_columns(names, field)
    else:
        stored = opened.schema_arrow.field(names.index(field)).type
        kind, is_bytes = _bytes_type(stored)
        if kind is None:
            wrong = f"column {field!r} must hold strings, not {stored}"
    if wrong is not None:
        for rows, n_bytes in zip(counts, sizes):  # by row group: independent of the parts
            if rows:
                yield row, Damage(wrong, documents=rows, n_bytes=n_bytes)
            row += rows
        return
    for group, rows, n_bytes in zip(groups, counts, sizes):
        done = 0
        try:
            for batch in opened.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[field]):
                column = batch.column(0)
                if isinstance(column, arrow.ExtensionArray):
                    column = column.storage
                if arrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # As bytes, so that one invalid string does not lose the whole batch.
                for value in column.cast(kind).to_pylist():
                    if value is None:
                        yield row + done, Damage(f"column {field!r} is null")
                    elif is_bytes:
                        yield row + done, _read_as(value, encoding)
                    else:
                        yield row + done, _string(value)
                    done += 1
        except errors as error:
            lost = rows - done
            yield (
                row + done,
                Damage(
                    f"row group {group} is damaged, {lost:,} of its {rows:,} rows are lost: {error}",
                    documents=max(lost, 1),
                    n_bytes=n_bytes * lost // max(rows, 1),
                ),
            )
        row += rows


def _string(value: bytes) -> str | Damage:
    try:
        return checked(value.decode("utf-8"), len(value))
    except UnicodeDecodeError as error:
        reason = (
            f"not utf-8 at its byte {error.start}, as a column of strings must be: write it as a column of bytes "
            "(binary), which is read as data.encoding says"
        )
        return Damage(reason, n_bytes=len(value))


def _bytes_type(kind: Any) -> tuple[Any, bool]:
    """The binary type as which a column of text is read (``None`` if the column holds something else), and whether the column
    is binary itself."""
    import pyarrow as arrow

    types = arrow.types
    if isinstance(kind, arrow.BaseExtensionType):
        kind = kind.storage_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_large_string(kind) or types.is_large_binary(kind):
        return arrow.large_binary(), types.is_large_binary(kind)
    if types.is_string(kind) or types.is_null(kind) or kind == arrow.string_view():
        return arrow.binary(), False
    is_bytes = types.is_binary(kind) or types.is_fixed_size_binary(kind) or kind == arrow.binary_view()
    return (arrow.binary() if is_bytes else None), is_bytes


# ---- field names ----


def field_names(path: str, kind: str, encoding: str) -> list[str]:
    """The field names in the first 100 records of a file, in order; empty if no record can be read."""
    if kind == "parquet":
        import pyarrow as arrow
        import pyarrow.parquet

        try:
            with open_file(path) as file:
                return list(arrow.parquet.read_schema(file).names)
        except (arrow.ArrowException, OSError, ValueError):
            return []
    with open_file(path) as file:
        pieces, encoding = as_lines_of_bytes(chunks(file, compression_of(path)), encoding)
        if kind in ("csv", "tsv"):
            row = next((row for _, row, _ in csv_records(lines(pieces), encoding, kind)), None)
            return row if isinstance(row, list) else []
        values = json_file(pieces, encoding) if kind == "json" else json_lines(lines(pieces), 2**63, encoding)
        records = [value for _, value, _ in itertools.islice(values, 100) if isinstance(value, dict)]
    return list(dict.fromkeys(name for record in records for name in record))
