"""The shards and the row format of each file, kept in the cache while the file stays the same.

Finding the shards of a file hashes its bytes, which takes minutes for large data. The names of
shards need that hash: data that is appended to, copied or moved keeps its tokens, and a run that
resumes knows its data wherever it lies. So the result is kept under the file's path, inode, size
and the times of its last change of content and of state; no program can set the last of these.

The result for a file that changed within the last seconds is not kept: a second change within one
tick of the clock would look the same.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from roll_sft.data.rows.columns import ColumnKeys, RowFormat
from roll_sft.data.rows.files import find_files
from roll_sft.data.rows.shards import SHARD_BYTES, Shard, file_format, shards_of_file
from roll_sft.data.tokens.build_shard import stamp_of
from roll_sft.data.tokens.cache import FORMAT

_SETTLED_S = 2.0


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """The shards of a file in order, and the format of its rows, None if none has one.

    `stamp` is what `stamp_of` returned before the file was read.
    """

    shards: tuple[Shard, ...]
    row_format: RowFormat | None
    stamp: tuple[int, int] | None


def indexed_files(
    path: str, *, split: str | None, keys: ColumnKeys, cache_dir: Path, only_read: bool
) -> list[IndexedFile]:
    """The files of a source. Raises `DataError` for one that cannot be used.

    Writes what it finds to `cache_dir`, unless the cache is `only_read`.
    """
    return [
        _indexed(file, keys, cache_dir, only_read=only_read)
        for file in find_files(path, split=split)
    ]


def _indexed(file: str, keys: ColumnKeys, cache_dir: Path, *, only_read: bool) -> IndexedFile:
    entry, stamp = _entry_of(file, keys, cache_dir), stamp_of(file)
    if entry is not None and (known := _read(entry, file=file, stamp=stamp)) is not None:
        return known
    shards = tuple(shards_of_file(file))
    found = IndexedFile(shards, file_format(shards, keys), stamp)
    # Asked again: the file may have changed while it was hashed.
    if not only_read and entry is not None and entry == _entry_of(file, keys, cache_dir):
        _write(entry, found)
    return found


def _entry_of(file: str, keys: ColumnKeys, cache_dir: Path) -> Path | None:
    """Where the result is kept; None for a file that is not local or changed a moment ago."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    if time.time() - max(status.st_mtime, status.st_ctime) < _SETTLED_S:
        return None
    identity = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    parts = (FORMAT, SHARD_BYTES, os.path.abspath(file), *identity, asdict(keys))
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()
    return cache_dir / "files" / f"{name}.json"


def _read(entry: Path, *, file: str, stamp: tuple[int, int] | None) -> IndexedFile | None:
    try:
        found = json.loads(entry.read_text(encoding="utf-8"))
        # Under today's name of the file, which may be relative to another folder.
        shards = tuple(Shard(**{**shard, "file": file}) for shard in found["shards"])
        return IndexedFile(shards, found["row_format"], stamp)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(entry: Path, found: IndexedFile) -> None:
    """Write beside and rename. A cache that cannot be written is an error where tokens are."""
    shards = [asdict(shard) for shard in found.shards]
    unfinished = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"shards": shards, "row_format": found.row_format})
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(entry)
    except OSError:
        return
