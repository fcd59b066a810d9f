"""The shards and the shape of a file, without reading it again while it is the same file.

To find shards is to hash every byte, minutes for large data, at each start. So what was found is
kept in the cache, under what the system says of the file: path, inode, size, and the times of its
last change of content and of state, in nanoseconds. No program can set the last of these.

A file that changed within the last seconds is not kept: it could change again within one tick of
the clock and look the same.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from roll_sft.data.rows.columns import ColumnKeys, Shape
from roll_sft.data.rows.files import find_files
from roll_sft.data.rows.shards import SHARD_BYTES, Shard, file_shapes, shards_of_file
from roll_sft.data.tokens.build_shard import stamp_of
from roll_sft.data.tokens.cache import FORMAT

_SETTLED_S = 2.0


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file of a source: its shards in order, and the shape of its rows (None: of no shape).

    `stamp` is what it looked like before it was read, see `fill.stamp_of`.
    """

    shards: tuple[Shard, ...]
    shape: Shape | None
    stamp: tuple[int, int] | None


def known_files(
    path: str, *, split: str | None, keys: ColumnKeys, cache_dir: Path, remembers: bool = True
) -> list[KnownFile]:
    """The files of a source; raises what `shards_of_file` and `file_shapes` raise.

    What had to be read is kept in `cache_dir`, unless it is asked for without `remembers`.
    """
    files = find_files(path, split=split)
    return [_known_file(file, keys, cache_dir, remembers=remembers) for file in files]


def _known_file(file: str, keys: ColumnKeys, cache_dir: Path, *, remembers: bool) -> KnownFile:
    note, stamp = _note_of(file, keys, cache_dir), stamp_of(file)
    if note is not None and (known := _read(note, file=file, stamp=stamp)) is not None:
        return known
    shards = list(shards_of_file(file))
    known = KnownFile(tuple(shards), file_shapes(shards, keys).get(file), stamp)
    # Asked again: the file may have changed while it was hashed.
    if remembers and note is not None and note == _note_of(file, keys, cache_dir):
        _write(note, known)
    return known


def _note_of(file: str, keys: ColumnKeys, cache_dir: Path) -> Path | None:
    """Where the file is remembered; None if it is not local or was changed a moment ago."""
    try:
        facts = os.stat(file)
    except OSError:
        return None
    if time.time() - max(facts.st_mtime, facts.st_ctime) < _SETTLED_S:
        return None
    parts = (
        FORMAT,
        SHARD_BYTES,
        os.path.abspath(file),
        facts.st_ino,
        facts.st_size,
        facts.st_mtime_ns,
        facts.st_ctime_ns,
        asdict(keys),
    )
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()
    return cache_dir / "files" / f"{name}.json"


def _read(note: Path, *, file: str, stamp: tuple[int, int] | None) -> KnownFile | None:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        # Under the name that is used today, which may be relative to another folder.
        shards = tuple(Shard(**{**shard, "file": file}) for shard in found["shards"])
        return KnownFile(shards, found["shape"], stamp)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(note: Path, known: KnownFile) -> None:
    """Beside and renamed. A cache that cannot be written is found out where tokens are."""
    shards = [asdict(shard) for shard in known.shards]
    text = json.dumps({"shards": shards, "shape": known.shape})
    unfinished = note.with_name(f".{note.name}.{os.getpid()}.tmp")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(note)
    except OSError:
        return
