"""A file -> shards: its parts that are read, and tokenised, each by itself; and the rows of one.

How a file is cut:
- JSONL at the first line that begins at or after each multiple of `shard_bytes`. No cut moves when
  lines are appended: such a file differs in its last shard alone, and in new ones;
- Parquet between row groups and Arrow between record batches, as many as fit `shard_bytes`;
- a JSON array and a compressed file are one shard: nothing in them can be read by itself.

The samples of a shard follow from its `content_hash`, the columns the user named and the row format
it is held to. Its rows count from 0 within the shard. Lines are those of the file, so two shards of
equal content differ in `first_line` alone.

All rows of a file have one format: that of the first row that shows one (`file_format`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal

from roll_sft.base.errors import DataError
from roll_sft.data.rows.checks import BadRowError, NoAnswerError, listed, shown
from roll_sft.data.rows.columns import WEIGHT, ColumnKeys, RowFormat
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.files import compression_of, kind_of_file, opened
from roll_sft.data.rows.json_rows import (
    BYTE_ORDER_MARK,
    JSON_SPACE,
    TOO_DEEP,
    RawRow,
    bounded_lines,
    line_rows,
)
from roll_sft.data.rows.row_format import columns_of, format_of, sample_of

SHARD_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_PEEK_BYTES = 1 << 12
_REASON_LENGTH = 500

# A hostile file could have other names in each row.
MAX_NAMES = 100


@dataclass(frozen=True, slots=True)
class Shard:
    """The part `start:stop` of `file`.

    The part counts bytes of JSON or of an Arrow stream, row groups of Parquet, batches of an Arrow
    file. `first_line` is its first line in the file, from 1; in a table, its first row.
    `content_hash` is a SHA-256 of its bytes and of how they are read; in a table, of the whole file
    and the part.
    """

    file: str
    kind: Literal["lines", "array", "parquet", "arrow"]
    start: int
    stop: int
    first_line: int
    content_hash: str

    def place_of(self, line: int, row: int) -> str:
        """The place of a row in a message: `line` of the file, and `row` of the shard.

        All rows of an array can lie on one line, so they are counted too, from 1.
        """
        return f"{self.file}:{line}" + (f" (row {row + 1})" if self.kind == "array" else "")


def shards_of_file(name: str, *, shard_bytes: int = SHARD_BYTES) -> Iterator[Shard]:
    """Yield the shards of a file that `find_files` named, in order; reads each byte once.

    Raises `DataError` for a file that is empty or cannot be read.
    """
    kind = kind_of_file(name)
    assert kind is not None, f"{name}: find_files refuses other suffixes"
    if kind != "json":
        from roll_sft.data.rows.table_rows import table_shards

        yield from table_shards(name, kind=kind, shard_bytes=shard_bytes)
        return
    with opened(name) as file:
        first = _first_character(file)
    if not first:
        raise DataError(f"{name}: the file is empty; it must hold at least one row")
    if first != b"[" and compression_of(name) is None:
        yield from _line_shards(name, shard_bytes=shard_bytes)
        return
    form: Literal["array", "lines"] = "array" if first == b"[" else "lines"
    digest, num_bytes = hashed(name, digest=_digest(form, name=name, start=0))
    yield Shard(name, form, 0, num_bytes, 1, digest)


def file_format(shards: Iterable[Shard], keys: ColumnKeys) -> RowFormat | None:
    """The format of the rows of one file, all of whose `shards` are given; None if no row has one.

    Reads up to the first row that has one. Raises `DataError` as `ShardRows` does.
    """
    for shard in shards:
        rows = ShardRows(shard, keys)
        while rows.row_format is None and next(rows, None) is not None:
            pass
        if rows.row_format is not None:
            return rows.row_format
    return None


class ShardRows(Iterator[Conversation | Document | BadRow]):
    """The rows of a shard, in order, read once.

    `row_format`: the format that rows must have; None until a row has shown one.
    `used`: the optional columns among `keys` that rows had.
    Raises `DataError` for a file that cannot be read or that mixes formats.
    """

    def __init__(
        self, shard: Shard, keys: ColumnKeys, *, row_format: RowFormat | None = None
    ) -> None:
        self.row_format = row_format
        self.used: set[str] = set()
        self._left_aside: set[str] = set()
        self._optional = keys.optional()
        self._shard = shard
        self._keys = keys
        self._rows = _raw_rows(shard, keys)

    def __next__(self) -> Conversation | Document | BadRow:
        """Return the next row."""
        row = next(self._rows)
        if isinstance(row, BadRow):
            return _shortened(row)
        try:
            columns = columns_of(row.value, self._keys)
            sample = sample_of(
                columns,
                row_format=self._format_of(columns, row),
                keys=self._keys,
                place=(row.row, row.line),
                left_aside=self._left_aside,
            )
            if WEIGHT in columns:
                from roll_sft.data.rows.row_weight import weighted

                sample = weighted(sample, columns[WEIGHT])
        except (BadRowError, RecursionError) as error:
            is_empty = isinstance(error, NoAnswerError)
            reason = TOO_DEEP if isinstance(error, RecursionError) else str(error)
            return _shortened(BadRow(row.row, row.line, reason, is_empty=is_empty))
        if self._optional:
            self.used.update(self._optional.intersection(columns))
        if len(self._left_aside) > MAX_NAMES:
            self._left_aside = set(sorted(self._left_aside)[:MAX_NAMES])
        return sample

    @property
    def left_aside(self) -> set[str]:
        """Columns, and keys of messages, that samples are not made of; at most `MAX_NAMES`."""
        return set(map(shown, self._left_aside))

    def _format_of(self, columns: Mapping[str, object], row: RawRow) -> RowFormat:
        row_format = format_of(columns, self._keys)
        if row_format is None:  # an empty list of messages is of either format
            return "messages" if self.row_format in (None, "sharegpt") else self.row_format
        if self.row_format is None:
            self.row_format = row_format
        if row_format != self.row_format:
            reason = (
                f"the row has the {row_format} format and the file begins with the "
                f"{self.row_format} format (columns found: {listed(columns)}); put them into two "
                f"files"
            )
            place = self._shard.place_of(row.line, row.row)
            raise DataError(f"{place}: {shown(reason, length=_REASON_LENGTH)}")
        return row_format


def _shortened(row: BadRow) -> BadRow:
    """The row with a reason that fits one line of a log, whatever the file holds."""
    return replace(row, reason=shown(row.reason, length=_REASON_LENGTH))


def _first_character(file: BinaryIO) -> bytes:
    """Return the first byte after a byte order mark and spaces, or b"" if there is none."""
    chunk = file.read(_PEEK_BYTES).removeprefix(BYTE_ORDER_MARK)
    while chunk and not chunk.strip(JSON_SPACE):
        chunk = file.read(_PEEK_BYTES)
    return chunk.strip(JSON_SPACE)[:1]


def _digest(form: str, *, name: str, start: int) -> "hashlib._Hash":
    """A hash that holds how the bytes are read: a byte order mark counts at the start alone."""
    return hashlib.sha256(f"{form}:{compression_of(name)}:{start == 0}:".encode())


def hashed(name: str, *, digest: "hashlib._Hash") -> tuple[str, int]:
    """The hexadecimal hash of `digest` and the bytes of a file, and their number."""
    num_bytes = 0
    with opened(name, decompress=False) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return digest.hexdigest(), num_bytes


def _line_shards(name: str, *, shard_bytes: int) -> Iterator[Shard]:
    start, first_line = 0, 1
    with opened(name) as file:
        while True:
            digest, num_lines, stop = _digest("lines", name=name, start=start), 0, start
            # Up to the byte before the border: it ends a line if the next one begins at the border.
            border = (start // shard_bytes + 1) * shard_bytes
            for chunk in _chunks_to_line_end(file, num_bytes=border - 1 - start):
                digest.update(chunk)
                num_lines += chunk.count(b"\n")
                stop += len(chunk)
            if stop == start:
                return
            yield Shard(name, "lines", start, stop, first_line, digest.hexdigest())
            start, first_line = stop, first_line + num_lines


def _chunks_to_line_end(file: BinaryIO, *, num_bytes: int) -> Iterator[bytes]:
    """Yield the next `num_bytes` of `file`, and what follows up to the end of a line."""
    while num_bytes > 0 and (chunk := file.read(min(_CHUNK_BYTES, num_bytes))):
        num_bytes -= len(chunk)
        yield chunk
    while part := file.readline(_CHUNK_BYTES):
        yield part
        if part.endswith(b"\n"):
            return


def _raw_rows(shard: Shard, keys: ColumnKeys) -> Iterator[RawRow | BadRow]:
    with opened(shard.file) as file:
        if shard.kind in ("parquet", "arrow"):
            from roll_sft.data.rows.table_rows import table_rows

            part = range(shard.start, shard.stop)
            yield from table_rows(
                file,
                kind=shard.kind,
                name=shard.file,
                part=part,
                first_row=shard.first_line,
                keys=keys,
            )
        elif compression_of(shard.file) is None:
            file.seek(shard.start)
            yield from _json_rows(shard, file)
        else:
            from roll_sft.data.rows.compressed import whole_rows

            yield from whole_rows(_json_rows(shard, file), name=shard.file)


def _json_rows(shard: Shard, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    if shard.kind == "array":
        from roll_sft.data.rows.json_array import array_rows

        return array_rows(file, name=shard.file)
    is_whole = compression_of(shard.file) is not None
    num_bytes = None if is_whole else shard.stop - shard.start
    return line_rows(bounded_lines(file, num_bytes=num_bytes), first_line=shard.first_line)
