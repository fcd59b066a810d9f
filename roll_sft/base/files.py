"""Files that are whole or absent, and one line for a disk that takes no more.

Promises: what `write_durably` wrote survives a crash of the machine; a reader sees the old text or
the new one; a torn line of a log is nobody's record; nothing set aside is ever overwritten.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from roll_sft.base.errors import ResourceError, RollSftError

LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: Path, kind: type[RollSftError] = ResourceError) -> Iterator[None]:
    """Raise an error of the system within the block as one line of `kind` that names `path`."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"{path}: cannot be written: {error.strerror or error}; make room or give another"
            " output_dir, and run the same command again"
        ) from error


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of one JSON object a line; none where there is no file.

    A line that is no object is passed over: a kill or a full disk may tear the last one.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield record
            elif line.strip():
                LOG.warning("%s:%d: is no whole record, and is passed over", path, number)


def write_durably(path: Path, text: str | bytes, *, mode: int | None = None) -> None:
    """Replace `path` by `text` (UTF-8) atomically, on disk before this returns.

    `mode` are its permissions; None leaves them to the system.
    """
    staging = path.with_name(f".{path.name}.tmp")
    if mode is not None:
        staging.touch(mode)
        staging.chmod(mode)
    staging.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    sync(staging)
    staging.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def set_aside(path: Path) -> Path:
    """Rename a file or a folder to a hidden name that is free; returns that."""
    return path.rename(aside_name(path))


def aside_name(path: Path) -> Path:
    """`.set_aside_<name>` beside `path`, with a number behind it where that is taken."""
    names = (
        f".set_aside_{path.name}" + (f"_{number}" if number else "") for number in range(10_000)
    )
    return next(aside for aside in map(path.with_name, names) if not aside.exists())
