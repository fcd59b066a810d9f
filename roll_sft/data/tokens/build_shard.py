"""One shard of a source -> its folder in the token cache.

What is promised:
- a folder that carries its final name is complete: it is written beside and renamed;
- runs that need the same folder prepare it once, and others go on with other shards meanwhile; a
  damaged one is prepared again;
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
from roll_sft.data.rows.columns import ColumnKeys, Shape
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.shards import Shard, read_shard
from roll_sft.data.tokens.cache import (
    ARRAYS,
    FORMAT,
    PER_SAMPLE,
    REPORT_FILE,
    CacheFacts,
    check_arrays,
    read_facts,
)

_log = logging.getLogger(__name__)

_ROWS_PER_BATCH = 1024
_LOCK_NOTICE_S = 30.0

MALFORMED = "malformed"
OVERLONG = "overlong"
UNSUPERVISED = "no_supervised_tokens"
EMPTY = "empty_response"


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How the rows of a source become samples.

    `sequence_length`: what becomes of samples of more tokens, unpadded, is said by `overlong`.
    `on_bad_row`: "error" ends the run at the first malformed row, "skip" counts them and ends it if
    they are more than `max_bad_fraction` of the rows.
    """

    keys: ColumnKeys
    sequence_length: int
    on_bad_row: Literal["error", "skip"]
    max_bad_fraction: float
    overlong: Literal["drop", "truncate", "error"] = "drop"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to prepare into `folder`.

    `stamp` is what the file looked like (size and time of its last change) before its bytes were
    hashed, None where that cannot be told. `wait` for another run that has the shard in hand.
    """

    shard: Shard
    shape: Shape | None
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
        """Where in the file a row lies of which `CacheFacts` know the line and the row."""
        line, row = at
        return self.shard.place_of(self.shard.first_line + line, row)


@dataclass(frozen=True, slots=True)
class Filled:
    """A task that was tried: `facts` are None where another run has the shard in hand.

    `is_new`: it was this try that made the folder.
    """

    task: ShardTask
    facts: CacheFacts | None
    is_new: bool


def address(
    shard: Shard, shape: Shape | None, *, tokenizer: ChatTokenizer, options: SourceOptions
) -> str:
    """The name of a shard's folder: hexadecimal SHA-256 of all that decides its samples.

    What only decides whether a run goes on (`on_bad_row`, `overlong` being an error) is checked
    each time and left out.
    """
    parts = (
        FORMAT,
        shard.content_hash,
        shape,
        tokenizer.fingerprint,
        asdict(options.keys),
        options.sequence_length,
        options.overlong == "truncate",
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def stamp_of(file: str) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in nanoseconds; None if it is no local file."""
    try:
        facts = Path(file).stat()
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def ready(folder: Path, *, warn: bool = False) -> CacheFacts | None:
    """Return the facts of a complete folder; `warn` about one that is there and is not complete."""
    try:
        facts = read_facts(folder)
        check_arrays(folder, facts, PER_SAMPLE)
        return facts
    except DataError as damage:
        if warn and folder.exists():
            _log.warning("%s; preparing it again", damage)
        return None


def fill(tokenizer: ChatTokenizer, task: ShardTask) -> Filled:
    """Make the folder of `task` unless it is there, or in another run's hands.

    Raises `DataError` for what makes the source unusable, and `ResourceError` if the folder cannot
    be written.
    """
    folder = task.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, wait=task.wait) as is_ours:
            if not is_ours:
                return Filled(task, None, is_new=False)
            if found := ready(folder, warn=True):  # another run had it ready meanwhile
                return Filled(task, found, is_new=False)
            return Filled(task, _published(tokenizer, task), is_new=True)
    except OSError as error:
        raise ResourceError(
            f"{folder.parent}: cannot hold the tokens of {task.shard.file} ({error}); make room "
            f"there or set data.cache_dir"
        ) from error


def check_row_errors(facts: CacheFacts, task: ShardTask) -> None:
    """Raise `DataError` for a row that the options make an error, with its place."""
    if task.options.on_bad_row == "error" and MALFORMED in facts.dropped:
        raise DataError(f"{task.place_of(facts.dropped_at[MALFORMED][0])}: {facts.first_malformed}")
    if task.options.overlong == "error" and facts.first_overlong:
        *at, length = facts.first_overlong
        raise DataError(
            f"{task.place_of(at)}: the sample has {length} tokens, more than"
            f" data.sequence_length={task.options.sequence_length}; raise it, or set"
            " data.overlong to drop or truncate"
        )


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of `folder` and say so, or say that it is held and `wait` is not asked for.

    The system frees it when its holder dies, so waiting ends.
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


def _published(tokenizer: ChatTokenizer, task: ShardTask) -> CacheFacts:
    """Under the lock: make the folder of `task`, in place of a damaged one."""
    folder = task.folder
    # Whoever wrote these held the lock, so they died.
    for abandoned in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(abandoned)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        facts = _build(unfinished, tokenizer, task)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return facts


