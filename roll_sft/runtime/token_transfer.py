"""Token caches in parts, on their way to nodes that do not have them.

A part goes into the object store once, and from there to every node that lacks its folder; a few
are under way at a time, so that neither the store nor a worker ever holds a whole cache. A folder
appears under its name when it is whole, at the path that the driver has it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.errors import DataError, ResourceError
from roll_sft.data.tokens.cache import TokenCache
from roll_sft.job.inputs import TokenData

PART_BYTES = 64 << 20
PARTS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Part:
    """`size` bytes of `file` in `folder`, from `start` on; `is_last` of the folder."""

    folder: Path
    file: str
    start: int
    size: int
    is_last: bool

    def read(self) -> NDArray[np.uint8]:
        """Its bytes, uint8 [size]."""
        return np.fromfile(
            self.folder / self.file, dtype=np.uint8, count=self.size, offset=self.start
        )


def token_folders(data: TokenData) -> list[Path]:
    """The folders of all caches of a run, each once."""
    sets = [data.train, *data.validation.values()]
    return list(dict.fromkeys(cache.folder for tokens in sets for cache in tokens.caches))


def missing(folders: Iterable[Path]) -> list[Path]:
    """Those of `folders` that are no whole token caches here."""
    lacking = []
    for folder in folders:
        try:
            TokenCache.open(folder)
        except DataError:
            lacking.append(folder)
    return lacking


def parts_of(folder: Path, *, size: int) -> Iterator[Part]:
    """All bytes of the files in `folder`, in parts of at most `size`."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    parts = [
        Part(folder, path.name, start, min(size, path.stat().st_size - start), is_last=False)
        for path in files
        for start in range(0, max(1, path.stat().st_size), size)  # an empty file is a part too
    ]
    yield from parts[:-1]
    last = parts[-1]
    yield Part(folder, last.file, last.start, last.size, is_last=True)


def receive(part: Part, content: NDArray[np.uint8]) -> None:
    """Write `part` beside its folder, and with the last one give the folder its name.

    Raises `ResourceError` if this node cannot hold it there.
    """
    unfinished = part.folder.with_name(f".{part.folder.name}.{os.getpid()}.received")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with (unfinished / part.file).open("r+b" if part.start else "wb") as file:
            file.seek(part.start)
            content.tofile(file)
        if part.is_last:
            _publish(unfinished, part.folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ResourceError(
            f"data.cache_dir: {part.folder.parent} on this node cannot hold the run's tokens"
            f" ({error.strerror}); make room there, or choose a folder that every node can write"
        ) from error


def _publish(unfinished: Path, folder: Path) -> None:
    if missing([folder]):
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or not there
        with contextlib.suppress(FileExistsError):  # another run was quicker: it is the same
            unfinished.rename(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
