"""A source -> shards: the parts of its files that are read, and prepared, each by itself.

How a file is cut:
- JSONL at the first line that begins at or after each multiple of `shard_bytes`, so no cut moves
  when lines are appended: such a file differs in its last shard alone, and in new ones;
- Parquet between row groups, Arrow between record batches, as many as fit `shard_bytes`;
- a JSON array and a compressed file are one shard, since nothing can be read before what precedes.

What decides what a shard gives is its `content_hash`, the columns the user named and the shape it
is held to. Its rows count from 0 within the shard; lines are those of the file, so two shards of
equal content differ in the lines of their rows, by their `first_line`, and in nothing else.

All shards of a file have one shape: that of its first row that shows one (`file_shapes`). A shard
is read with that shape and refuses rows of another, whichever shard comes first or is read alone.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import BinaryIO, Literal

from roll_sft.base.errors import DataError, first_line
from roll_sft.data.rows.columns import ColumnKeys, Shape, wanted_columns
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.files import compression_of, find_files, kind_of_file, opened
from roll_sft.data.rows.json_rows import (
    BYTE_ORDER_MARK,
    JSON_SPACE,
    TOO_DEEP,
    RawRow,
    bounded_lines,
    line_rows,
)
from roll_sft.data.rows.row_format import columns_of, sample_of, shape_of
from roll_sft.data.rows.values import BadRowError, NoAnswerError, UnusableFileError, listed, shown

SHARD_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_PEEK_BYTES = 1 << 12
_REASON_LENGTH = 500

# A hostile file could have other names in each row.
MAX_NAMES = 100


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of `file`: bytes of JSON, row groups of Parquet, batches of Arrow, bytes of a stream.

    The part is `start:stop`, the whole file where it cannot be cut. `first_line` is the line of the
    file, from 1, where it begins; a table's rows stand for lines. `content_hash` is a SHA-256 of
    its bytes and of how they are read; of a table, of the bytes of the file and of the range.
    """

    file: str
    kind: Literal["lines", "array", "parquet", "arrow"]
    start: int
    stop: int
    first_line: int
    content_hash: str

    def place_of(self, line: int, row: int) -> str:
        """Where a row lies, as a message says it: `line` of the file, and `row` of the shard.

        All rows of an array can lie on one line, so they are counted too, from 1.
        """
        return f"{self.file}:{line}" + (f" (row {row + 1})" if self.kind == "array" else "")


def find_shards(
    path: str, *, split: str | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Shard]:
    """Return the shards of all files of `path`, in order; reads every byte once.

    Raises `DataError` if there is no such file, or one that is empty or cannot be read.
    """
    return [
        shard
        for name in find_files(path, split=split)
        for shard in shards_of_file(name, shard_bytes=shard_bytes)
    ]


def shards_of_file(name: str, *, shard_bytes: int = SHARD_BYTES) -> Iterator[Shard]:
    """Yield the shards of one file that `find_files` named, each when it has been read."""
    kind = kind_of_file(name)
    assert kind is not None, f"{name}: find_files refuses other suffixes"
    if kind != "json":
        yield from _table_shards(name, kind=kind, shard_bytes=shard_bytes)
        return
    with opened(name) as file:
        first = _first_character(file)
    if not first:
        raise DataError(f"{name}: the file is empty; it must hold at least one row")
    if first != b"[" and compression_of(name) is None:
        yield from _line_shards(name, shard_bytes=shard_bytes)
        return
    form: Literal["array", "lines"] = "array" if first == b"[" else "lines"
    digest, num_bytes = _hashed(name, digest=_digest(form, name=name, start=0))
    yield Shard(name, form, 0, num_bytes, 1, digest)


def file_shapes(shards: Iterable[Shard], keys: ColumnKeys) -> dict[str, Shape]:
    """Return the shape of each file, without those that have no row of any shape.

    Reads of each file up to its first row that has one. Raises `DataError` as `read_shard` does.
    """
    shapes: dict[str, Shape] = {}
    for file, parts in groupby(shards, key=lambda shard: shard.file):
        for part in parts:
            rows = read_shard(part, keys)
            while rows.shape is None and next(rows, None) is not None:
                pass
            if rows.shape is not None:
                shapes[file] = rows.shape
                break
    return shapes


def read_shard(shard: Shard, keys: ColumnKeys, *, shape: Shape | None = None) -> "ShardRows":
    """Read the rows of `shard` in order, each held to `shape`, or to that of the first without it.

    Raises `DataError` during the iteration for what makes the whole file unusable: it cannot be
    read, it mixes shapes, two columns could both be meant.
    """
    return ShardRows(shard, keys, shape)


