"""Files that are whole or absent, and one line for a disk that takes no more.

Promises: what `write_durably` wrote survives a crash of the machine; a reader sees the old text or
the new one; nothing that is set aside is ever overwritten.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from roll_sft.errors import ResourceError, RollSftError


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


def write_durably(path: Path, text: str | bytes) -> None:
    """Replace `path` by `text` (UTF-8) atomically, on disk before this returns."""
    staging = path.with_name(f".{path.name}.tmp")
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
