"""A path of a source -> the files it names, in a fixed order, and their bytes.

A path is a file, a folder (all files in it, at any depth), a pattern with `*`, a URL that fsspec
opens (`s3://...`, `memory://...`) of any of these, or org/name of a dataset of the hub if no file
has that name. Of a folder, hidden files and folders (first character a dot or an underscore), notes
beside the data, and tables that a saved data set does not list (`saved_folders`) are left out; any
other file that is no data is refused. The suffix of a file says what it holds.
"""

import glob
import io
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from roll_sft.base.errors import DataError, first_line
from roll_sft.data.rows.checks import shown

FileKind = Literal["json", "parquet", "arrow"]
_Form = Literal["file", "folder", "pattern"]

JSON_SUFFIXES = (".json", ".jsonl")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES: dict[str, FileKind] = {".parquet": "parquet", ".arrow": "arrow"}
ACCEPTED = ".json or .jsonl (also with .gz or .zst after it), .parquet or .arrow"

# Files beside data that are none: of folders that `datasets` writes, and notes for people.
_NO_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|.*\.(md|rst|txt|py|ya?ml)|(LICENSE|NOTICE)(\..*)?"
)
_PATTERN = re.compile(r"[*?\[]")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]+://")
_HUB_ID = re.compile(r"[\w\-][\w.\-]*/[\w\-][\w.\-]*(/[\w.\-]+)?")
_NAMES_SHOWN = 5
_BUFFER_BYTES = 1 << 16


def find_files(path: str, *, split: str | None = None) -> list[str]:
    """Return the files that `path` names, sorted; at least one, each of an accepted suffix.

    `split` keeps those that have it in their name, or in that of a folder below `path`. Raises
    `DataError` where there is no such file, or one that cannot be read.
    """
    if is_on_hub(path):
        from roll_sft.data.rows.hub import hub_files

        return hub_files(path, split=split)
    form, below = _remote_files(path) if _URL.match(path) else _local_files(path)
    if form != "file":
        below = _without_cache_files(below, form=form)
    if not below:
        raise DataError(f"{path}: no file here; give a file ending in {ACCEPTED}")
    for name in below:
        if kind_of_file(name) is None:
            suffix = PurePosixPath(name).suffix
            remedy = "" if name == path else ", or name the others with a pattern such as *.jsonl"
            raise DataError(
                f"{name}: suffix '{suffix}' is not accepted; give a file ending in {ACCEPTED}"
                f"{remedy}"
            )
    if split is not None:
        return _of_split(below, split=split, path=path)
    if form == "folder":
        from roll_sft.data.rows.saved_folders import SPLITS_FILE, check_one_split

        check_one_split(below, path=path, saved=_text_of(f"{path.rstrip('/')}/{SPLITS_FILE}"))
    return list(below)


def _without_cache_files(below: Mapping[str, str], *, form: _Form) -> dict[str, str]:
    from roll_sft.data.rows.saved_folders import without_cache_files

    rows = without_cache_files(list(below), _text_of, is_whole=form == "folder")
    return {name: below[name] for name in rows}


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
        with _open(name) as file:
            codec = compression_of(name) if decompress else None
            yield _decompressed(file, codec) if codec else file
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; check the path in the configuration") from None
    except OSError as error:  # pyarrow's too
        reason = error.strerror or first_line(error)
        raise DataError(
            f"{name}: cannot be read ({reason}); correct the file or its permissions"
        ) from error


def is_on_hub(path: str) -> bool:
    """Whether `path` means a dataset of the hub: it has that form, and no file or folder has it."""
    is_file_name = kind_of_file(path) is not None or PurePosixPath(path).suffix in COMPRESSIONS
    has_form = _HUB_ID.fullmatch(path) is not None
    return has_form and not is_file_name and _local_form(path) is None


@contextmanager
def _open(name: str) -> Iterator[BinaryIO]:
    if _URL.match(name):
        import fsspec

        with fsspec.open(name, "rb", compression=None) as remote:
            yield io.BufferedReader(remote)  # whose readline takes a size, as fsspec's does not
    else:
        path = Path(name)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"{name}: is a pipe, a device or a folder; give a file of data")
        with path.open("rb") as file:
            yield file


def _decompressed(file: BinaryIO, codec: str) -> BinaryIO:
    import pyarrow as pa

    stream: Any = pa.CompressedInputStream(file, codec)
    return io.BufferedReader(stream, _BUFFER_BYTES)


def _local_form(path: str) -> Literal["file", "folder"] | None:
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


def _local_files(path: str) -> tuple[_Form, dict[str, str]]:
    form = _local_form(path)
    if form == "file":
        return "file", {path: PurePosixPath(path).name}
    if form == "folder":
        found = glob.glob("**/*", root_dir=path, recursive=True)
        names = {f"{path.rstrip('/')}/{each}": each for each in found if _is_data(each)}
        return "folder", {name: names[name] for name in sorted(names) if not Path(name).is_dir()}
    if not _PATTERN.search(path):
        raise DataError(f"{path}: no such file; check the path in the configuration")
    found = [name for name in glob.glob(path, recursive=True) if Path(name).is_file()]
    return "pattern", _named(dict(zip(found, found, strict=True)), root=_before_pattern(path))


def _remote_files(path: str) -> tuple[_Form, dict[str, str]]:
    from roll_sft.data.rows.remote_files import list_url

    is_pattern = _PATTERN.search(path) is not None
    place, urls, is_folder = list_url(path, is_pattern=is_pattern)
    if is_pattern:
        return "pattern", _named(urls, root=_before_pattern(place))
    if not is_folder:
        return "file", _named(urls, root=str(PurePosixPath(place).parent))
    names = _named(urls, root=place)
    return "folder", {name: each for name, each in names.items() if _is_data(each)}


def _before_pattern(path: str) -> str:
    """The folder below which a pattern looks."""
    return str(PurePosixPath(_PATTERN.split(path, maxsplit=1)[0] + "x").parent)


def _named(places: Mapping[str, str], *, root: str) -> dict[str, str]:
    """The values of `places`, sorted by key, each with what its key is called below `root`."""
    return {places[each]: str(PurePosixPath(each).relative_to(root)) for each in sorted(places)}


def _text_of(name: str) -> str | None:
    try:
        with _open(name) as file:
            return bytes(file.read()).decode("utf-8", errors="replace")
    except OSError:
        return None


def _is_data(name: str) -> bool:
    """Whether a file of this name below a folder is neither hidden, nor a note beside the data."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return not hidden and not _NO_DATA.fullmatch(parts[-1])


def _of_split(names: Mapping[str, str], *, split: str, path: str) -> list[str]:
    # First as a word of its own: `train` is not meant where it begins `train_gen`.
    for borders in ("/.-", "/._ 0123456789-"):
        word = re.compile(rf"(^|[{borders}]){re.escape(split)}([{borders}]|$)")
        if chosen := [name for name, shown in names.items() if word.search(shown)]:
            return chosen
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    raise DataError(
        f"{path}: split '{split}' is in the name of no file (found: "
        f"{', '.join(list(names.values())[:_NAMES_SHOWN])}{more}); "
        f"name the files of the split as its path, or correct the split"
    )
