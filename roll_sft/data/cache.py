"""Samples as memory maps: the files of a token cache, and how they are read.

A folder holds, for n samples of together L tokens:
- tokens.bin int32 [L], label_mask.bin uint8 [L]: each sample unpadded, one after the other. The
  mask says that the token at t predicts t + 1 and that this is trained on (shifted in `data.chat`);
- offsets.bin int64 [n + 1]: sample i is offsets[i]:offsets[i + 1];
- rows.bin int64 [n], the row of the source; supervised.bin int32 [n], how many of the mask are set;
- report.json: what happened to each row. It also says what sizes the other files must have.

Nothing in a folder depends on the layout of a run. `data.prepare` makes the folders.
"""

import functools
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roll_sft.errors import DataError

# Raise it when the files change their meaning: older folders are then prepared again.
FORMAT = 2
ARRAYS: Mapping[str, type[np.generic]] = {
    "tokens": np.int32,
    "label_mask": np.uint8,
    "offsets": np.int64,
    "rows": np.int64,
    "supervised": np.int32,
}
REPORT_FILE = "report.json"

_PLACES_SHOWN = 3


@dataclass(slots=True)
class CacheFacts:
    """The content of report.json: all but the name and place of the source, which may change.

    `dropped_lines` has the first lines for each reason, `first_malformed` why the first of the
    malformed rows is one, `shortest_overlong` the tokens of the shortest sample that was too long
    (0 without one), `length` the tokens per sample as min, p50, p90, p99 and max.
    """

    format: int = FORMAT
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_lines: dict[str, list[int]] = field(default_factory=dict)
    first_malformed: str = ""
    shortest_overlong: int = 0
    length: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, *, line: int) -> None:
        """Count one row under `reason`."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        lines = self.dropped_lines.setdefault(reason, [])
        if len(lines) < _PLACES_SHOWN:
            lines.append(line)


class TokenCache:
    """The samples of one folder, mapped into memory when first used and not before.

    Travels between processes as the path of its folder.
    """

    def __init__(self, folder: Path) -> None:
        # Absolute: another process may have another current folder.
        self.folder = folder.absolute()

    @classmethod
    def open(cls, folder: Path) -> "TokenCache":
        """Return the cache in `folder`, mapped; raise `DataError` if it is damaged or missing."""
        cache = cls(folder)
        len(cache)
        return cache

    def __reduce__(self) -> tuple[type["TokenCache"], tuple[Path]]:
        return TokenCache, (self.folder,)

    def __len__(self) -> int:
        return int(self.rows.size)

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return token ids int32 [length] and label mask uint8 [length]: read-only views."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._maps["tokens"][start:end], self._maps["label_mask"][start:end]

    @functools.cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample, int32 [n]."""
        return np.diff(self._offsets).astype(np.int32)

    @property
    def supervised(self) -> NDArray[np.int32]:
        """Supervised tokens of each sample, int32 [n]."""
        return self._maps["supervised"]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of the source that each sample comes from, int64 [n], ascending."""
        return self._maps["rows"]

    @property
    def _offsets(self) -> NDArray[np.int64]:
        return self._maps["offsets"]

    @functools.cached_property
    def _maps(self) -> Mapping[str, NDArray[Any]]:
        read_facts(self.folder)
        # As plain arrays: a slice of np.memmap costs ten times that of an array.
        return {
            array: np.asarray(np.memmap(self.folder / f"{array}.bin", dtype, mode="r"))
            for array, dtype in ARRAYS.items()
        }


class TokenSet:
    """Several caches one after the other, under one running index.

    Travels between processes as names and paths, a few hundred bytes.
    """

    def __init__(self, names: Sequence[str], caches: Sequence[TokenCache]) -> None:
        assert len(names) == len(caches) > 0, f"{len(names)} names for {len(caches)} caches"
        self.names = tuple(names)
        self.caches = tuple(caches)

    def __reduce__(self) -> tuple[type["TokenSet"], tuple[tuple[str, ...], tuple[TokenCache, ...]]]:
        return TokenSet, (self.names, self.caches)

    def __len__(self) -> int:
        return self._starts[-1]

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return token ids int32 [length] and label mask uint8 [length]: read-only views."""
        source, local = self._locate(index)
        return self.caches[source].sample(local)

    def sample_name(self, index: int) -> str:
        """Return "<name of the source>:<row of it, from 0>"."""
        source, local = self._locate(index)
        return f"{self.names[source]}:{int(self.caches[source].rows[local])}"

    @property
    def ranges(self) -> Mapping[str, range]:
        """The indices of each source's samples."""
        return dict(zip(self.names, starmap(range, pairwise(self._starts)), strict=True))

    @functools.cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample, int32 [n]."""
        return np.concatenate([cache.lengths for cache in self.caches])

    @functools.cached_property
    def supervised(self) -> NDArray[np.int32]:
        """Supervised tokens of each sample, int32 [n]."""
        return np.concatenate([cache.supervised for cache in self.caches])

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([len(cache) for cache in self.caches]).tolist()]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return which cache, and which sample of it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        source = bisect_right(self._starts, index) - 1
        return source, index - self._starts[source]


def read_facts(folder: Path) -> CacheFacts:
    """Return report.json if the other files have the sizes it says; raise `DataError` if not."""
    try:
        facts = CacheFacts(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
        found = {array: (folder / f"{array}.bin").stat().st_size for array in ARRAYS}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: is no complete token cache ({error})") from error
    if facts.format != FORMAT:
        raise DataError(f"{folder}: has format {facts.format}, this version reads {FORMAT}")
    items = {
        "tokens": facts.tokens,
        "label_mask": facts.tokens,
        "offsets": facts.kept + 1,
        "rows": facts.kept,
        "supervised": facts.kept,
    }
    for array, dtype in ARRAYS.items():
        expected = items[array] * np.dtype(dtype).itemsize
        if found[array] != expected:
            raise DataError(
                f"{folder / array}.bin: has {found[array]} bytes and should have {expected}; the "
                f"token cache is damaged"
            )
    return facts
