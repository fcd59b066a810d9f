"""Sources -> token caches and reports, each shard prepared once.

The missing shards of all sources are prepared together: in this process, by several, or by
`CachePlace.spread`. The report of a source joins those of its shards, so a run that finds all of
them ready reports what the first one did.
"""

import functools
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.errors import DataError
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.rows.columns import log_left_aside, warn_of_unused
from roll_sft.data.rows.shards import MAX_NAMES
from roll_sft.data.tokens.build_shard import (
    BuiltShard,
    ShardTask,
    SourceOptions,
    address,
    build_shard,
    check_row_errors,
    ready,
)
from roll_sft.data.tokens.cache import (
    PLACES_SHOWN,
    ShardReport,
    SourceReport,
    SourceTokens,
    TokenCache,
)
from roll_sft.data.tokens.file_index import indexed_files

_log = logging.getLogger(__name__)

_NOTICE_S = 10.0
_GIB = 1 << 30
# Below this much text, starting processes takes longer than they save: the tokenizer's own threads
# do most of the work there is.
_SMALL_BYTES = 64 << 20

Spread = Callable[[ChatTokenizer, Sequence[ShardTask]], Generator[BuiltShard, None, None]]
"""Runs `build_shard` on each task, somewhere; yields the results as they are ready."""


@dataclass(frozen=True, slots=True)
class Source:
    """A path (see `rows.files`), its name in reports, and a split of it."""

    path: str
    name: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class CachePlace:
    """The folder of the token cache, and who fills it.

    `num_proc`: processes of this machine; None: as many as its cores and the data ask for.
    `spread`: used in place of these. `only_read`: nothing is prepared or written.
    """

    folder: Path
    num_proc: int | None = None
    spread: Spread | None = None
    only_read: bool = False


class NotPreparedError(DataError):
    """A cache that is only read lacks tokens of the data."""


def prepare_sources(
    sources: Sequence[Source],
    *,
    tokenizer: ChatTokenizer,
    options: SourceOptions,
    place: CachePlace,
) -> list[tuple[SourceTokens, SourceReport]]:
    """Return the tokens and the report of each source; prepare what the cache lacks.

    Raises `DataError` for a source that cannot be read, has a malformed row or too many of them
    (see `SourceOptions`), or has nothing to train on; `ResourceError` if the cache cannot be
    written or a process that prepares it dies.
    """
    tasks = [_tasks(source, tokenizer, options, place) for source in sources]
    reports = {task.folder: ready(task.folder) for own in tasks for task in own}
    missing: dict[Path, ShardTask] = {}
    for task in (task for own in tasks for task in own):
        if report := reports[task.folder]:
            check_row_errors(report, task)
        else:
            missing.setdefault(task.folder, task)
    if missing and place.only_read:
        raise NotPreparedError(
            f"{place.folder}: lacks the tokens of {len(missing)} of {len(reports)} parts of the"
            " data; prepare_only=true makes them"
        )
    new: set[Path] = set()
    for built in _build_all(list(missing.values()), tokenizer, place):
        reports[built.task.folder] = built.report
        if built.is_new:
            new.add(built.task.folder)
    ready_reports = {folder: report for folder, report in reports.items() if report}
    return [
        _joined(source, own, [ready_reports[task.folder] for task in own], new)
        for source, own in zip(sources, tasks, strict=True)
    ]


def _tasks(
    source: Source, tokenizer: ChatTokenizer, options: SourceOptions, place: CachePlace
) -> list[ShardTask]:
    files = indexed_files(
        source.path,
        split=source.split,
        keys=options.keys,
        cache_dir=place.folder,
        only_read=place.only_read,
    )
    return [
        ShardTask(
            shard=shard,
            row_format=file.row_format,
            stamp=file.stamp,
            options=options,
            folder=place.folder
            / address(shard, file.row_format, tokenizer=tokenizer, options=options),
        )
        for file in files
        for shard in file.shards
    ]


def _build_all(
    tasks: Sequence[ShardTask], tokenizer: ChatTokenizer, place: CachePlace
) -> list[BuiltShard]:
    if not tasks:
        return []
    progress = _Progress(tasks)
    done: list[BuiltShard] = []
    while tasks:
        spread = place.spread or spread_for(tasks, num_proc=place.num_proc)
        held_by_others = []
        # Closed here: the garbage collector would close it too late after an interrupt.
        with closing(spread(tokenizer, tasks)) as results:
            for built in results:
                if built.report is None:
                    held_by_others.append(replace(built.task, wait=True))
                else:
                    done.append(built)
                    progress.add(built)
        # The shards of another run come last: by then it may be done, or dead.
        tasks = held_by_others
    progress.end()
    return done


