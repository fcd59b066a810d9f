"""Samples as memory maps: the folders of a token cache, and how they are read.

A folder holds one shard of a source, n samples of together L tokens:
- tokens.bin int32 [L], label_mask.bin uint8 [L]: each sample unpadded, one after the other. The
  mask says that the token at t predicts t + 1 and that this is trained on (shifted in `chat.chat`);
- offsets.bin int64 [n + 1]: sample i is offsets[i]:offsets[i + 1];
- rows.bin int64 [n], the row of the shard; supervised.bin int32 [n], how many of the mask are set;
- report.json: what happened to each row. It also says what the other files must be: sizes, CRC-32.

Nothing in a folder depends on the layout of a run, nor on where the shard lies: lines count from
its beginning. `data.tokens.build_shard` makes the folders.
"""

import functools
import json
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.errors import DataError

# Raise it when the files change their meaning: older folders are then prepared again.
FORMAT = 5
ARRAYS: Mapping[str, type[np.generic]] = {
    "tokens": np.int32,
    "label_mask": np.uint8,
    "offsets": np.int64,
    "rows": np.int64,
    "supervised": np.int32,
}
PER_SAMPLE = ("offsets", "rows", "supervised")  # a planner reads them all, whatever it plans
REPORT_FILE = "report.json"
_CHUNK_BYTES = 1 << 22

PLACES_SHOWN = 3


@dataclass(slots=True)
class ShardReport:
    """The content of report.json: all but the name and place of the source, which may change.

    `rows` are `kept`, if they gave a sample, or `dropped` under one reason; `dropped_at` has the
    first places of each: [line, row], both from 0 at the beginning of the shard. Of a kept row that
    gives several, single samples may be missing, counted in `dropped_samples`; `truncated` samples
    were cut. `first_malformed` says why the first of the malformed rows is one. `first_overlong` is
    the line, the row and the tokens of the first sample that was too long, empty without one;
    `shortest_overlong` and `longest_overlong` are the tokens of those. `columns_used` are the
    optional columns, among those the user named, that a row had; `columns_left_aside` those that
    samples are not made of, keys of messages among them. `crc32` is of each array's file.
    """

    format: int = FORMAT
    rows: int = 0
    kept: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_at: dict[str, list[list[int]]] = field(default_factory=dict)
    dropped_samples: dict[str, int] = field(default_factory=dict)
    first_malformed: str = ""
    first_overlong: list[int] = field(default_factory=list)
    shortest_overlong: int = 0
    longest_overlong: int = 0
    crc32: dict[str, int] = field(default_factory=dict)
    columns_used: list[str] = field(default_factory=list)
    columns_left_aside: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of each sample; empty where all are 1

    def drop(self, reason: str, *, at: list[int]) -> None:
        """Count one row, which lies `at` [line, row], under `reason`."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.dropped_at.setdefault(reason, [])
        if len(places) < PLACES_SHOWN:
            places.append(at)


class TokenCache:
    """The samples of one folder, mapped into memory when first used and not before.

    Travels between processes as the path of its folder.
    """

    def __init__(self, folder: Path) -> None:
        # Absolute: another process may have another current folder.
        self.folder = folder.absolute()

    def __reduce__(self) -> tuple[type["TokenCache"], tuple[Path]]:
        return TokenCache, (self.folder,)

    def __len__(self) -> int:
        return self.report.samples

    @functools.cached_property
    def report(self) -> ShardReport:
        """What became of the rows, once the files are seen to be whole."""
        return read_report(self.folder)

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return token ids int32 [length] and label mask uint8 [length]: read-only views."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        offsets = self._offsets
        start, end = int(offsets[index]), int(offsets[index + 1])
        return self._tokens[start:end], self._label_mask[start:end]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample, int32 [n]."""
        return np.diff(self._offsets).astype(np.int32)

    @property
    def supervised(self) -> NDArray[np.int32]:
        """Supervised tokens of each sample, int32 [n]."""
        return self._map("supervised")

    @functools.cached_property
    def rows(self) -> NDArray[np.int64]:
        """The row of the shard that each sample comes from, int64 [n], ascending."""
        return self._map("rows")

    @functools.cached_property
    def _tokens(self) -> NDArray[np.int32]:
        return self._map("tokens")

    @functools.cached_property
    def _label_mask(self) -> NDArray[np.uint8]:
        return self._map("label_mask")

    @functools.cached_property
    def _offsets(self) -> NDArray[np.int64]:
        offsets, tokens = self._map("offsets"), self.report.tokens
        if offsets[0] != 0 or offsets[-1] != tokens:
            raise DataError(
                f"{self.folder}/offsets.bin: runs from {offsets[0]} to {offsets[-1]} and should"
                f" from 0 to {tokens}; the token cache is damaged, remove this folder"
            )
        return offsets

    def _map(self, array: str) -> NDArray[Any]:
        dtype, path = ARRAYS[array], self.folder / f"{array}.bin"
        if _items(self.report)[array] == 0:  # which the system does not map
            return np.empty(0, dtype)
        # As a plain array: a slice of np.memmap costs ten times that of an array.
        return np.asarray(np.memmap(path, dtype, mode="r"))


@dataclass(frozen=True, slots=True)
class SourceTokens:
    """The caches of a source's shards, in their order."""

    name: str
    caches: tuple[TokenCache, ...]


