"""The splits of sources, as `datasets` writes them: `train[:20%]`, and `train` of a single file."""

import re
from pathlib import Path
from typing import Any

from roll_sft.base.errors import DataError
from roll_sft.data.rows.files import find_files, kind_of_file
from roll_sft.migrate.draft import Draft

_FIRST_ROWS = re.compile(r"(\w+)\[:(\d+)(%?)\]")
_PATTERN = re.compile(r"[*?\[]")


def settle_splits(draft: Draft) -> None:
    """Have each source name a split that is found in it, or none.

    The first rows of a split become as many samples in each epoch. A file, and a folder whose files
    name no split, is `train` as a whole for `datasets`.
    """
    for key in ("data.train", "data.validation"):
        if key in draft.lines:
            entries, origin = draft.lines[key]
            settled = (_settled(draft, key, _counted(draft, entry)) for entry in entries)
            draft.lines[key] = ([entry for entry in settled if entry is not None], origin)


def _counted(draft: Draft, entry: dict[str, Any]) -> dict[str, Any]:
    found = _FIRST_ROWS.fullmatch(str(entry.get("split")))
    if found is None:
        return entry
    split, count, is_share = found[1], int(found[2]), bool(found[3])
    draft.notes.append(
        f"{entry['path']}: {found[0]} takes the first rows; here as many are drawn in each epoch"
    )
    share = {"weight": count / 100} if is_share else {"samples": count}
    return {**entry, "split": split, **share}


def _settled(draft: Draft, key: str, entry: dict[str, Any]) -> dict[str, Any] | None:
    path, split = entry["path"], entry.get("split")
    if split is None or not _has_no_splits(path, split):
        return entry
    if split == "train":
        return {name: value for name, value in entry.items() if name != "split"}
    draft.cannot(f"split of {path}", split, f"this is train; set {key} to the files of {split}")
    return None


def _has_no_splits(path: str, split: str) -> bool:
    if kind_of_file(path) is not None and not _PATTERN.search(path):
        return True
    try:
        return Path(path).is_dir() and not find_files(path, split=split)
    except DataError:  # no file has it in its name
        return True
