"""Lines of JSON -> the value of each row, with its place.

Promises:
- rows come in the order of the file, numbered without a gap; nothing is skipped but blank lines;
- a line that is no JSON is a `BadRow`, and the next line is read;
- a key that an object has twice is an error: one of the two values would be lost;
- memory holds one line, and of one longer than `MAX_ROW_BYTES` only its beginning.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from roll_sft.data.rows.conversation import BadRow

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_SPACE = b" \t\r\n"

# A million tokens are a tenth of this.
MAX_ROW_BYTES = 64 << 20

TOO_DEEP = "the row is nested too deep to be read as JSON; flatten it"
TOO_LONG = f"the row has more than {MAX_ROW_BYTES >> 20} MiB; cut it into several"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One value. `row` counts from 0 over all rows of what is read, `line` from 1 over the file."""

    value: object
    row: int
    line: int


class RowDecoder:
    """Parses JSON; a row in which an object has a key twice becomes a `BadRow`."""

    def __init__(self) -> None:
        self._repeated: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            self._repeated = next(name for name in names if names.count(name) > 1)
        return values

    def line(self, text: str, *, row: int, line: int) -> RawRow | BadRow:
        self._repeated = None
        return self._placed(self._decoder.decode(text), row=row, line=line)

    def entry(
        self, text: str, position: int, *, row: int, line: int
    ) -> tuple[RawRow | BadRow, int]:
        """Parse the value that begins at `position`; return it and where it ends."""
        self._repeated = None
        value, end = self._decoder.raw_decode(text, position)
        return self._placed(value, row=row, line=line), end

    def _placed(self, value: object, *, row: int, line: int) -> RawRow | BadRow:
        if self._repeated is None:
            return RawRow(value, row=row, line=line)
        reason = f"an object has the key '{self._repeated}' twice; keep one of them"
        return BadRow(row=row, line=line, reason=reason)


def line_rows(file: Iterator[bytes] | BinaryIO, *, first_line: int) -> Iterator[RawRow | BadRow]:
    """Read one value from each line of `file` that is not blank; `first_line` is its first."""
    decoder, row = RowDecoder(), 0
    # Bytes, so that only \n ends a line: a JSON string may hold other separators.
    for line, raw in enumerate(file, start=first_line):
        content = (raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw).strip(JSON_SPACE)
        if not content:
            continue
        yield _line_row(content, decoder=decoder, row=row, line=line)
        row += 1


def bounded_lines(file: BinaryIO, *, num_bytes: int | None = None) -> Iterator[bytes]:
    """Yield the lines of the next `num_bytes` of `file`, or of all: of each, the beginning.

    A line of more than `MAX_ROW_BYTES` is cut behind them, so that it is seen to be longer.
    """
    left = math.inf if num_bytes is None else num_bytes
    while left > 0 and (line := file.readline(MAX_ROW_BYTES + 1)):
        yield line
        left -= len(line)
        while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES + 1)
            left -= len(line)


def _line_row(content: bytes, *, decoder: RowDecoder, row: int, line: int) -> RawRow | BadRow:
    if len(content) > MAX_ROW_BYTES:
        return BadRow(row=row, line=line, reason=TOO_LONG)
    try:
        return decoder.line(content.decode("utf-8"), row=row, line=line)
    except UnicodeDecodeError as error:
        reason = (
            f"byte 0x{content[error.start]:02x} at column {error.start + 1} is not UTF-8; "
            f"save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        reason = (
            f"broken JSON at column {error.colno}: {error.msg}; each line must be one JSON object"
        )
    except RecursionError:
        reason = TOO_DEEP
    except ValueError as error:  # a number of thousands of digits
        reason = f"JSON that cannot be read: {error}"
    return BadRow(row=row, line=line, reason=reason)
