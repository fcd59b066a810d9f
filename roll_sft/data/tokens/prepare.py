"""Sources -> token caches, each shard prepared once, and the account of what became of every row.

All shards that are missing, of all sources, are prepared together: here, by processes, or by
whatever `CachePlace.spread` brings. A source's report joins what its shards' folders say, so a run
that finds everything ready reports what the first one did.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.errors import DataError
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.rows.shards import MAX_NAMES
from roll_sft.data.rows.sources import tell_left_aside, warn_of_unused
from roll_sft.data.tokens.build_shard import (
    MALFORMED,
    OVERLONG,
    Filled,
    ShardTask,
    SourceOptions,
    address,
    check_row_errors,
    ready,
)
from roll_sft.data.tokens.cache import PLACES_SHOWN, CacheFacts, SourceTokens, TokenCache
from roll_sft.data.tokens.file_index import known_files
from roll_sft.data.tokens.report import SourceReport
from roll_sft.data.tokens.workers import Spread, spread_for

_log = logging.getLogger(__name__)

_NOTICE_S = 10.0
_GIB = 1 << 30
_DROPPED_SHARE = 0.05  # of the rows of a source, above which they are worth a warning


@dataclass(frozen=True, slots=True)
class Source:
    """What a user names: a path, see `files.find_files`, the name it has in reports, its split."""

    path: str
    name: str
    split: str | None = None


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Where tokens are kept, and who prepares them.

    `num_proc` processes of this machine, None for as many as its cores and the data ask for, or
    else `spread`. Nobody where the cache is `only_read`, and then nothing is written there.
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
    """Return the tokens and the report of each source, filling the cache where need be.

    Raises `DataError` if a source is unusable (see `shards`), has a malformed row or too many of
    them (see `SourceOptions`), or leaves nothing to train on; `ResourceError` if the cache cannot
    be written or a process that prepares it dies.
    """
    # First of all: it says in one sentence what is wrong with a path that cannot be read.
    tasks = [_tasks(source, tokenizer, options, place) for source in sources]
    found = {task.folder: ready(task.folder) for each in tasks for task in each}
    missing: dict[Path, ShardTask] = {}
    for task in (task for each in tasks for task in each):
        facts = found[task.folder]
        if facts is None:
            missing.setdefault(task.folder, task)
        else:
            check_row_errors(facts, task)
    if missing and place.only_read:
        raise NotPreparedError(
            f"{place.folder}: lacks the tokens of {len(missing)} of {len(found)} parts of the data;"
            " prepare_only=true makes them"
        )
    filled = _fill_all(list(missing.values()), tokenizer, place)
    known = {folder: facts for folder, facts in found.items() if facts is not None}
    known |= {each.task.folder: each.facts for each in filled if each.facts is not None}
    new = {each.task.folder for each in filled if each.is_new}
    return [
        _finished(source, own, [known[task.folder] for task in own], new)
        for source, own in zip(sources, tasks, strict=True)
    ]


def _tasks(
    source: Source, tokenizer: ChatTokenizer, options: SourceOptions, place: CachePlace
) -> list[ShardTask]:
    files = known_files(
        source.path,
        split=source.split,
        keys=options.keys,
        cache_dir=place.folder,
        remembers=not place.only_read,
    )
    return [
        ShardTask(
            shard=shard,
            shape=file.shape,
            stamp=file.stamp,
            options=options,
            folder=place.folder / address(shard, file.shape, tokenizer=tokenizer, options=options),
        )
        for file in files
        for shard in file.shards
    ]


def _fill_all(
    tasks: Sequence[ShardTask], tokenizer: ChatTokenizer, place: CachePlace
) -> list[Filled]:
    if not tasks:
        return []
    progress = _Progress(tasks)
    done: list[Filled] = []
    while tasks:
        spread = place.spread or spread_for(tasks, num_proc=place.num_proc)
        in_other_hands = []
        # Closed by us whatever happens: left to the collector, it would outlive an interrupt.
        with closing(spread(tokenizer, tasks)) as results:
            for filled in results:
                if filled.facts is None:
                    in_other_hands.append(replace(filled.task, wait=True))
                else:
                    done.append(filled)
                    progress.add(filled)
        # Last of all, what another run was at: by now it may be done, or dead.
        tasks = in_other_hands
    progress.end()
    return done


class _Progress:
    """Lines about a preparation that takes long."""

    def __init__(self, tasks: Sequence[ShardTask]) -> None:
        self._num_shards, self._num_bytes = len(tasks), sum(task.num_bytes for task in tasks)
        self._started = self._spoken = time.monotonic()
        self._shards = self._bytes = self._tokens = 0

    def add(self, filled: Filled) -> None:
        self._shards += 1
        self._bytes += filled.task.num_bytes
        self._tokens += filled.facts.tokens if filled.facts else 0
        now = time.monotonic()
        if now - self._spoken < _NOTICE_S or self._shards == self._num_shards:
            return
        self._spoken = now
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


def _finished(
    source: Source, tasks: Sequence[ShardTask], facts: Sequence[CacheFacts], new: set[Path]
) -> tuple[SourceTokens, SourceReport]:
    """The tokens and the report of one source, all of whose shards are ready."""
    options = tasks[0].options
    if not any(each.kept for each in facts):
        raise DataError(_nothing_kept(source, facts, options))
    _check_malformed(source, tasks, facts)
    used = {column for each in facts for column in each.columns_used}
    warn_of_unused(options.keys, used, path=source.path)
    aside = {column for each in facts for column in each.columns_left_aside}
    tell_left_aside(aside, source=source.name)
    caches = tuple(TokenCache(task.folder) for task in tasks)
    tokens = sum(each.tokens for each in facts)
    supervised = sum(each.supervised_tokens for each in facts)
    report = SourceReport(
        name=source.name,
        path=source.path,
        rows=sum(each.rows for each in facts),
        kept=sum(each.kept for each in facts),
        dropped=_summed([each.dropped for each in facts]),
        dropped_places=_places(tasks, facts),
        truncated=sum(each.truncated for each in facts),
        samples=sum(each.samples for each in facts),
        dropped_samples=_summed([each.dropped_samples for each in facts]),
        tokens=tokens,
        supervised_tokens=supervised,
        supervised_share=supervised / tokens,
        length=_quantiles(np.concatenate([cache.lengths for cache in caches])),
        columns_left_aside=sorted(aside)[:MAX_NAMES],
        cached=new.isdisjoint(task.folder for task in tasks),
    )
    _warn_of_dropped(report, longest=max(each.longest_overlong for each in facts))
    return SourceTokens(source.name, caches), report


def _warn_of_dropped(report: SourceReport, *, longest: int) -> None:
    """Say how to keep the rows and samples that are left out, where they are many."""
    num_samples = sum(report.dropped_samples.values())
    for what, number, whole, reasons in (
        ("rows", report.rows - report.kept, report.rows, report.dropped),
        ("samples", num_samples, report.samples + num_samples, report.dropped_samples),
    ):
        if number <= _DROPPED_SHARE * whole:
            continue
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        remedy = "roll-sft preview --dropped shows them"
        if OVERLONG in reasons:
            remedy = (
                f"data.sequence_length={longest} keeps all that are overlong, data.overlong="
                "truncate their beginnings"
            )
        _log.warning(
            "%s: %.3g %% of its %s are left out (%s of %s: %s); %s",
            report.name,
            100 * number / whole,
            what,
            f"{number:,}",
            f"{whole:,}",
            counts,
            remedy,
        )


def _check_malformed(
    source: Source, tasks: Sequence[ShardTask], facts: Sequence[CacheFacts]
) -> None:
    """Raise if too many rows are malformed; say how many were skipped otherwise."""
    malformed, rows = sum(each.dropped.get(MALFORMED, 0) for each in facts), _rows(facts)
    if malformed == 0:
        return
    limit = tasks[0].options.max_bad_fraction
    reason = next(each.first_malformed for each in facts if each.first_malformed)
    first = f"{_places(tasks, facts)[MALFORMED][0]}: {reason}"
    if malformed > limit * rows:
        raise DataError(
            f"{source.path}: {malformed} of {rows} rows are malformed, more than "
            f"data.max_bad_fraction={limit}; mend them or raise it (the first: {first})"
        )
    _log.warning("skipped %d of %d rows as malformed (the first: %s)", malformed, rows, first)


def _nothing_kept(source: Source, facts: Sequence[CacheFacts], options: SourceOptions) -> str:
    dropped, length = _summed([each.dropped for each in facts]), options.sequence_length
    if overlong := dropped.get(OVERLONG, 0):
        shortest = min(each.shortest_overlong for each in facts if each.shortest_overlong)
        return (
            f"{source.path}: data.sequence_length={length} is shorter than every sample (the "
            f"shortest of {overlong} has {shortest} tokens); raise "
            f"data.sequence_length to at least {shortest}"
        )
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
    malformed = next((each.first_malformed for each in facts if each.first_malformed), "")
    first = f"; the first malformed one: {malformed}" if malformed else ""
    return (
        f"{source.path}: none of its {_rows(facts)} rows can be trained on ({counts}); mend the "
        f"rows or name another source{first}"
    )


def _places(tasks: Sequence[ShardTask], facts: Sequence[CacheFacts]) -> dict[str, list[str]]:
    """The first places of each reason, over all shards."""
    places: dict[str, list[str]] = {}
    for task, each in zip(tasks, facts, strict=True):
        for reason, found_at in each.dropped_at.items():
            found = places.setdefault(reason, [])
            found += map(task.place_of, found_at)
            del found[PLACES_SHOWN:]
    return places


def _rows(facts: Sequence[CacheFacts]) -> int:
    return sum(each.rows for each in facts)


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for each in counts:
        total.update(each)
    return dict(total)


def _quantiles(lengths: NDArray[Any]) -> dict[str, int]:
    """Return lengths that occur: the smallest one that at least p percent do not exceed."""
    up_to = np.cumsum(np.bincount(lengths))  # counted, not sorted: they are few and small
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: int(np.searchsorted(up_to, max(1, math.ceil(share * lengths.size))))
        for name, share in shares.items()
    }
