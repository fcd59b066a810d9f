"""A source -> the folder of its token cache, filled once.

The address of the folder is the SHA-256 of all that decides what is in it: the bytes of the source,
the fingerprint of the tokenizer and its template, the options, the format. Nothing of the layout is
in it, so every layout reads the same folder.

What is promised:
- a folder under its final name is complete: it is written beside and renamed;
- two runs that need the same folder prepare it once; a damaged one is prepared again;
- every row that is read is kept, or counted under one reason;
- memory holds one batch of rows, not the source.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from roll_sft.data.cache import ARRAYS, FORMAT, REPORT_FILE, CacheFacts, read_facts
from roll_sft.data.chat import ChatTokenizer, TokenizedSample, UnusableRow
from roll_sft.data.conversation import BadRow, Conversation, Document
from roll_sft.data.shapes import ColumnKeys
from roll_sft.data.sources import read_conversations
from roll_sft.errors import DataError, ResourceError

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

    `sequence_length`: samples of more tokens, unpadded, are dropped. `on_bad_row`: "error" ends the
    run at the first malformed row, "skip" counts them and ends it if they are more than
    `max_bad_fraction` of the rows.
    """

    keys: ColumnKeys
    sequence_length: int
    on_bad_row: Literal["error", "skip"]
    max_bad_fraction: float


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What became of the rows of a source; `kept` and the values of `dropped` add up to `rows`.

    `dropped_places` has the first places ("path:line") for each reason, `length` the tokens per
    kept sample as min, p50, p90, p99 and max. `cached`: nothing had to be tokenised.
    """

    name: str
    path: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    dropped_places: Mapping[str, list[str]]
    truncated: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    length: Mapping[str, int]
    cached: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the report as an entry of `data_report.json`."""
        return asdict(self)


def prepare_source(
    path: Path,
    *,
    name: str,
    tokenizer: ChatTokenizer,
    options: SourceOptions,
    cache_dir: Path,
) -> tuple[Path, SourceReport]:
    """Return the folder in `cache_dir` that holds the samples of `path`, filling it if need be.

    Raises `DataError` if the source is unusable (see `read_conversations`), has a malformed row or
    too many of them (see `SourceOptions`), or leaves nothing to train on; `ResourceError` if
    `cache_dir` cannot be written.
    """
    # First of all: it says in one sentence what is wrong with a path that cannot be read.
    rows = read_conversations(str(path), options.keys)
    source = _Source(path, rows=rows, tokenizer=tokenizer, options=options)
    folder = cache_dir / _address(source)
    facts, cached = _ready(folder), True
    if facts is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                facts, cached = _ready_or_built(folder, source=source)
        except OSError as error:
            raise ResourceError(
                f"{cache_dir}: cannot hold the tokens of {path} ({error}); make room there or set "
                f"data.cache_dir"
            ) from error
    _check_malformed(facts, source=source)
    return folder, _report(facts, name=name, path=path, cached=cached)


@dataclass(frozen=True, slots=True)
class _Source:
    """What decides the samples; `rows` can be read once."""

    path: Path
    rows: Iterator[Conversation | Document | BadRow]
    tokenizer: ChatTokenizer
    options: SourceOptions


