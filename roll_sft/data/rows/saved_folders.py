"""What folders that `datasets` wrote say of themselves: which files are rows, and of which splits.

`save_to_disk` lists its files in state.json; whatever else lies there (cache-*.arrow of `map` and
`filter`) holds the same rows again, changed. Folders without such a list are told by the names of
their files, as `datasets` tells them.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from roll_sft.base.errors import DataError

STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"

_CACHE_FILE = re.compile(r"(cache-[0-9a-f]+(_\d+_of_\d+)?|tmp\w+)\.arrow")
# The split that a file is of -> the words in its name that say so.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_NAMES = {
    split: re.compile(rf"(^|[/._ 0-9-])({'|'.join(words)})([/._ 0-9-]|$)")
    for split, words in _SPLIT_WORDS.items()
}

ReadText = Callable[[str], str | None]
"""The text of a file; None where there is no such file."""


def without_cache_files(names: Sequence[str], read_text: ReadText, *, is_whole: bool) -> list[str]:
    """Return `names` without tables that a folder's state.json does not list.

    Raises `DataError` for a state.json that is broken or, where `names` are to be a folder as a
    whole, that lists what is not among them.
    """
    by_folder: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".arrow"):
            by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    left_out: set[str] = set()
    for folder, tables in by_folder.items():
        prefix = f"{folder}/" if folder else ""
        text = read_text(f"{prefix}{STATE_FILE}")
        if text is None:
            left_out |= {each for each in tables if _CACHE_FILE.fullmatch(PurePosixPath(each).name)}
            continue
        listed = _listed(text, prefix=prefix)
        if is_whole and (missing := sorted(listed.difference(tables))):
            raise DataError(
                f"{missing[0]}: no such file, and {prefix}{STATE_FILE} lists it; copy the data set "
                f"again"
            )
        left_out |= set(tables) - listed
    return [name for name in names if name not in left_out]


def check_one_split(below: Mapping[str, str], *, path: str, saved: str | None) -> None:
    """Raise `DataError` if the files of a folder are of several splits.

    `below` are their names, and `saved` is the text of its dataset_dict.json, if it has one.
    """
    found: dict[str, str] = _saved_splits(saved)
    for name in below.values():
        places = {
            match.start(): split
            for split, pattern in _SPLIT_NAMES.items()
            if (match := pattern.search(name.lower()))
        }
        if places and saved is None:
            found.setdefault(places[min(places)], name)
    if len(found) > 1:
        raise DataError(
            f"{path}: its files are of the splits {' and '.join(found)} (such as "
            f"{' and '.join(found.values())}); choose one as the source's split, or name the files "
            f"with a pattern"
        )


def _saved_splits(text: str | None) -> dict[str, str]:
    try:
        return (
            {} if text is None else {str(name): f"{name}/" for name in json.loads(text)["splits"]}
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}  # the names of the files say it too


def _listed(text: str, *, prefix: str) -> set[str]:
    where = f"{prefix}{STATE_FILE}"
    try:
        state: Any = json.loads(text)
        names = {f"{prefix}{entry['filename']}" for entry in state["_data_files"]}
        has_indices = bool(state.get("_indices_data_files"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"{where}: does not list the data files; save the data set again") from None
    if has_indices:
        raise DataError(
            f"{where}: the rows are those that a table of indices selects; save the data set again "
            f"after flatten_indices()"
        )
    return names