class ShardRows(Iterator[Conversation | Document | BadRow]):
    """The rows of a shard, read once.

    `shape` is what they are held to, None before a row has shown one. `used` gathers the optional
    columns among `keys` that rows had: one that no row of a source has is worth a warning.
    """

    def __init__(self, shard: Shard, keys: ColumnKeys, shape: Shape | None) -> None:
        self.shape = shape
        self.used: set[str] = set()
        self._left_aside: set[str] = set()
        self._optional = keys.optional()
        self._shard = shard
        self._keys = keys
        self._rows = _raw_rows(shard, wanted=wanted_columns(keys))

    def __next__(self) -> Conversation | Document | BadRow:
        """Return the next row."""
        row = next(self._rows)
        if isinstance(row, BadRow):
            return _shortened(row)
        try:
            columns = columns_of(row.value, self._keys)
            shape = self._checked_shape(columns)
            sample = sample_of(
                columns,
                shape=shape,
                keys=self._keys,
                place=(row.row, row.line),
                left_aside=self._left_aside,
            )
        except (BadRowError, RecursionError) as error:
            is_empty = isinstance(error, NoAnswerError)
            reason = TOO_DEEP if isinstance(error, RecursionError) else str(error)
            return _shortened(BadRow(row.row, row.line, reason, is_empty=is_empty))
        except UnusableFileError as error:
            place, reason = self._shard.place_of(row.line, row.row), str(error)
            raise DataError(f"{place}: {shown(reason, length=_REASON_LENGTH)}") from None
        if self._optional:
            self.used.update(self._optional.intersection(columns))
        if len(self._left_aside) > MAX_NAMES:
            self._left_aside = set(sorted(self._left_aside)[:MAX_NAMES])
        return sample

    @property
    def left_aside(self) -> set[str]:
        """Columns, and keys of messages, that samples are not made of; at most `MAX_NAMES`."""
        return set(map(shown, self._left_aside))

    def _checked_shape(self, columns: Mapping[str, object]) -> Shape:
        shape = shape_of(columns, self._keys)
        if shape is None:  # an empty list of messages, of whichever spelling
            return "messages" if self.shape in (None, "sharegpt") else self.shape
        if self.shape is None:
            self.shape = shape
        if shape != self.shape:
            raise UnusableFileError(
                f"the row has the {shape} shape and the file begins with the {self.shape} shape "
                f"(columns found: {listed(columns)}); put them into two files"
            )
        return shape


def _shortened(row: BadRow) -> BadRow:
    """The row with a reason that fits a line of a terminal's log, whatever the file holds."""
    return replace(row, reason=shown(row.reason, length=_REASON_LENGTH))


def _first_character(file: BinaryIO) -> bytes:
    """Return the first byte after a byte order mark and spaces, or b"" if there is none."""
    chunk = file.read(_PEEK_BYTES).removeprefix(BYTE_ORDER_MARK)
    while chunk and not chunk.strip(JSON_SPACE):
        chunk = file.read(_PEEK_BYTES)
    return chunk.strip(JSON_SPACE)[:1]


def _digest(kind: str, *, name: str, start: int) -> "hashlib._Hash":
    """The same bytes are other rows in another form, and a byte order mark counts at the start."""
    return hashlib.sha256(f"{kind}:{compression_of(name)}:{start == 0}:".encode())


def _hashed(name: str, *, digest: "hashlib._Hash") -> tuple[str, int]:
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
            digest, num_lines, position = _digest("lines", name=name, start=start), 0, start
            # The last byte before the border ends a line if the border is where one begins.
            last = (start // shard_bytes + 1) * shard_bytes - 1
            while chunk := (
                file.read(min(_CHUNK_BYTES, last - position)) if position < last else b""
            ):
                digest.update(chunk)
                num_lines += chunk.count(b"\n")
                position += len(chunk)
            stop, rest = position, b""
            while not rest.endswith(b"\n") and (part := file.readline(_CHUNK_BYTES)):
                rest = part
                digest.update(rest)
                stop += len(rest)
            if stop == start:
                break
            yield Shard(name, "lines", start, stop, first_line, digest.hexdigest())
            start, first_line = stop, first_line + num_lines + rest.count(b"\n")


def _table_shards(
    name: str, *, kind: Literal["parquet", "arrow"], shard_bytes: int
) -> Iterator[Shard]:
    file_hash, _ = _hashed(name, digest=hashlib.sha256(kind.encode()))
    from roll_sft.data.rows.table_rows import table_parts

    with opened(name) as file:
        parts = list(table_parts(file, kind=kind, name=name))
    if not any(part.num_rows for part in parts):
        raise DataError(f"{name}: the table is empty; it must hold at least one row")
    start, first_row, num_rows, num_bytes = parts[0].start, 1, 0, 0
    for index, part in enumerate(parts):
        num_rows, num_bytes = num_rows + part.num_rows, num_bytes + part.num_bytes
        if index + 1 < len(parts) and num_bytes + parts[index + 1].num_bytes <= shard_bytes:
            continue
        content_hash = hashlib.sha256(f"{file_hash}:{start}:{part.stop}".encode()).hexdigest()
        yield Shard(name, kind, start, part.stop, first_row, content_hash)
        start, first_row, num_rows, num_bytes = part.stop, first_row + num_rows, 0, 0


def _raw_rows(shard: Shard, *, wanted: Set[str]) -> Iterator[RawRow | BadRow]:
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
                wanted=wanted,
            )
        elif compression_of(shard.file) is None:
            file.seek(shard.start)
            yield from _json_rows(shard, file)
        else:
            yield from _decompressed_rows(shard, file)


def _json_rows(shard: Shard, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    if shard.kind == "array":
        from roll_sft.data.rows.json_array import array_rows

        return array_rows(file, name=shard.file)
    is_whole = compression_of(shard.file) is not None
    num_bytes = None if is_whole else shard.stop - shard.start
    return line_rows(bounded_lines(file, num_bytes=num_bytes), first_line=shard.first_line)


def _decompressed_rows(shard: Shard, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    line = 1
    try:
        for row in _json_rows(shard, file):
            line = row.line
            yield row
    except OSError as error:
        raise DataError(
            f"{shard.file}:{line}: the compressed data is cut off or damaged behind this line "
            f"({first_line(error)}); write the file again"
        ) from error