class TokenSet:
    """Several sources one after the other, under one running index.

    Travels between processes as names and paths, about a hundred bytes for each shard.
    """

    def __init__(self, sources: Sequence[SourceTokens]) -> None:
        assert sources, "a set of tokens without sources"
        self.sources = tuple(sources)

    def __reduce__(self) -> tuple[type["TokenSet"], tuple[tuple[SourceTokens, ...]]]:
        return TokenSet, (self.sources,)

    def __len__(self) -> int:
        return self._starts[-1]

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Return token ids int32 [length] and label mask uint8 [length]: read-only views."""
        shard, local = self._locate(index)
        return self.caches[shard].sample(local)

    def sample_name(self, index: int) -> str:
        """Return "<name of the source>:<row of it, from 0>"; rows count over all its files."""
        shard, local = self._locate(index)
        name, first_row = self._row_starts[shard]
        return f"{name}:{first_row + int(self.caches[shard].rows[local])}"

    @property
    def ranges(self) -> Mapping[str, range]:
        """The indices of each source's samples."""
        sizes = [sum(map(len, source.caches)) for source in self.sources]
        bounds = pairwise(accumulate(sizes, initial=0))
        names = [source.name for source in self.sources]
        return dict(zip(names, starmap(range, bounds), strict=True))

    @functools.cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample, int32 [n]."""
        return np.concatenate([cache.lengths for cache in self.caches])

    @functools.cached_property
    def supervised(self) -> NDArray[np.int32]:
        """Supervised tokens of each sample, int32 [n]."""
        return np.concatenate([cache.supervised for cache in self.caches])

    @functools.cached_property
    def weights(self) -> NDArray[np.float32] | None:
        """What each sample counts in the loss, float32 [n]; None where each counts 1."""
        if not any(cache.report.weights for cache in self.caches):
            return None
        return np.concatenate(
            [c.report.weights or np.ones(len(c)) for c in self.caches], dtype="f4"
        )

    @functools.cached_property
    def caches(self) -> tuple[TokenCache, ...]:
        """The shards of all sources, in the order of the index."""
        return tuple(cache for source in self.sources for cache in source.caches)

    @functools.cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(map(len, self.caches), initial=0))

    @functools.cached_property
    def _row_starts(self) -> list[tuple[str, int]]:
        """Of each shard, the name of its source and the row of the source that it begins with."""
        return [
            (source.name, first_row)
            for source in self.sources
            for first_row in [0, *accumulate(cache.report.rows for cache in source.caches[:-1])][
                : len(source.caches)
            ]
        ]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return which shard, and which sample of it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]


@dataclass(frozen=True, slots=True)
class TokenData:
    """The token caches of a run: one set to train on, validation sets by name."""

    train: TokenSet
    validation: dict[str, TokenSet]
    tool_call_ids: list[int] = field(default_factory=list)  # each begins a tool call

    @property
    def folders(self) -> list[Path]:
        """The folders of all token caches, each once."""
        sets = [self.train, *self.validation.values()]
        return list(dict.fromkeys(cache.folder for tokens in sets for cache in tokens.caches))


def read_report(folder: Path) -> ShardReport:
    """Return report.json if the other files have the sizes it says; raise `DataError` if not."""
    try:
        found = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        # First: another format may have other fields.
        if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
            raise DataError(
                f"{folder}: has format {found['format']}, this version reads {FORMAT}; remove it"
            )
        report = ShardReport(**found)
        sizes = {array: (folder / f"{array}.bin").stat().st_size for array in ARRAYS}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: is no complete token cache ({error})") from error
    items = _items(report)
    for array, dtype in ARRAYS.items():
        expected = items[array] * np.dtype(dtype).itemsize
        if sizes[array] != expected:
            raise DataError(
                f"{folder / array}.bin: has {sizes[array]} bytes and should have {expected}; the "
                f"token cache is damaged"
            )
    return report


def check_arrays(folder: Path, report: ShardReport, arrays: Sequence[str]) -> None:
    """Raise `DataError` where the bytes of `arrays` are not those that were written."""
    for array in arrays:
        path, found = folder / f"{array}.bin", 0
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    found = zlib.crc32(chunk, found)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        if report.crc32.get(array) != found:
            raise DataError(
                f"{path}: its bytes are not those that were written (CRC-32 {found:08x}); the"
                " token cache is damaged"
            )


def _items(report: ShardReport) -> Mapping[str, int]:
    return {
        "tokens": report.tokens,
        "label_mask": report.tokens,
        "offsets": report.samples + 1,
        "rows": report.samples,
        "supervised": report.samples,
    }


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What became of the rows of one source: an entry of `data_report.json`.

    `rows`: rows read; `kept` and the values of `dropped` add up to it.
    `dropped_places`: the first places ("file:line") for each reason in `dropped`.
    `samples`: a row can give several. `dropped_samples` counts samples left out of kept rows, by
    reason; `truncated` counts samples that were cut to `data.sequence_length`.
    `supervised_share`: supervised tokens / tokens.
    `length`: tokens per sample as min, p50, p90, p99 and max; empty in an estimate.
    `columns_left_aside`: columns, and keys of messages, that samples are not made of.
    `cached`: every shard was already in the token cache.
    """

    name: str
    path: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    dropped_places: Mapping[str, list[str]]
    truncated: int
    samples: int
    dropped_samples: Mapping[str, int]
    tokens: int
    supervised_tokens: int
    supervised_share: float
    length: Mapping[str, int]
    columns_left_aside: list[str]
    cached: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the report as an entry of `data_report.json`."""
        return asdict(self)
