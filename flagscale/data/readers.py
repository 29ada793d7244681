"""Rows of a file, one after the other, never all in memory, each with its place.

What cannot be read of a row is a value (`BadRow`) as the row is, so that the next ones still come.
The `datasets` library has readers too, which cannot say what they did not read: docs/decisions.md.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from flagscale.data.files import File
from flagscale.data.rows import BadRow, Column, Row
from flagscale.errors import UserError

_ROWS_A_BATCH = 256
_NOT_UTF8 = "not UTF-8 text{}; convert it, or set data.format"
_ESCAPED = re.compile("[\udc80-\udcff]")  # what `_as_text` makes of bytes that are not UTF-8


def text(file: File, column: Column, passage: int) -> Iterator[Row]:
    """A file as one row, or, if longer than `passage` characters, as several.

    It is cut at the first blank line after `passage` characters, at the first line end after twice
    that, or within a line longer than that.
    """
    with file.open() as raw, _as_text(raw) as stream:
        parts: list[str] = []
        size = number = 0
        while line := stream.readline(passage):
            parts.append(line)
            size += len(line)
            if size >= 2 * passage or (size >= passage and line == "\n"):
                number += 1
                yield _decoded(f"{file.path}#{number}", {column.field: "".join(parts)})
                parts, size = [], 0
        if parts:
            where = f"{file.path}#{number + 1}" if number else file.path
            yield _decoded(where, {column.field: "".join(parts)})


def _jsonl(file: File, column: Column) -> Iterator[Row]:
    with file.open() as stream:
        for number, line in enumerate(stream, 1):
            if content := line.strip():
                where = f"{file.path}:{number}"
                yield Row(where, _object(content, where))


def _object(line: bytes, where: str) -> dict[str, Any] | BadRow:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(where, f"not valid JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError:
        return BadRow(where, _NOT_UTF8.format(""))
    except RecursionError:
        return BadRow(where, "not readable JSON: it is nested too deeply")
    except ValueError as error:  # a number of more digits than Python reads
        return BadRow(where, f"not readable JSON: {str(error)[:100]}")
    if isinstance(values, dict):
        return values
    return BadRow(where, f"must be an object, found {type(values).__name__} {str(values)[:40]!r}")


def _csv(file: File, column: Column, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # else 128 KiB a document
    with file.open() as raw, _as_text(raw, newline="") as stream:
        table = csv.reader(stream, delimiter=delimiter, strict=True)
        names = next(table, [])
        wanted = column.among(names)
        if not wanted or any(names.count(name) > 1 for name in wanted):
            raise UserError(f"{file.path}: {column.missing(names)}")
        while True:
            where = f"{file.path}:{table.line_num + 1}"
            try:
                values = next(table)
            except StopIteration:
                return
            except csv.Error as error:  # a quote too many: what follows may be inside or outside
                raise UserError(f"{where}: not valid CSV: {error}") from error
            if len(values) == len(names):
                yield _decoded(where, dict(zip(names, values, strict=True)))
            elif values:  # else a blank line
                wrong = f"{len(values)} values for {len(names)} columns"
                yield Row(where, BadRow(where, wrong))


def _as_text(raw: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    """Bytes that are not UTF-8 become half characters, so that what is around them is read."""
    return io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline=newline)


def _decoded(where: str, values: dict[str, Any]) -> Row:
    found = next(filter(None, map(_ESCAPED.search, values.values())), None)
    if found is None:
        return Row(where, values)
    return Row(where, BadRow(where, _NOT_UTF8.format(f" (byte 0x{ord(found[0]) - 0xDC00:02x})")))


def _parquet(file: File, column: Column) -> Iterator[Row]:
    import pyarrow.parquet as pq  # half a second: no other format needs it

    with file.open(packed=True) as stream:
        table = pq.ParquetFile(stream)
        names = table.schema_arrow.names
        batches = table.iter_batches(_ROWS_A_BATCH, columns=column.among(names))
        yield from _columnar(file, column, names, batches)


def _arrow(file: File, column: Column) -> Iterator[Row]:
    import pyarrow as pa

    with file.open() as stream:
        try:
            table = pa.ipc.open_stream(stream)
            batches = iter(table)
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(stream)
            batches = map(table.get_batch, range(table.num_record_batches))
        yield from _columnar(file, column, table.schema.names, batches)


def _columnar(
    file: File,
    column: Column,
    names: list[str],
    batches: Iterator[Any],  # pyarrow.RecordBatch
) -> Iterator[Row]:
    wanted = column.among(names)
    if not wanted:
        raise UserError(f"{file.path}: {column.missing(names)}")
    number = 0
    for batch in batches:
        batch = batch.select(wanted)
        decode = _feature_decoder(batch.schema)
        for row in zip(*batch.columns, strict=True):
            number += 1
            where = f"{file.path}: row {number}"
            try:
                values = {name: v.as_py() for name, v in zip(wanted, row, strict=True)}
            except UnicodeDecodeError:
                yield Row(where, BadRow(where, _NOT_UTF8.format("")))
            else:
                yield Row(where, decode(values))


def _feature_decoder(schema: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:  # noqa: ANN401
    """For columns that the `datasets` library has written in a form of its own: JSON as text."""
    if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
        return lambda values: values
    from datasets import Features  # takes a second, and pandas

    decode: Callable[[dict[str, Any]], dict[str, Any]] = Features.from_arrow_schema(
        schema
    ).decode_example
    return decode


STRUCTURED: dict[str, Callable[[File, Column], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
    "arrow": _arrow,
}
