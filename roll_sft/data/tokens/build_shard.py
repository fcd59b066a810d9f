"""One shard of a source -> its folder in the token cache.

Promises:
- a folder that carries its final name is complete: it is written beside and renamed;
- runs that need the same folder prepare it once, and go on with other shards meanwhile; a damaged
  folder is prepared again;
- every row that is read is kept, or counted under one reason; every sample is whole, or counted;
- memory holds one batch of rows, not the shard.
"""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from roll_sft.base.errors import DataError, ResourceError
from roll_sft.base.files import sync
from roll_sft.data.chat.chat import ChatTokenizer, TokenizedSample, UnusableRow
from roll_sft.data.rows.columns import ColumnKeys, RowFormat
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.shards import Shard, ShardRows
from roll_sft.data.tokens.cache import (
    ARRAYS,
    FORMAT,
    PER_SAMPLE,
    REPORT_FILE,
    ShardReport,
    check_arrays,
    read_report,
)

_log = logging.getLogger(__name__)

_ROWS_PER_BATCH = 1024
_LOCK_NOTICE_S = 30.0

# Why a row is dropped.
MALFORMED = "malformed"
OVERLONG = "overlong"
UNSUPERVISED = "no_supervised_tokens"
EMPTY = "empty_response"


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How the rows of a source become samples.

    `sequence_length`: tokens, unpadded; `overlong` is what happens to samples that have more.
    `on_bad_row`: "error" ends the run at the first malformed row; "skip" counts them, and ends it
    if they are more than `max_bad_fraction` of the rows.
    """

    keys: ColumnKeys
    sequence_length: int
    on_bad_row: Literal["error", "skip"]
    max_bad_fraction: float
    overlong: Literal["drop", "truncate", "error"] = "drop"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to prepare into `folder`.

    `stamp` is what `stamp_of` returned before the file was hashed. `wait`: if another run has the
    folder in hand, wait for it.
    """

    shard: Shard
    row_format: RowFormat | None
    stamp: tuple[int, int] | None
    options: SourceOptions
    folder: Path
    wait: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the file that are read, at most."""
        if self.shard.kind in ("lines", "array"):
            return self.shard.stop - self.shard.start
        return self.stamp[0] if self.stamp else 0

    def place_of(self, at: Sequence[int]) -> str:
        """The place in the file of a row `at` [line, row] of a `ShardReport`."""
        line, row = at
        return self.shard.place_of(self.shard.first_line + line, row)


@dataclass(frozen=True, slots=True)
class BuiltShard:
    """A task that was tried. `report` is None if another run has the folder in hand.

    `is_new`: this try made the folder.
    """

    task: ShardTask
    report: ShardReport | None
    is_new: bool


def address(
    shard: Shard, row_format: RowFormat | None, *, tokenizer: ChatTokenizer, options: SourceOptions
) -> str:
    """The name of a shard's folder: hexadecimal SHA-256 of all that decides its samples.

    Options that decide only whether a run goes on (`on_bad_row`, `overlong` as an error) are
    checked each time and left out.
    """
    parts = (
        FORMAT,
        shard.content_hash,
        row_format,
        tokenizer.fingerprint,
        asdict(options.keys),
        options.sequence_length,
        options.overlong == "truncate",
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def stamp_of(file: str) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in nanoseconds; None if it is no local file."""
    try:
        status = Path(file).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def ready(folder: Path, *, warn: bool = False) -> ShardReport | None:
    """Return the report of a complete folder, else None; `warn` about a damaged one."""
    try:
        report = read_report(folder)
        check_arrays(folder, report, PER_SAMPLE)
        return report
    except DataError as damage:
        if warn and folder.exists():
            _log.warning("%s; preparing it again", damage)
        return None


def build_shard(tokenizer: ChatTokenizer, task: ShardTask) -> BuiltShard:
    """Make the folder of `task` unless it is there, or another run has it in hand.

    Raises `DataError` for a source that cannot be used, and `ResourceError` if the folder cannot be
    written.
    """
    folder = task.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, wait=task.wait) as is_ours:
            if not is_ours:
                return BuiltShard(task, None, is_new=False)
            if report := ready(folder, warn=True):  # another run has made it meanwhile
                return BuiltShard(task, report, is_new=False)
            return BuiltShard(task, _publish(tokenizer, task), is_new=True)
    except OSError as error:
        raise ResourceError(
            f"{folder.parent}: cannot hold the tokens of {task.shard.file} ({error}); make room "
            f"there or set data.cache_dir"
        ) from error


