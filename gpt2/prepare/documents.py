"""Text read from files in units that workers take one by one.

A unit is a row group of a parquet file, or an equal slice of another file. Units are independent: the
tokens of a file are those of its units, one after the other, wherever they are read. A slice of JSON
lines owns the lines that begin in it. A plain-text file is one document; its slices are cut before a
space or a newline that follows something else, where GPT-2's pattern always cuts too.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt2.errors import UserError, first_line
from gpt2.tokens.fast_bpe import replace_surrogates

SLICE_BYTES = 1 << 22  # of JSON lines and plain text: about a million tokens
MAX_LINE_BYTES = 1 << 26  # a line is a document; the longest book has a tenth of it
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
_BATCH_ROWS = 1000  # rows of a parquet file that are text in memory at one time


class Document(NamedTuple):
    """A document, or the next slice of one that is plain text.

    Attributes:
        text: "" for a null or empty document.
        begins: False for a slice that continues the document before it.
        replaced: the text had invalid UTF-8, now U+FFFD.
    """

    text: str
    begins: bool = True
    replaced: bool = False


class Contents(NamedTuple):
    """What an uncompressed file holds.

    Attributes:
        units: pieces that workers read one by one.
        documents: per unit, null and empty ones included, where the file's own index says so; None elsewhere.
    """

    units: int
    documents: tuple[int, ...] | None = None


def count_units(path: Path, kind: str, column: str = "text") -> Contents:
    """Units of an uncompressed file. UserError for a parquet file that is damaged or has no text."""
    if kind == "parquet":
        index = _open_parquet(path, column).metadata
        rows = tuple(index.row_group(group).num_rows for group in range(index.num_row_groups))
        if sum(rows) != index.num_rows:
            raise UserError(f"{path}: its row groups hold {sum(rows):,} rows, its index says {index.num_rows:,}")
        return Contents(len(rows), rows)
    return Contents(max(1, -(-path.stat().st_size // SLICE_BYTES)))


def count_documents(path: Path, kind: str, column: str = "text") -> int:
    """Documents of an uncompressed file, null and empty ones included."""
    if kind == "parquet":
        rows: int = _open_parquet(path, column).metadata.num_rows
        return rows
    if kind == "text":
        return 1
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def read_unit(path: Path, kind: str, unit: int, column: str = "text") -> Iterator[Document]:
    """Documents of one unit. UserError naming the place where the file is damaged."""
    if kind == "parquet":
        return _read_row_group(path, unit, column)
    return _read_lines(path, unit, column) if kind == "jsonl" else _read_text(path, unit)


_opened = threading.local()
"""The parquet file that each thread read last: an open file is never shared, for threads fetch files ahead."""


def _open_parquet(path: Path, column: str) -> Any:
    """An open parquet file, kept until its thread asks for another: its index may take long to parse."""
    if getattr(_opened, "key", None) != (path, column):
        _opened.key = None
        _opened.file = _check_parquet(path, column)
        _opened.key = path, column
    return _opened.file


def _check_parquet(path: Path, column: str) -> Any:
    """Open a parquet file. UserError where it is damaged or has not one column of texts."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({first_line(error)})") from error
    names = file.schema_arrow.names
    if column not in names:
        raise UserError(f"{path}: no column '{column}', only {', '.join(names)}; --text-column chooses one")
    if names.count(column) > 1:
        raise UserError(f"{path}: {names.count(column)} columns are named '{column}'; rename all but one")
    kind = file.schema_arrow.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in _TEXT_TYPES:
        raise UserError(f"{path}: column '{column}' is of type {kind}, not string")
    return file


def parquet_text_bytes(path: Path, column: str) -> int:
    """Uncompressed size of the column of texts, as the file's index has it."""
    file = _open_parquet(path, column)
    leaf = [file.schema.column(i).path for i in range(len(file.schema))].index(column)  # leaves, unlike names
    groups = (file.metadata.row_group(g) for g in range(file.metadata.num_row_groups))
    return sum(group.column(leaf).total_uncompressed_size for group in groups)