def _build(folder: Path, tokenizer: ChatTokenizer, task: ShardTask) -> CacheFacts:
    facts, file_read = CacheFacts(), task.shard.file
    rows = read_shard(task.shard, task.options.keys, shape=task.shape)
    with ExitStack() as stack:
        files = {
            array: stack.enter_context((folder / f"{array}.bin").open("wb")) for array in ARRAYS
        }

        def append(array: str, values: NDArray[Any]) -> None:
            facts.crc32[array] = zlib.crc32(values.data, facts.crc32.get(array, 0))
            values.tofile(files[array])

        for array, dtype in ARRAYS.items():
            append(array, np.zeros(1 if array == "offsets" else 0, dtype))
        while batch := list(islice(rows, _ROWS_PER_BATCH)):
            columns = _Columns(end=facts.tokens)
            _take_batch(batch, tokenizer, task, facts=facts, columns=columns)
            check_row_errors(facts, task)
            for array, values in columns.arrays().items():
                append(array, values)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if task.stamp is not None and stamp_of(file_read) != task.stamp:
        raise DataError(f"{file_read}: changed while it was read; run again once it is written")
    facts.columns_used = sorted(rows.used)
    facts.columns_left_aside = sorted(rows.left_aside)
    with (folder / REPORT_FILE).open("w", encoding="utf-8") as report:
        json.dump(asdict(facts), report, indent=1)
        report.flush()
        os.fsync(report.fileno())
    sync(folder)
    return facts


@dataclass(slots=True)
class _Columns:
    """The arrays of one batch. `end` is where its last sample ends among all tokens."""

    end: int
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    label_mask: list[NDArray[np.uint8]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)

    def add(self, sample: TokenizedSample, *, row: int, supervised: int) -> None:
        self.end += sample.token_ids.size
        self.tokens.append(sample.token_ids)
        self.label_mask.append(sample.label_mask)
        self.offsets.append(self.end)
        self.rows.append(row)
        self.supervised.append(supervised)

    def arrays(self) -> dict[str, NDArray[Any]]:
        values: dict[str, Any] = {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]),
            "label_mask": np.concatenate([np.empty(0, np.uint8), *self.label_mask]),
            "offsets": self.offsets,
            "rows": self.rows,
            "supervised": self.supervised,
        }
        return {array: np.asarray(values[array], dtype) for array, dtype in ARRAYS.items()}


def _take_batch(
    batch: Sequence[Conversation | Document | BadRow],
    tokenizer: ChatTokenizer,
    task: ShardTask,
    *,
    facts: CacheFacts,
    columns: _Columns,
) -> None:
    """Put the samples of each row into `columns`, or count why it has none."""
    readable = [row for row in batch if not isinstance(row, BadRow)]
    results = iter(tokenizer.tokenize_many(readable))
    for row in batch:
        facts.rows += 1
        at = [row.line - task.shard.first_line, row.row]
        if isinstance(row, BadRow) and row.is_empty:
            facts.drop(EMPTY, at=at)
            continue
        result = row if isinstance(row, BadRow) else next(results)
        if isinstance(result, BadRow | UnusableRow):
            if not facts.first_malformed:  # the reason tries templates, which takes its time
                facts.first_malformed = result.reason if isinstance(result, BadRow) else str(result)
            facts.drop(MALFORMED, at=at)
            continue
        reasons: list[str] = []
        num_before = facts.samples
        for sample in result:
            length = sample.token_ids.size
            if length > task.options.sequence_length:
                facts.first_overlong = facts.first_overlong or [*at, length]
                facts.shortest_overlong = min(facts.shortest_overlong or length, length)
                facts.longest_overlong = max(facts.longest_overlong, length)
            if why := _take(sample, row.row, task.options, facts=facts, columns=columns):
                reasons.append(why)
        if facts.samples == num_before:
            facts.drop(reasons[0] if reasons else UNSUPERVISED, at=at)
            continue
        facts.kept += 1
        for reason in reasons:
            facts.dropped_samples[reason] = facts.dropped_samples.get(reason, 0) + 1


def _take(
    sample: TokenizedSample,
    row: int,
    options: SourceOptions,
    *,
    facts: CacheFacts,
    columns: _Columns,
) -> str | None:
    """Put one sample into `columns`, cut if need be, or return why it is dropped."""
    result = fitted(sample, options)
    if isinstance(result, str):
        return result
    kept, is_cut = result
    supervised = int(np.count_nonzero(kept.label_mask))
    facts.samples += 1
    facts.truncated += is_cut
    facts.tokens += kept.token_ids.size
    facts.supervised_tokens += supervised
    columns.add(kept, row=row, supervised=supervised)
    return None


def fitted(sample: TokenizedSample, options: SourceOptions) -> tuple[TokenizedSample, bool] | str:
    """Return the sample as it is kept, and whether it was cut; or why it is dropped."""
    limit = options.sequence_length
    if sample.token_ids.size > limit and options.overlong != "truncate":
        return OVERLONG
    if not sample.label_mask.any():
        return UNSUPERVISED
    if sample.token_ids.size <= limit:
        return sample, False
    cut = _cut(sample, limit)
    return (cut, True) if cut.label_mask.any() else OVERLONG


def _cut(sample: TokenizedSample, limit: int) -> TokenizedSample:
    """The beginning of `sample`, at most `limit` tokens and up to a span that may not be cut.

    Nothing is put in place of what is lost, least of all an end of turn.
    """
    stop = limit
    for start, end in sorted(sample.atomic, reverse=True):  # a span may lie in another
        if start < stop < end:
            stop = start
    label_mask = sample.label_mask[:stop].copy()
    label_mask[-1:] = 0  # what this token predicts is gone
    return TokenizedSample(sample.token_ids[:stop], label_mask)