def spread_for(tasks: Sequence[ShardTask], *, num_proc: int | None) -> Spread:
    """In this process, or in `num_proc` of them; None: by the cores and the size of the data."""
    num_processes = min(len(tasks), num_proc or len(os.sched_getaffinity(0)))
    if num_proc is None and sum(task.num_bytes for task in tasks) < _SMALL_BYTES:
        num_processes = 1
    if num_processes <= 1:
        return _in_this_process
    from roll_sft.data.tokens.workers import over_processes

    return functools.partial(over_processes, num_processes=num_processes)


def _in_this_process(
    tokenizer: ChatTokenizer, tasks: Sequence[ShardTask]
) -> Generator[BuiltShard, None, None]:
    """One task after the other; the tokenizer uses all cores."""
    for task in tasks:
        yield build_shard(tokenizer, task)


class _Progress:
    """Log lines during a long preparation."""

    def __init__(self, tasks: Sequence[ShardTask]) -> None:
        self._num_shards, self._num_bytes = len(tasks), sum(task.num_bytes for task in tasks)
        self._started = self._last_line = time.monotonic()
        self._shards = self._bytes = self._tokens = 0

    def add(self, built: BuiltShard) -> None:
        self._shards += 1
        self._bytes += built.task.num_bytes
        self._tokens += built.report.tokens if built.report else 0
        now = time.monotonic()
        if now - self._last_line < _NOTICE_S or self._shards == self._num_shards:
            return
        self._last_line = now
        left_s = (now - self._started) * (self._num_bytes / max(1, self._bytes) - 1)
        _log.info(
            "preparing data: %d of %d shards, %.1f of %.1f GiB, %s tokens; about %.0f s left",
            self._shards,
            self._num_shards,
            self._bytes / _GIB,
            self._num_bytes / _GIB,
            f"{self._tokens:,}",
            left_s,
        )

    def end(self) -> None:
        took_s = time.monotonic() - self._started
        if took_s >= _NOTICE_S:
            _log.info("prepared %s tokens in %.0f s", f"{self._tokens:,}", took_s)


def _joined(
    source: Source, tasks: Sequence[ShardTask], shards: Sequence[ShardReport], new: set[Path]
) -> tuple[SourceTokens, SourceReport]:
    """The tokens and the report of one source, whose `shards` are all ready."""
    options, places = tasks[0].options, _places(tasks, shards)
    dropped = _summed([shard.dropped for shard in shards])
    dropped_samples = _summed([shard.dropped_samples for shard in shards])
    if dropped:
        from roll_sft.data.tokens.dropped_rows import check_dropped

        check_dropped(source.path, shards, options, dropped=dropped, places=places)
    used = {column for shard in shards for column in shard.columns_used}
    warn_of_unused(options.keys, used, path=source.path)
    aside = {column for shard in shards for column in shard.columns_left_aside}
    log_left_aside(aside, source=source.name)
    caches = tuple(TokenCache(task.folder) for task in tasks)
    tokens = sum(shard.tokens for shard in shards)
    supervised = sum(shard.supervised_tokens for shard in shards)
    report = SourceReport(
        name=source.name,
        path=source.path,
        rows=sum(shard.rows for shard in shards),
        kept=sum(shard.kept for shard in shards),
        dropped=dropped,
        dropped_places=places,
        truncated=sum(shard.truncated for shard in shards),
        samples=sum(shard.samples for shard in shards),
        dropped_samples=dropped_samples,
        tokens=tokens,
        supervised_tokens=supervised,
        supervised_share=supervised / tokens,
        length=_quantiles(np.concatenate([cache.lengths for cache in caches])),
        columns_left_aside=sorted(aside)[:MAX_NAMES],
        cached=new.isdisjoint(task.folder for task in tasks),
    )
    if dropped or dropped_samples:
        from roll_sft.data.tokens.dropped_rows import warn_of_dropped

        warn_of_dropped(report, longest=max(shard.longest_overlong for shard in shards))
    return SourceTokens(source.name, caches), report


def _places(tasks: Sequence[ShardTask], shards: Sequence[ShardReport]) -> dict[str, list[str]]:
    """The first places of each reason, over all shards."""
    places: dict[str, list[str]] = {}
    for task, shard in zip(tasks, shards, strict=True):
        for reason, found_at in shard.dropped_at.items():
            found = places.setdefault(reason, [])
            found += map(task.place_of, found_at)
            del found[PLACES_SHOWN:]
    return places


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(total)


def _quantiles(lengths: NDArray[Any]) -> dict[str, int]:
    """Return lengths that occur: the smallest one that at least p percent do not exceed."""
    up_to = np.cumsum(np.bincount(lengths))  # counted, not sorted: lengths are few and small
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: int(np.searchsorted(up_to, max(1, math.ceil(share * lengths.size))))
        for name, share in shares.items()
    }
