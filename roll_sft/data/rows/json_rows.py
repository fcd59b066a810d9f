"""Bytes of JSON -> the value of each row, with its place.

What it reads: UTF-8 JSON, as one value on each line (JSONL) or as one array. Both are streamed:
memory holds a row and a window of the file, not the file.

What is promised:
- rows come in the order of the file, numbered without a gap; nothing is skipped but blank lines;
- a line that is no JSON is a `BadRow`, and the next line is read. An array cannot be read past an
  error, since nothing says where its next row starts: that is a `DataError`;
- a key that an object has twice is an error: of two answers, one would be lost;
- no more than `MAX_ROW_BYTES` of a row are held, however long a file makes it.
"""

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from roll_sft.base.errors import DataError
from roll_sft.data.rows.conversation import BadRow

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_SPACE = b" \t\r\n"

_JSON_SPACES = re.compile(r"[ \t\r\n]*")
# A million tokens are a tenth of this.
MAX_ROW_BYTES = 64 << 20

_WINDOW_BYTES = 1 << 20
TOO_DEEP = "the row is nested too deep to be read as JSON; flatten it"
_TOO_LONG = f"the row has more than {MAX_ROW_BYTES >> 20} MiB; cut it into several"
# A value, or an error, that ends this near to the end of the window may owe it to that end.
_LONGEST_MARK = 32


@dataclass(frozen=True, slots=True)
class RawRow:
    """One value. `row` counts from 0 over all rows of what is read, `line` from 1 over the file."""

    value: object
    row: int
    line: int


class _Decoder:
    """Parses JSON and remembers a key that an object had twice."""

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
    decoder, row = _Decoder(), 0
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


def _line_row(content: bytes, *, decoder: _Decoder, row: int, line: int) -> RawRow | BadRow:
    if len(content) > MAX_ROW_BYTES:
        return BadRow(row=row, line=line, reason=_TOO_LONG)
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


def array_rows(
    file: BinaryIO, *, name: str, window_bytes: int = _WINDOW_BYTES
) -> Iterator[RawRow | BadRow]:
    """Parse one row after the other. The first error ends it: what follows has no known start.

    Raises `DataError` for an empty array and a broken one, with `name` and the line.
    """
    window = _Window(file, name=name, num_bytes=window_bytes)
    decoder, row = _Decoder(), 0
    window.take("[")
    if window.next() == "]":
        raise DataError(f"{name}: the array is empty; it must hold at least one row")
    while True:
        window.next()
        value = _entry(window, decoder=decoder, row=row)
        follows = window.next()
        if follows not in (",", "]"):
            raise window.broken(window.position, "Expecting ',' or ']'")
        yield value
        row += 1
        window.take(follows)
        if follows == "]":
            break
    if window.next():
        raise window.broken(window.position, "Text after the end of the array")


def _entry(window: "_Window", *, decoder: _Decoder, row: int) -> RawRow | BadRow:
    while True:
        position, problem = window.position, ""
        try:
            value, end = decoder.entry(window.text, position, row=row, line=window.line)
        except json.JSONDecodeError as error:
            # A string without an end was cut by the window, wherever it began.
            end = len(window.text) if error.msg.startswith("Unterminated") else error.pos
            position, problem = error.pos, error.msg
        except (ValueError, RecursionError) as error:
            end, problem = position, TOO_DEEP if isinstance(error, RecursionError) else str(error)
        if end > len(window.text) - _LONGEST_MARK and window.grow():
            continue
        if problem:
            raise window.broken(position, problem)
        window.position = end
        return value


class _Window:
    """The part of a text file that is looked at: `text` from `position` on is not read yet."""

    def __init__(self, file: BinaryIO, *, name: str, num_bytes: int) -> None:
        self.text, self.position = "", 0
        self.line = 1  # of `position`, as of the last call of `next`
        self._line_start = 0  # of that line in `text`; negative where it was let go
        self._counted = 0  # up to where in `text` lines are counted
        self._file, self._name, self._num_bytes = file, name, num_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes_line, self._bytes_column = 1, 0  # of the next byte; a column counts from 0
        self._at_end = False

    def next(self) -> str:
        """Skip spaces and return the character at `position`, or "" at the end of the file."""
        while True:
            match = _JSON_SPACES.match(self.text, self.position)
            assert match is not None, "a pattern that may be empty always matches"
            self.position = match.end()
            if self.position < len(self.text) or not self.grow():
                break
        self.line += self.text.count("\n", self._counted, self.position)
        newline = self.text.rfind("\n", self._counted, self.position)
        self._line_start = newline + 1 if newline >= 0 else self._line_start
        self._counted = self.position
        return self.text[self.position : self.position + 1]

    def take(self, character: str) -> None:
        """Go past `character`, which comes next."""
        found = self.next()
        assert found == character, f"{found!r} where {character!r} was seen"
        self.position += 1

    def grow(self) -> bool:
        """Read on, as much as is held already, and let go what was read; False at the end."""
        if self._at_end:
            return False
        rest = self.text[self._counted :]
        if len(rest) > MAX_ROW_BYTES:
            raise DataError(f"{self._name}:{self.line}: {_TOO_LONG}")
        self.position -= self._counted
        self._line_start -= self._counted
        self._counted = 0
        data = self._file.read(max(self._num_bytes, len(rest)))
        self._at_end = not data
        self.text = rest + self._decoded(data)
        return True

    def broken(self, position: int, problem: str) -> DataError:
        """The error for what is wrong at `position`."""
        line = self.line + self.text.count("\n", self._counted, position)
        newline = self.text.rfind("\n", self._counted, position)
        column = position - (newline if newline >= 0 else self._line_start - 1)
        return DataError(
            f"{self._name}:{line}: broken JSON at column {column}: {problem}; an array cannot be "
            f"read past an error: mend the file, or write one JSON object on each line"
        )

    def _decoded(self, data: bytes) -> str:
        held = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            # `error.object` begins with the bytes of a character that the last chunk cut in two.
            before, start = error.object, error.start
            line = self._bytes_line + before.count(b"\n", 0, start)
            newline = before.rfind(b"\n", 0, start)
            column = start - newline if newline >= 0 else self._bytes_column - held + start + 1
            raise DataError(
                f"{self._name}:{line}: byte 0x{before[start]:02x} at column {column} is not "
                f"UTF-8; save the file as UTF-8"
            ) from None
        newline = data.rfind(b"\n")
        self._bytes_line += data.count(b"\n")
        self._bytes_column = (
            len(data) - newline - 1 if newline >= 0 else self._bytes_column + len(data)
        )
        return text
