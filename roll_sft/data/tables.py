"""Parquet and Arrow files -> the value of each row, and the ranges of them that can be read alone.

A table has no lines: the place of a row is its number in the file, from 1. Batches are read one
after the other; memory holds one, and of Parquet the column chunks of one row group.

In a table every struct has every field, null where a row did not set it: null fields are left out,
at any depth, since nothing tells them from absent ones.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from roll_sft.data.conversation import BadRow
from roll_sft.data.rows import RawRow
from roll_sft.errors import DataError, first_line

_ROWS_PER_BATCH = 256
_ARROW_FILE_MAGIC = b"ARROW1"


def table_parts(file: BinaryIO, *, kind: str, name: str) -> Iterator[tuple[int, int]]:
    """Yield rows and bytes of each row group of Parquet, or record batch of Arrow."""
    with _readable(name):
        if kind == "parquet":
            facts = pq.ParquetFile(file).metadata
            for index in range(facts.num_row_groups):
                group = facts.row_group(index)
                yield group.num_rows, group.total_byte_size
        else:
            for batch in _record_batches(file):
                yield batch.num_rows, batch.nbytes


def table_rows(
    file: BinaryIO, *, kind: str, name: str, parts: range, first_row: int
) -> Iterator[RawRow | BadRow]:
    """Read the rows of `parts`, the first of which is row `first_row` of the file, from 1."""
    with _readable(name):
        row = 0
        for batch in _batches(file, kind=kind, parts=parts):
            is_nested = any(pa.types.is_nested(field.type) for field in batch.schema)
            for value in _values(batch):
                line = first_row + row
                if isinstance(value, str):
                    yield BadRow(row=row, line=line, reason=value)
                else:
                    yield RawRow(_without_nulls(value) if is_nested else value, row=row, line=line)
                row += 1


def _batches(file: BinaryIO, *, kind: str, parts: range) -> Iterator[pa.RecordBatch]:
    if kind == "parquet":
        table = pq.ParquetFile(file, pre_buffer=False)
        for part in parts:  # one at a time: those that are asked for together are held together
            yield from table.iter_batches(_ROWS_PER_BATCH, row_groups=[part])
        return
    for batch in itertools.islice(_record_batches(file), parts.start, parts.stop):
        for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
            yield batch.slice(start, _ROWS_PER_BATCH)


def _record_batches(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    magic = file.read(len(_ARROW_FILE_MAGIC))
    file.seek(0)
    if magic == _ARROW_FILE_MAGIC:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from pa.ipc.open_stream(file)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, object] | str]:
    """Yield each row, or why it has no value."""
    names = batch.schema.names
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise pa.ArrowInvalid(f"it has the column '{repeated}' twice")
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:  # raised before the first row is given
        pass
    for index in range(batch.num_rows):
        try:
            yield from batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield f"byte 0x{byte:02x} of a text is not UTF-8; write the file again as UTF-8"


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {
            name: _without_nulls(content) for name, content in value.items() if content is not None
        }
    if isinstance(value, list):
        return [_without_nulls(content) for content in value]
    return value


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{name}: cannot be read as a table ({first_line(error)}); write the file again"
        ) from error
