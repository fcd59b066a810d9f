"""The path of a source -> its files, and the bytes and the kind of each.

The suffix of a file says what it holds. A path that is no file of this machine is looked up by
`file_lists`.
"""

import io
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from roll_sft.base.errors import DataError, first_line
from roll_sft.data.rows.checks import shown

FileKind = Literal["json", "parquet", "arrow"]

JSON_SUFFIXES = (".json", ".jsonl")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES: dict[str, FileKind] = {".parquet": "parquet", ".arrow": "arrow"}
ACCEPTED = ".json or .jsonl (also with .gz or .zst after it), .parquet or .arrow"

URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]+://")


def find_files(path: str, *, split: str | None = None) -> list[str]:
    """Return the files that `path` names, sorted; at least one, each of an accepted suffix.

    `split` keeps those that have it in their name, or in that of a folder below `path`. Raises
    `DataError` where there is no such file, or one that cannot be read.
    """
    if split is None and kind_of_file(path) is not None and local_form(path) == "file":
        return [path]
    from roll_sft.data.rows.file_lists import listed_files

    return listed_files(path, split=split)


def kind_of_file(name: str) -> FileKind | None:
    """What the suffix says that the bytes are."""
    suffixes = PurePosixPath(name.lower()).suffixes[-2:]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        return "json" if suffixes and suffixes[-1] in JSON_SUFFIXES else None
    if suffixes and suffixes[-1] in JSON_SUFFIXES:
        return "json"
    return TABLES.get(suffixes[-1]) if suffixes else None


def compression_of(name: str) -> str | None:
    """The compression of the file by its suffix, as pyarrow calls it."""
    return COMPRESSIONS.get(PurePosixPath(name.lower()).suffix)


@contextmanager
def opened(name: str, *, decompress: bool = True) -> Iterator[BinaryIO]:
    """Open a file that `find_files` named; an `OSError` in the block becomes a `DataError`."""
    try:
        with raw_file(name) as file:
            if decompress and (codec := compression_of(name)):
                from roll_sft.data.rows.compressed import decompressed

                file = decompressed(file, codec)
            yield file
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path in the configuration") from None
    except OSError as error:  # pyarrow's too
        reason = error.strerror or first_line(error)
        raise DataError(
            f"{name}: cannot be read ({reason}); correct the file or its permissions"
        ) from error


@contextmanager
def raw_file(name: str) -> Iterator[BinaryIO]:
    """Open a file as its bytes are; raises `OSError`, and `DataError` for what is no file."""
    if URL.match(name):
        import fsspec

        with fsspec.open(name, "rb", compression=None) as remote:
            yield io.BufferedReader(remote)  # whose readline takes a size, as fsspec's does not
    else:
        path = Path(name)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"{name}: is a pipe, a device or a folder; give a file of data")
        with path.open("rb") as file:
            yield file


def local_form(path: str) -> Literal["file", "folder"] | None:
    """Whether a file or a folder has this name; None where neither has."""
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name that no file can have, or no right to look
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise DataError(f"{shown(path)}: cannot be looked up ({why}); correct the path") from None
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else None
