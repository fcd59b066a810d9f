"""Files that are compressed as a whole."""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from roll_sft.base.errors import DataError, first_line
from roll_sft.data.rows.conversation import BadRow
from roll_sft.data.rows.json_rows import RawRow

_BUFFER_BYTES = 1 << 16


def decompressed(file: BinaryIO, codec: str) -> BinaryIO:
    """The bytes that `file` holds; `codec` is what pyarrow calls its compression."""
    stream: Any = pa.CompressedInputStream(file, codec)
    return io.BufferedReader(stream, _BUFFER_BYTES)


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
