"""Folders, patterns, URLs and names of the hub -> the files that they mean, in a fixed order.

A path is a file, a folder (all files in it, at any depth), a pattern with `*`, a URL that fsspec
opens (`s3://...`, `memory://...`) of any of these, or org/name of a dataset of the hub if no file
has that name. Of a folder, hidden files and folders (first character a dot or an underscore), notes
beside the data, and tables that a saved data set does not list (`saved_folders`) are left out; any
other file that is no data is refused.
"""

import glob
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from roll_sft.base.errors import DataError
from roll_sft.data.rows.files import (
    ACCEPTED,
    COMPRESSIONS,
    URL,
    kind_of_file,
    local_form,
    raw_file,
)

_Form = Literal["file", "folder", "pattern"]

# Files beside data that are none: of folders that `datasets` writes, and notes for people.
_NO_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|.*\.(md|rst|txt|py|ya?ml)|(LICENSE|NOTICE)(\..*)?"
)
_PATTERN = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w\-][\w.\-]*/[\w\-][\w.\-]*(/[\w.\-]+)?")
_NAMES_SHOWN = 5


def listed_files(path: str, *, split: str | None) -> list[str]:
    """Return what `find_files` returns, and raise what it raises."""
    if is_on_hub(path):
        from roll_sft.data.rows.hub import hub_files

        return hub_files(path, split=split)
    form, below = _remote_files(path) if URL.match(path) else _local_files(path)
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


def is_on_hub(path: str) -> bool:
    """Whether `path` means a dataset of the hub: it has that form, and no file or folder has it."""
    is_file_name = kind_of_file(path) is not None or PurePosixPath(path).suffix in COMPRESSIONS
    has_form = _HUB_ID.fullmatch(path) is not None
    return has_form and not is_file_name and local_form(path) is None


def _local_files(path: str) -> tuple[_Form, dict[str, str]]:
    form = local_form(path)
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
        with raw_file(name) as file:
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