def _read_row_group(path: Path, unit: int, name: str) -> Iterator[Document]:
    import pyarrow

    batches = _open_parquet(path, name).iter_batches(_BATCH_ROWS, row_groups=[unit], columns=[name], use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: row group {unit} is damaged ({first_line(error)})") from error
        if batch is None:
            return
        column = batch.column(0)
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:
            texts = column.cast(pyarrow.binary()).to_pylist()
        for text in texts:
            yield _decode(text) if isinstance(text, bytes) else Document(text or "")


def _read_lines(path: Path, unit: int, column: str) -> Iterator[Document]:
    start = unit * SLICE_BYTES
    with open(path, "rb") as file:
        position = start
        if start:
            file.seek(start - 1)
            rest = file.readline(SLICE_BYTES)  # the line before owns what is left of it
            if not rest.endswith(b"\n"):
                return  # no line begins in this slice; to look for its end would make a long line's time quadratic
            position = start - 1 + len(rest)
        while position < start + SLICE_BYTES and (line := file.readline(MAX_LINE_BYTES + 1)):
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}: the line at byte {position:,} has more than {MAX_LINE_BYTES:,} bytes; split it"
                )
            if position == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse_line(path, position, line, column)
            position += len(line)


def _parse_line(path: Path, position: int, line: bytes, column: str) -> Document:
    decoded = _decode(line)
    try:
        record = json.loads(decoded.text)
    except RecursionError as error:
        raise UserError(f"{path}: the line at byte {position:,} is nested too deeply to be read") from error
    except ValueError as error:
        raise UserError(f"{path}: the line at byte {position:,} is not JSON ({error})") from error
    if not isinstance(record, dict) or column not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path}: the line at byte {position:,} has no '{column}', only: {keys[:200]}")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{path}: '{column}' of the line at byte {position:,} is of type {type(text).__name__}, not a string"
        )
    text, replaced = text or "", decoded.replaced
    if "\\u" in decoded.text and not text.isascii():  # only an escape can spell half of a character
        whole = replace_surrogates(text)
        text, replaced = whole, replaced or whole != text
    return Document(text, replaced=replaced)


def _read_text(path: Path, unit: int) -> Iterator[Document]:
    with open(path, "rb") as file:
        start = _cut_after(file, unit * SLICE_BYTES, SLICE_BYTES)
        stop = _cut_after(file, (unit + 1) * SLICE_BYTES) if start < (unit + 1) * SLICE_BYTES else start
        file.seek(start)
        data = file.read(stop - start)
    if unit == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    if data or unit == 0:
        yield _decode(data)._replace(begins=unit == 0)


def _cut_after(file: Any, position: int, within: int | None = None) -> int:
    """First place from `position` on where plain text may be cut without changing its tokens.

    Args:
        file: open for reading.
        position: in bytes.
        within: where there is none in so many bytes, a later place is returned, whichever; None: look to the end.
    """
    size = os.fstat(file.fileno()).st_size
    last = size if within is None else position + within
    if position == 0 or position >= size:
        return min(position, size)
    file.seek(max(0, position - 4))  # the longest character, to see what is before the cut
    data = file.read(min(4, position))
    while position < last and (block := file.read(1 << 16)):
        old = len(data)
        data += block
        for match in re.compile(rb"[ \n]").finditer(data, old):
            at = match.start()
            before = data[max(0, at - 4) : at].decode("utf-8", errors="ignore")
            if before and not before[-1].isspace():
                return int(position + at - old)
        position += len(block)
        data = data[-4:]
    return max(position, last)


def _decode(data: bytes) -> Document:
    try:
        return Document(data.decode("utf-8"))
    except UnicodeDecodeError:
        return Document(data.decode("utf-8", errors="replace"), replaced=True)