def _address(source: _Source) -> str:
    with source.path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    options = source.options
    # Without max_bad_fraction: it is checked each time and changes no sample.
    parts = (
        FORMAT,
        content,
        source.tokenizer.fingerprint,
        asdict(options.keys),
        options.sequence_length,
        options.on_bad_row,
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`. The system frees it when its holder dies, so waiting ends."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=_LOCK_NOTICE_S)
            break
        except Timeout:
            _log.warning("waiting for another run that prepares %s", folder)
    try:
        yield
    finally:
        lock.release()


def _ready(folder: Path, *, warn: bool = False) -> CacheFacts | None:
    """Return the facts of a complete folder; `warn` about one that is there and is not complete."""
    try:
        return read_facts(folder)
    except DataError as damage:
        if warn and folder.exists():
            _log.warning("%s; preparing it again", damage)
        return None


def _ready_or_built(folder: Path, *, source: _Source) -> tuple[CacheFacts, bool]:
    """Under the lock: return the facts, and whether another run had them ready meanwhile."""
    if ready := _ready(folder, warn=True):
        return ready, True
    # Whoever wrote these held the lock, so they died.
    for abandoned in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(abandoned)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        facts = _build(unfinished, source=source)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return facts, False


def _build(folder: Path, *, source: _Source) -> CacheFacts:
    before = source.path.stat()
    facts = CacheFacts()
    with ExitStack() as stack:
        files = {
            array: stack.enter_context((folder / f"{array}.bin").open("wb")) for array in ARRAYS
        }
        np.zeros(1, ARRAYS["offsets"]).tofile(files["offsets"])
        for batch in _batches(source.rows):
            columns = _Columns(end=facts.tokens)
            for row, sample in _tokenized(batch, tokenizer=source.tokenizer):
                _take(row, sample, source=source, facts=facts, columns=columns)
            for array, values in columns.arrays().items():
                values.tofile(files[array])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    after = source.path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{source.path}: changed while it was read; run again once it is written")
    if facts.kept == 0:
        raise DataError(_nothing_kept(facts, source=source))
    facts.length = _quantiles(np.diff(np.fromfile(folder / "offsets.bin", ARRAYS["offsets"])))
    with (folder / REPORT_FILE).open("w", encoding="utf-8") as report:
        json.dump(asdict(facts), report, indent=1)
        report.flush()
        os.fsync(report.fileno())
    _flush(folder)
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

    def arrays(self) -> dict[str, NDArray[Any]]:
        values: dict[str, Any] = {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]),
            "label_mask": np.concatenate([np.empty(0, np.uint8), *self.label_mask]),
            "offsets": self.offsets,
            "rows": self.rows,
            "supervised": self.supervised,
        }
        return {array: np.array(values[array], dtype) for array, dtype in ARRAYS.items()}


def _batches(
    rows: Iterator[Conversation | Document | BadRow],
) -> Iterator[list[Conversation | Document | BadRow]]:
    while batch := list(islice(rows, _ROWS_PER_BATCH)):
        yield batch


def _tokenized(
    batch: Iterable[Conversation | Document | BadRow], *, tokenizer: ChatTokenizer
) -> Iterator[tuple[Conversation | Document | BadRow, TokenizedSample | str]]:
    """Give each row, in order, its sample or the reason why it has none."""
    batch = list(batch)
    readable = [row for row in batch if not isinstance(row, BadRow)]
    samples = iter(tokenizer.tokenize_many(readable))
    for row in batch:
        if isinstance(row, BadRow):
            yield row, row.reason
            continue
        sample = next(samples)
        if isinstance(sample, UnusableRow):
            yield row, str(sample)
            continue
        assert len(sample) == 1, f"row {row.row} gives {len(sample)} samples"
        yield row, sample[0]


def _take(
    row: Conversation | Document | BadRow,
    sample: TokenizedSample | str,
    *,
    source: _Source,
    facts: CacheFacts,
    columns: _Columns,
) -> None:
    """Put one row into the batch or count why not."""
    facts.rows += 1
    if isinstance(row, BadRow) and row.is_empty:
        facts.drop(EMPTY, line=row.line)
        return
    if isinstance(sample, str):
        reason = f"{source.path}:{row.line}: {sample}"
        if source.options.on_bad_row == "error":
            raise DataError(reason)
        facts.first_malformed = facts.first_malformed or sample
        facts.drop(MALFORMED, line=row.line)
        return
    length, supervised = sample.token_ids.size, int(sample.label_mask.sum())
    if length > source.options.sequence_length:
        facts.shortest_overlong = min(facts.shortest_overlong or length, length)
        facts.drop(OVERLONG, line=row.line)
        return
    if supervised == 0:
        facts.drop(UNSUPERVISED, line=row.line)
        return
    facts.kept += 1
    facts.tokens += length
    facts.supervised_tokens += supervised
    columns.end += length
    columns.tokens.append(sample.token_ids)
    columns.label_mask.append(sample.label_mask)
    columns.offsets.append(columns.end)
    columns.rows.append(row.row)
    columns.supervised.append(supervised)


def _check_malformed(facts: CacheFacts, *, source: _Source) -> None:
    """Raise if too many rows are malformed; say how many were skipped otherwise."""
    malformed = facts.dropped.get(MALFORMED, 0)
    if malformed == 0:
        return
    limit = source.options.max_bad_fraction
    first = f"{source.path}:{facts.dropped_lines[MALFORMED][0]}: {facts.first_malformed}"
    if malformed > limit * facts.rows:
        raise DataError(
            f"{source.path}: {malformed} of {facts.rows} rows are malformed, more than "
            f"data.max_bad_fraction={limit}; mend them or raise it (the first: {first})"
        )
    _log.warning("skipped %d of %d rows as malformed (the first: %s)", malformed, facts.rows, first)


def _nothing_kept(facts: CacheFacts, *, source: _Source) -> str:
    length = source.options.sequence_length
    if overlong := facts.dropped.get(OVERLONG, 0):
        return (
            f"{source.path}: data.sequence_length={length} is shorter than every sample (the "
            f"shortest of {overlong} has {facts.shortest_overlong} tokens); raise "
            f"data.sequence_length to at least {facts.shortest_overlong}"
        )
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(facts.dropped.items()))
    first = f"; the first malformed one: {facts.first_malformed}" if facts.first_malformed else ""
    return (
        f"{source.path}: none of its {facts.rows} rows can be trained on ({counts}); mend the rows "
        f"or name another source{first}"
    )


def _quantiles(lengths: NDArray[Any]) -> dict[str, int]:
    """Return lengths that occur: the smallest one that at least p percent do not exceed."""
    ordered = np.sort(lengths)
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: int(ordered[max(0, math.ceil(share * ordered.size) - 1)])
        for name, share in shares.items()
    }


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _report(facts: CacheFacts, *, name: str, path: Path, cached: bool) -> SourceReport:
    return SourceReport(
        name=name,
        path=str(path),
        rows=facts.rows,
        kept=facts.kept,
        dropped=facts.dropped,
        dropped_places={
            reason: [f"{path}:{line}" for line in lines]
            for reason, lines in facts.dropped_lines.items()
        },
        truncated=0,
        tokens=facts.tokens,
        supervised_tokens=facts.supervised_tokens,
        supervised_share=facts.supervised_tokens / facts.tokens,
        length=facts.length,
        cached=cached,
    )
