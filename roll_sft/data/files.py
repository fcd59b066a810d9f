"""A path as a user writes it -> the files it names, in a fixed order, and their bytes.

A path is a file, a folder (all files in it, at any depth), a pattern with `*`, a URL that fsspec
opens (`s3://...`, `memory://...`) of any of these, or org/name of a dataset of the hub, where no
file has that name. Of a folder, hidden files and folders (a dot or an underscore first, as data
writers mark theirs) and notes beside the data are left out; any other file that is no data is
refused. What a file holds follows from its suffix.
"""

import glob
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import fsspec
import pyarrow as pa
from fsspec.registry import known_implementations

from roll_sft.data.hub import hub_files, is_hub_id
from roll_sft.errors import DataError, first_line

FileKind = Literal["json", "parquet", "arrow"]

JSON_SUFFIXES = (".json", ".jsonl")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES: dict[str, FileKind] = {".parquet": "parquet", ".arrow": "arrow"}
ACCEPTED = ".json or .jsonl (also with .gz or .zst after it), .parquet or .arrow"

# What lies beside data and is none: in folders that `datasets` writes, and notes for people.
_NO_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|.*\.(md|rst|txt|py|ya?ml)|(LICENSE|NOTICE)(\..*)?"
)
_PATTERN = re.compile(r"[*?\[]")
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]+)://")
_NAMES_SHOWN = 5
_BUFFER_BYTES = 1 << 16


def find_files(path: str, *, split: str | None = None) -> list[str]:
    """Return the files that `path` names, sorted; at least one, each of an accepted suffix.

    `split` keeps those that have it in their name, or in that of a folder below `path`. Raises
    `DataError` where there is no such file, or one that cannot be read.
    """
    if _is_on_hub(path):
        return hub_files(path, split=split)
    url = _URL.match(path)
    root, found = _remote_files(path, url.group(1)) if url else _local_files(path)
    if not found:
        raise DataError(f"{path}: no file here; give a file ending in {ACCEPTED}")
    for name in found:
        if kind_of_file(name) is None:
            suffix = PurePosixPath(name).suffix
            remedy = "" if name == path else ", or name the others with a pattern such as *.jsonl"
            raise DataError(
                f"{name}: suffix '{suffix}' is not accepted; give a file ending in {ACCEPTED}"
                f"{remedy}"
            )
    return found if split is None else _of_split(found, split=split, path=path, root=root)


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
    """Open a file that `find_files` named, and turn what fails inside into `DataError`."""
    try:
        with _open(name) as file:
            codec = compression_of(name) if decompress else None
            yield _decompressed(file, codec) if codec else file
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path in the configuration") from None
    except OSError as error:  # pyarrow's too
        reason = error.strerror or first_line(error)
        raise DataError(
            f"{name}: cannot be read ({reason}); mend the file or its rights"
        ) from error


def _is_on_hub(path: str) -> bool:
    is_file_name = kind_of_file(path) is not None or PurePosixPath(path).suffix in COMPRESSIONS
    return is_hub_id(path) and not is_file_name and not Path(path).exists()


def _open(name: str) -> Any:
    if _URL.match(name):
        return fsspec.open(name, "rb", compression=None)
    return Path(name).open("rb")


def _decompressed(file: BinaryIO, codec: str) -> BinaryIO:
    stream: Any = pa.CompressedInputStream(file, codec)
    return io.BufferedReader(stream, _BUFFER_BYTES)


def _local_files(path: str) -> tuple[str, list[str]]:
    place = Path(path)
    if place.is_file():
        return str(place.parent), [path]
    if place.is_dir():
        below = glob.glob(f"{glob.escape(path)}/**/*", recursive=True)
        return path, sorted(name for name in below if _is_data(name, root=path))
    if not _PATTERN.search(path):
        raise DataError(f"{path}: no such file; check the path in the configuration")
    root = str(PurePosixPath(_PATTERN.split(path, maxsplit=1)[0] + "x").parent)
    return root, sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())


def _remote_files(path: str, protocol: str) -> tuple[str, list[str]]:
    try:
        system, place = fsspec.url_to_fs(path)
        if _PATTERN.search(path):
            found = [name for name in system.glob(place) if system.isfile(name)]
            place = _PATTERN.split(place, maxsplit=1)[0]
        elif system.isdir(place):
            found = [name for name in system.find(place) if _is_data(name, root=place)]
        else:
            found = [place] if system.exists(place) else []
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("err") or first_line(error)
        raise DataError(f"{path}: {protocol}:// needs a package: {package}") from error
    except ValueError as error:  # a protocol that fsspec does not know
        raise DataError(f"{path}: {first_line(error)}; check the beginning of the URL") from error
    except Exception as error:
        # Each store has errors of its own: of the network, of credentials, of its own classes.
        raise DataError(f"{path}: cannot be listed ({first_line(error)})") from error
    return place, sorted(system.unstrip_protocol(name) for name in found)


def _is_data(name: str, *, root: str) -> bool:
    """Whether a file below `root` is neither hidden, nor a note beside the data."""
    parts = PurePosixPath(name).relative_to(root).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return not hidden and not _NO_DATA.fullmatch(parts[-1]) and not Path(name).is_dir()


def _of_split(found: Sequence[str], *, split: str, path: str, root: str) -> list[str]:
    names = {name: name.partition(root)[2] if root else name for name in found}
    # First as a word of its own: `train` is not meant where it begins `train_gen`.
    for borders in ("/.-", "/._ 0123456789-"):
        word = re.compile(rf"(^|[{borders}]){re.escape(split)}([{borders}]|$)")
        if chosen := [name for name, shown in names.items() if word.search(shown)]:
            return chosen
    more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
    raise DataError(
        f"{path}: split '{split}' is in the name of no file (found: "
        f"{', '.join(name.lstrip('/') for name in list(names.values())[:_NAMES_SHOWN])}{more}); "
        f"name the files of the split as its path, or correct the split"
    )