def check_row_errors(report: ShardReport, task: ShardTask) -> None:
    """Raise `DataError`, with the place, for a row that the options make an error."""
    if report.dropped or report.first_overlong:
        from roll_sft.data.tokens.dropped_rows import refuse_row

        refuse_row(report, task)


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of `folder` and give True; give False if it is held and `wait` is not set.

    The system frees the lock of a process that dies, so waiting ends.
    """
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=_LOCK_NOTICE_S if wait else 0)
            break
        except Timeout:
            if not wait:
                yield False
                return
            _log.warning("waiting for another run that prepares %s", folder)
    try:
        yield True
    finally:
        lock.release()


def _publish(tokenizer: ChatTokenizer, task: ShardTask) -> ShardReport:
    """Under the lock: make the folder of `task`, in place of a damaged one."""
    folder = task.folder
    for abandoned in folder.parent.glob(f".{folder.name}.*.tmp"):  # whose writer has died
        shutil.rmtree(abandoned)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        report = _build(unfinished, tokenizer, task)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def _build(folder: Path, tokenizer: ChatTokenizer, task: ShardTask) -> ShardReport:
    report, source_file = ShardReport(), task.shard.file
    rows = ShardRows(task.shard, task.options.keys, row_format=task.row_format)
    with ExitStack() as stack:
        files = {
            array: stack.enter_context((folder / f"{array}.bin").open("wb")) for array in ARRAYS
        }

        def append(array: str, values: NDArray[Any]) -> None:
            report.crc32[array] = zlib.crc32(values.data, report.crc32.get(array, 0))
            values.tofile(files[array])

        for array, dtype in ARRAYS.items():
            append(array, np.zeros(1 if array == "offsets" else 0, dtype))
        while batch := list(islice(rows, _ROWS_PER_BATCH)):
            columns = _Columns(end=report.tokens)
            _add_rows(batch, tokenizer, task, report=report, columns=columns)
            check_row_errors(report, task)
            for array, values in columns.arrays().items():
                append(array, values)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if set(report.weights) == {1.0}:
        report.weights.clear()
    if task.stamp is not None and stamp_of(source_file) != task.stamp:
        raise DataError(f"{source_file}: changed while it was read; run again once it is written")
    report.columns_used = sorted(rows.used)
    report.columns_left_aside = sorted(rows.left_aside)
    with (folder / REPORT_FILE).open("w", encoding="utf-8") as report_file:
        json.dump(asdict(report), report_file, indent=1)
        report_file.flush()
        os.fsync(report_file.fileno())
    sync(folder)
    return report


@dataclass(slots=True)
class _Columns:
    """The arrays of one batch of rows, as lists. `end`: tokens of the shard up to here."""

    end: int
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    label_mask: list[NDArray[np.uint8]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)

    def add(self, sample: TokenizedSample, *, row: int, num_supervised: int) -> None:
        self.end += sample.token_ids.size
        self.tokens.append(sample.token_ids)
        self.label_mask.append(sample.label_mask)
        self.offsets.append(self.end)
        self.rows.append(row)
        self.supervised.append(num_supervised)

    def arrays(self) -> dict[str, NDArray[Any]]:
        values: dict[str, Any] = {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]),
            "label_mask": np.concatenate([np.empty(0, np.uint8), *self.label_mask]),
            "offsets": self.offsets,
            "rows": self.rows,
            "supervised": self.supervised,
        }
        return {array: np.asarray(values[array], dtype) for array, dtype in ARRAYS.items()}


def _add_rows(
    rows: Sequence[Conversation | Document | BadRow],
    tokenizer: ChatTokenizer,
    task: ShardTask,
    *,
    report: ShardReport,
    columns: _Columns,
) -> None:
    """Add the samples of each row to `columns`, or count why it has none."""
    results = iter(tokenizer.tokenize_many([row for row in rows if not isinstance(row, BadRow)]))
    for row in rows:
        report.rows += 1
        at = [row.line - task.shard.first_line, row.row]
        result = row if isinstance(row, BadRow) else next(results)
        if isinstance(result, BadRow) and result.is_empty:
            report.drop(EMPTY, at=at)
        elif isinstance(row, BadRow) or isinstance(result, BadRow | UnusableRow):
            if not report.first_malformed:  # finding the reason tries templates, which takes time
                report.first_malformed = row.reason if isinstance(row, BadRow) else str(result)
            report.drop(MALFORMED, at=at)
        else:
            _add_samples(result, at, task.options, report=report, columns=columns)
            report.weights += [row.weight] * (report.samples - len(report.weights))


def _add_samples(
    samples: Sequence[TokenizedSample],
    at: list[int],
    options: SourceOptions,
    *,
    report: ShardReport,
    columns: _Columns,
) -> None:
    """Add the samples of the row `at` [line, row], cut if need be; count those that are dropped."""
    reasons: list[str] = []
    for sample in samples:
        length = sample.token_ids.size
        if length > options.sequence_length:
            report.first_overlong = report.first_overlong or [*at, length]
            report.shortest_overlong = min(report.shortest_overlong or length, length)
            report.longest_overlong = max(report.longest_overlong, length)
        result = fitted(sample, options)
        if isinstance(result, str):
            reasons.append(result)
            continue
        kept, is_cut = result
        num_supervised = int(np.count_nonzero(kept.label_mask))
        report.samples += 1
        report.truncated += is_cut
        report.tokens += kept.token_ids.size
        report.supervised_tokens += num_supervised
        columns.add(kept, row=at[1], num_supervised=num_supervised)
    if len(reasons) == len(samples):
        report.drop(reasons[0] if reasons else UNSUPERVISED, at=at)
        return
    report.kept += 1
    for reason in reasons:
        report.dropped_samples[reason] = report.dropped_samples.get(reason, 0) + 1


def fitted(sample: TokenizedSample, options: SourceOptions) -> tuple[TokenizedSample, bool] | str:
    """Return the sample to keep and whether it was cut, or the reason why it is dropped."""
    limit = options.sequence_length
    if sample.token_ids.size > limit and options.overlong != "truncate":
        return OVERLONG
    if not sample.label_mask.any():
        return UNSUPERVISED
    if sample.token_ids.size <= limit:
        return sample, False
    from roll_sft.data.tokens.truncate import cut_sample

    cut = cut_sample(sample, limit)
    return (cut, True) if cut.label_mask.any() else OVERLONG
