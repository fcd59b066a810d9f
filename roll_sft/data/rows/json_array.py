"""A file that is one JSON array -> the value of each entry, with its place.

The text of the file is held as a whole, its rows one at a time. Large data is better kept as JSONL,
which is streamed and cut into shards. So of a compressed file, whose size does not tell, only so
much is read.
"""

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from roll_sft.base.errors import DataError
from roll_sft.data.rows.conversation import BadRow
from roll_sft.data.rows.files import compression_of
from roll_sft.data.rows.json_rows import (
    BYTE_ORDER_MARK,
    MAX_ROW_BYTES,
    TOO_DEEP,
    TOO_LONG,
    RawRow,
    RowDecoder,
)

_MOST_EXPANDED_BYTES = 256 << 20
_SPACES = re.compile(r"[ \t\r\n]*")


def array_rows(file: BinaryIO, *, name: str) -> Iterator[RawRow | BadRow]:
    """Yield the rows of `file`, whose first character is "[".

    Raises `DataError` with `name` and the line for an empty array, and at the first error: nothing
    says where the row after it begins.
    """
    text = _text(file, name=name)
    decoder, row, line, counted = RowDecoder(), 0, 1, 0
    position = _next(text, text.index("[") + 1)
    if text.startswith("]", position):
        raise DataError(f"{name}: the array is empty; it must hold at least one row")
    while True:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = decoder.entry(text, position, row=row, line=line)
        except json.JSONDecodeError as error:
            raise _broken(text, error.pos, error.msg, name=name) from None
        except RecursionError:
            raise _broken(text, position, TOO_DEEP, name=name) from None
        except ValueError as error:  # a number of thousands of digits
            raise _broken(text, position, str(error), name=name) from None
        if end - position > MAX_ROW_BYTES:
            raise DataError(f"{name}:{line}: {TOO_LONG}")
        position = _next(text, end)
        if not text.startswith((",", "]"), position):
            raise _broken(text, position, "Expecting ',' or ']'", name=name)
        yield value
        row += 1
        is_last = text[position] == "]"
        position = _next(text, position + 1)
        if is_last:
            break
    if position < len(text):
        raise _broken(text, position, "Text after the end of the array", name=name)


def _next(text: str, position: int) -> int:
    """Where the first character from `position` on lies that is no space."""
    spaces = _SPACES.match(text, position)
    assert spaces is not None, "a pattern that may be empty always matches"
    return spaces.end()


def _text(file: BinaryIO, *, name: str) -> str:
    most = _MOST_EXPANDED_BYTES if compression_of(name) else -1
    data = file.read(most)
    if len(data) == most and file.read(1):
        raise DataError(
            f"{name}: is an array of more than {most >> 20} MiB in a compressed file; write one"
            " JSON object on each line, or decompress the file"
        )
    data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{name}:{line}: byte 0x{data[error.start]:02x} at column {column} is not UTF-8; save "
            f"the file as UTF-8"
        ) from None


def _broken(text: str, position: int, problem: str, *, name: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return DataError(
        f"{name}:{line}: broken JSON at column {column}: {problem}; an array cannot be read past an"
        f" error: correct the file, or write one JSON object on each line"
    )
