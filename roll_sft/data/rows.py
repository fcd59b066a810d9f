"""Files of JSON rows -> the value of each row, with its place.

What it reads: UTF-8 JSON, as one array or as one value on each line (JSONL). Which of the two it is
follows from the first character of the file, not from its suffix.

What it promises:
- rows come in the order of the file, numbered without a gap; nothing is skipped but blank lines;
- a line that is no JSON is a `BadRow`, and the next line is read. An array cannot be read past an
  error, since nothing says where its next row starts: that is a `DataError`;
- JSONL is streamed. An array is held in memory as text, but its rows are parsed one by one.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from roll_sft.data.conversation import BadRow
from roll_sft.errors import DataError

SUFFIXES = (".json", ".jsonl")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_SPACE = b" \t\r\n"
_JSON_SPACES = re.compile(r"[ \t\r\n]*")
_PEEK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One JSON value. `row` counts from 0 over all rows of the file, `line` from 1."""

    value: object
    row: int
    line: int


def read_rows(path: Path) -> Iterator[JsonRow | BadRow]:
    """Read the rows of `path` in order.

    Raises `DataError` at once if the file is missing, unreadable, of another suffix or empty, and
    during the iteration if it holds a broken array or no row.
    """
    accepted = " or ".join(SUFFIXES)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: suffix '{path.suffix}' is not accepted; give a file ending in {accepted}"
        )
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the {accepted} file inside it")
    first_character = _first_character(path)
    if not first_character:
        raise DataError(f"{path}: the file is empty; it must hold at least one row")
    return _array_rows(path) if first_character == b"[" else _line_rows(path)


def _first_character(path: Path) -> bytes:
    """Return the first byte after a byte order mark and spaces, or b"" if there is none."""
    try:
        with path.open("rb") as file:
            chunk = file.read(_PEEK_BYTES).removeprefix(_BYTE_ORDER_MARK)
            while chunk and not chunk.strip(_JSON_SPACE):
                chunk = file.read(_PEEK_BYTES)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path in the configuration") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); mend the file or its rights"
        ) from error
    return chunk.strip(_JSON_SPACE)[:1]


def _line_rows(path: Path) -> Iterator[JsonRow | BadRow]:
    row = 0
    with path.open("rb") as file:
        # Binary, so that only \n ends a line: a JSON string may hold other separators.
        for line, raw in enumerate(file, start=1):
            content = (raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw).strip(_JSON_SPACE)
            if not content:
                continue
            yield _line_row(content, row=row, line=line)
            row += 1


def _line_row(content: bytes, *, row: int, line: int) -> JsonRow | BadRow:
    try:
        return JsonRow(json.loads(content.decode("utf-8")), row=row, line=line)
    except UnicodeDecodeError as error:
        reason = (
            f"byte 0x{content[error.start]:02x} at column {error.start + 1} is not UTF-8; "
            f"save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        reason = (
            f"broken JSON at column {error.colno}: {error.msg}; each line must be one JSON object"
        )
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or thousands of nested lists.
        reason = f"JSON that cannot be read: {error}"
    return BadRow(row=row, line=line, reason=reason)


def _array_rows(path: Path) -> Iterator[JsonRow | BadRow]:
    """Parse one row after the other. The first error ends it: what follows has no known start."""
    text = _array_text(path)
    decoder = json.JSONDecoder()
    position = _after_space(text, 0) + 1  # past the opening bracket
    line, counted, row = 1, 0, 0
    at_end = text.startswith("]", _after_space(text, position))
    if at_end:
        raise DataError(f"{path}: the array is empty; it must hold at least one row")
    while not at_end:
        start = _after_space(text, position)
        line += text.count("\n", counted, start)
        counted = start
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _broken_array(path, text=text, position=error.pos, problem=error.msg) from None
        except (ValueError, RecursionError) as error:
            raise _broken_array(path, text=text, position=start, problem=str(error)) from None
        position = _after_space(text, end)
        at_end = text.startswith("]", position)
        if not at_end and not text.startswith(",", position):
            raise _broken_array(path, text=text, position=position, problem="Expecting ',' or ']'")
        yield JsonRow(value, row=row, line=line)
        row, position = row + 1, position + 1
    rest = _after_space(text, position)
    if rest != len(text):
        raise _broken_array(
            path, text=text, position=rest, problem="Text after the end of the array"
        )


def _array_text(path: Path) -> str:
    data = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} at column {column} is not UTF-8; "
            f"save the file as UTF-8"
        ) from None


def _after_space(text: str, position: int) -> int:
    match = _JSON_SPACES.match(text, position)
    assert match is not None, "a pattern that may be empty always matches"
    return match.end()


def _broken_array(path: Path, *, text: str, position: int, problem: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return DataError(
        f"{path}:{line}: broken JSON at column {column}: {problem}; an array cannot be read past "
        f"an error: mend the file, or write one JSON object on each line"
    )
