"""Parquet and Arrow files -> the value of each row, and the ranges of them that can be read alone.

A table has no lines: the place of a row is its number in the file, from 1. Batches are read one
after the other; memory holds one, and of Parquet the column chunks of one row group.

Only the columns that a row can need are read; any other is a `NoJson` that says its type, so that
its name is known and its values cost nothing. A range of a file is found without what precedes it.
"""

import functools
import hashlib
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from roll_sft.base.errors import DataError, first_line
from roll_sft.data.rows.arrow_stream import stream_batches, stream_messages
from roll_sft.data.rows.checks import BadRowError, NoJson
from roll_sft.data.rows.columns import USES, ColumnKeys, column_plan
from roll_sft.data.rows.conversation import BadRow
from roll_sft.data.rows.files import opened
from roll_sft.data.rows.json_rows import RawRow
from roll_sft.data.rows.shards import Shard, hashed
from roll_sft.data.rows.table_values import values_of

_ROWS_PER_BATCH = 256
_ARROW_FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True, slots=True)
class TablePart:
    """Row groups of Parquet, or record batches of Arrow, that follow each other.

    They are `start:stop` of the file, in row groups, batches, or the bytes of a stream.
    """

    start: int
    stop: int
    num_rows: int
    num_bytes: int


def table_shards(
    name: str, *, kind: Literal["parquet", "arrow"], shard_bytes: int
) -> Iterator[Shard]:
    """Yield the shards of a table that `find_files` named, in order."""
    file_hash, _ = hashed(name, digest=hashlib.sha256(kind.encode()))
    with opened(name) as file:
        parts = table_parts(file, kind=kind, name=name, part_bytes=shard_bytes)
    first_row = 1
    for part in parts:
        content_hash = hashlib.sha256(f"{file_hash}:{part.start}:{part.stop}".encode()).hexdigest()
        yield Shard(name, kind, part.start, part.stop, first_row, content_hash)
        first_row += part.num_rows


def table_parts(file: BinaryIO, *, kind: str, name: str, part_bytes: int) -> list[TablePart]:
    """Cut a table into parts of at most `part_bytes`, or of one group or batch that is larger.

    Raises `DataError` for a table that cannot be read, or has no rows.
    """
    parts: list[TablePart] = []
    with _readable(name):
        for each in _smallest_parts(file, kind=kind):
            if parts and parts[-1].num_bytes + each.num_bytes <= part_bytes:
                last = parts.pop()
                each = TablePart(
                    last.start,
                    each.stop,
                    last.num_rows + each.num_rows,
                    last.num_bytes + each.num_bytes,
                )
            parts.append(each)
    if not any(part.num_rows for part in parts):
        raise DataError(f"{name}: the table is empty; it must hold at least one row")
    return parts


def _smallest_parts(file: BinaryIO, *, kind: str) -> Iterator[TablePart]:
    if kind == "parquet":
        facts = pq.ParquetFile(file).metadata
        for index in range(facts.num_row_groups):
            group = facts.row_group(index)
            yield TablePart(index, index + 1, group.num_rows, group.total_byte_size)
    elif _is_arrow_file(file):
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            # Not `nbytes`, which follows offsets that nobody has checked yet.
            num_bytes = batch.get_total_buffer_size()
            yield TablePart(index, index + 1, batch.num_rows, num_bytes)
    else:
        for message in stream_messages(file):
            if message.num_rows is not None:
                num_bytes = message.stop - message.start
                yield TablePart(message.start, message.stop, message.num_rows, num_bytes)


def table_rows(
    file: BinaryIO,
    *,
    kind: str,
    name: str,
    part: range,
    first_row: int,
    keys: ColumnKeys,
) -> Iterator[RawRow | BadRow]:
    """Read the rows of `part`, one or more parts; the first is row `first_row` of the file, from 1.

    Of columns that no format needs under `keys` the value is a `NoJson`.
    """
    with _readable(name):
        row, wanted = 0, _wanted_columns(keys)
        for batch in _batches(file, kind=kind, part=part, wanted=wanted):
            for value in _values(batch):
                line = first_row + row
                if isinstance(value, str):
                    yield BadRow(row=row, line=line, reason=value)
                else:
                    yield RawRow(value, row=row, line=line)
                row += 1


@functools.cache
def _wanted_columns(keys: ColumnKeys) -> frozenset[str]:
    """Every column that rows of some format need; of a table, no other is read."""
    plans = [column_plan(row_format, keys) for row_format in USES]
    return frozenset(keys.all_named()).union(*(plan.known for plan in plans))


_Batch = tuple[pa.RecordBatch, dict[str, object]]
"""Some rows with the columns that are read, and what stands for each other column."""


def _batches(file: BinaryIO, *, kind: str, part: range, wanted: Set[str]) -> Iterator[_Batch]:
    if kind == "parquet":
        table = pq.ParquetFile(file, pre_buffer=False)
        names, others = _chosen(table.schema_arrow, wanted)
        for group in part:  # one at a time: those that are asked for together are held together
            for batch in table.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=names):
                yield batch.select(names), others
        return
    for batch in _record_batches(file, part):
        names, others = _chosen(batch.schema, wanted)
        chosen = batch.select(names)
        for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
            yield chosen.slice(start, _ROWS_PER_BATCH), others


def _chosen(schema: pa.Schema, wanted: Set[str]) -> tuple[list[str], dict[str, object]]:
    """The names of the columns to read, at least one, and what stands for the others."""
    names = schema.names
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise pa.ArrowInvalid(f"it has the column '{repeated}' twice")
    chosen = [name for name in names if name in wanted] or names[:1]
    others: dict[str, object] = {
        field.name: NoJson(str(field.type))
        for field in schema
        if field.name not in chosen and not pa.types.is_null(field.type)
    }
    return chosen, others


def _record_batches(file: BinaryIO, part: range) -> Iterator[pa.RecordBatch]:
    if _is_arrow_file(file):
        reader = pa.ipc.open_file(file)
        for index in part:
            yield reader.get_batch(index)
    else:
        yield from stream_batches(file, part)


def _is_arrow_file(file: BinaryIO) -> bool:
    magic = file.read(len(_ARROW_FILE_MAGIC))
    file.seek(0)
    return magic == _ARROW_FILE_MAGIC


def _values(batch: _Batch) -> Iterator[dict[str, object] | str]:
    """Yield each row, or why it has no value."""
    for column in batch[0].columns:
        _check_places(column)
    try:
        yield from _objects(batch)
        return
    except (UnicodeDecodeError, BadRowError):  # raised before the first row is given
        pass
    rows, others = batch
    for index in range(rows.num_rows):
        try:
            yield from _objects((rows.slice(index, 1), others))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield f"byte 0x{byte:02x} of a text is not UTF-8; write the file again as UTF-8"
        except BadRowError as error:
            yield str(error)


def _check_places(column: pa.Array) -> None:
    """Raise `ArrowInvalid` where a damaged table places values outside of its own memory."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):  # which is told of each row by itself
            raise


def _objects(batch: _Batch) -> list[dict[str, object]]:
    rows, others = batch
    names = rows.schema.names
    columns = [
        values_of(column, where=f"column '{name}'")
        for name, column in zip(names, rows.columns, strict=True)
    ]
    found = zip(*columns, strict=True) if columns else [()] * rows.num_rows
    return [{**dict(zip(names, row, strict=True)), **others} for row in found]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise DataError(
            f"{name}: cannot be read as a table ({first_line(error)}); write the file again"
        ) from error
