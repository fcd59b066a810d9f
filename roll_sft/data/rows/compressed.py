"""Files that are compressed as a whole.

Promise: a small file that expands to a giant one is refused before it has taken minutes.
"""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from roll_sft.base.errors import DataError, first_line
from roll_sft.data.rows.conversation import BadRow
from roll_sft.data.rows.json_rows import RawRow

_BUFFER_BYTES = 1 << 16
# Rows that repeat a long text shrink to a hundredth; gzip's limit is a thousandth.
_MOST_TIMES, _FREE_BYTES = 500, 256 << 20


def decompressed(file: BinaryIO, codec: str) -> BinaryIO:
    """The bytes that `file` holds; `codec` is what pyarrow calls its compression."""
    stream: Any = pa.CompressedInputStream(file, codec)
    return io.BufferedReader(_Bounded(stream, file), _BUFFER_BYTES)


class _Bounded(io.RawIOBase):
    """`stream`, until it is far longer than what has been read of `file`."""

    def __init__(self, stream: Any, file: BinaryIO) -> None:
        super().__init__()
        self._stream, self._file, self._num_bytes = stream, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        count: int = self._stream.readinto(room)
        self._num_bytes += count
        if self._num_bytes > max(_FREE_BYTES, _MOST_TIMES * self._file.tell()):
            raise DataError(
                f"{getattr(self._file, 'name', 'a compressed file')}: expands to more than"
                f" {_MOST_TIMES} times its size, as no data of conversations does; write it anew"
            )
        return count


def whole_rows(rows: Iterator[RawRow | BadRow], *, name: str) -> Iterator[RawRow | BadRow]:
    """Yield `rows` of the file `name`; raises `DataError` where they are cut off or damaged."""
    line = 1
    try:
        for row in rows:
            line = row.line
            yield row
    except OSError as error:
        raise DataError(
            f"{name}:{line}: the compressed data is cut off or damaged behind this line "
            f"({first_line(error)}); write the file again"
        ) from error
