"""Rows of a run's sources, as the run would see them: its samples, or why a row gives none.

Rows are read and tokenised by what prepares a run, up to the last one that is needed.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from transformers import PreTrainedTokenizerFast

from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import RunConfig, SourceConfig, source_name
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.pieces import TextPiece, pieces_of
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow
from roll_sft.data.rows.conversation import BadRow, Conversation, Document
from roll_sft.data.rows.sources import read_rows
from roll_sft.data.tokens.build_shard import EMPTY, MALFORMED, OVERLONG, SourceOptions, fitted

_ROWS_PER_BATCH = 64
_FIRST = 3
_MOST_DROPPED = 100
_EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows to show; at most one of `rows`, `longest` and `dropped`.

    `rows` count from 0 within a source, as in the names of samples. Without any of them, the first
    rows of each source are shown.
    """

    source: str | None = None
    rows: tuple[int, ...] = ()
    longest: int | None = None
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """One sample: `part` of `num_parts` that its row gives, both from 1.

    `cut_from` is how many tokens it had, if it was cut.
    """

    source: str
    row: int
    place: str
    part: int
    num_parts: int
    pieces: tuple[TextPiece, ...]
    num_tokens: int
    num_supervised: int
    cut_from: int | None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row, or a sample of one, that is not trained on. `kind` is that of `data_report.json`."""

    source: str
    row: int
    place: str
    kind: str
    reason: str
    excerpt: str


@dataclass(slots=True)
class Preview:
    """What there is to show; `num_dropped` counts by kind, `dropped` has the first ones."""

    shown: list[Shown] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    num_dropped: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0


@dataclass(frozen=True, slots=True)
class Reader:
    """What rows are read with."""

    config: RunConfig
    options: SourceOptions
    chat: ChatTokenizer
    tokenizer: PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class _Kept:
    """A sample as it is trained on, and how many tokens it had if it was cut."""

    sample: TokenizedSample
    cut_from: int | None


@dataclass(frozen=True, slots=True)
class _Looked:
    """A row with what became of it: samples that are kept, and what is dropped of it."""

    source: str
    row: int
    place: str
    kept: tuple[_Kept, ...]
    dropped: tuple[Dropped, ...]


def look(reader: Reader, choice: Choice) -> Preview:
    """Read what `choice` asks for.

    Raises `ConfigError` for a source or a row that there is not, `DataError` as a run would.
    """
    entries = _chosen_sources(reader.config, choice.source)
    preview = Preview()
    if choice.longest is not None:
        _longest(reader, entries, preview, number=choice.longest)
        return preview
    for entry in entries:
        if choice.rows:
            _by_row(reader, entry, preview, rows=choice.rows)
            continue
        num_shown = 0
        for looked in _looked(reader, entry):
            preview.num_rows += 1
            _add_dropped(preview, looked)
            if choice.dropped:
                continue
            preview.shown += _shown(reader, looked)
            num_shown += bool(looked.kept)
            if num_shown == _FIRST:
                break
    return preview


def _chosen_sources(config: RunConfig, name: str | None) -> list[SourceConfig]:
    entries = [*config.data.train, *config.data.validation]
    chosen = [entry for entry in entries if name is None or source_name(entry) == name]
    if not chosen:
        names = ", ".join(dict.fromkeys(map(source_name, entries)))
        raise ConfigError(f"--source: there is no source {name!r}; there are {names}")
    return chosen


def _longest(
    reader: Reader, entries: Sequence[SourceConfig], preview: Preview, *, number: int
) -> None:
    heap: list[tuple[int, int, Shown]] = []
    for entry in entries:
        for looked in _looked(reader, entry):
            preview.num_rows += 1
            _add_dropped(preview, looked, is_listed=False)
            size = max((kept.sample.token_ids.size for kept in looked.kept), default=0)
            if size == 0 or (len(heap) == number and size <= heap[0][0]):
                continue
            longest = max(_shown(reader, looked), key=lambda shown: shown.num_tokens)
            # Of equal lengths the first stays; the count breaks ties before samples are compared.
            heapq.heappush(heap, (size, -preview.num_rows, longest))
            if len(heap) > number:
                heapq.heappop(heap)
    preview.shown = [shown for _, _, shown in sorted(heap, reverse=True, key=lambda e: e[:2])]


def _by_row(reader: Reader, entry: SourceConfig, preview: Preview, *, rows: Sequence[int]) -> None:
    found: dict[int, _Looked] = {}
    for looked in _looked(reader, entry, rows=frozenset(rows)):
        found[looked.row] = looked
        if len(found) == len(set(rows)):
            break
    missing = sorted(set(rows) - set(found))
    if missing:
        raise ConfigError(
            f"--index: source '{source_name(entry)}' has no row {missing[0]}; rows count from 0, "
            f"and a source's number of rows is in the plan"
        )
    for row in rows:
        preview.num_rows += 1
        _add_dropped(preview, found[row])
        preview.shown += _shown(reader, found[row])


def _add_dropped(preview: Preview, looked: _Looked, *, is_listed: bool = True) -> None:
    for dropped in looked.dropped:
        preview.num_dropped[dropped.kind] += 1
        if is_listed and len(preview.dropped) < _MOST_DROPPED:
            preview.dropped.append(dropped)


def _shown(reader: Reader, looked: _Looked) -> Iterator[Shown]:
    for part, kept in enumerate(looked.kept, start=1):
        sample = kept.sample
        yield Shown(
            looked.source,
            looked.row,
            looked.place,
            part=part,
            num_parts=len(looked.kept),
            pieces=tuple(pieces_of(sample, reader.tokenizer)),
            num_tokens=sample.token_ids.size,
            num_supervised=int(sample.label_mask.sum()),
            cut_from=kept.cut_from,
        )


def _looked(
    reader: Reader, entry: SourceConfig, *, rows: frozenset[int] | None = None
) -> Iterator[_Looked]:
    """Read the rows of a source in order, or only some of them, and tokenise them."""
    keys, left_aside = reader.options.keys, set[str]()
    placed = read_rows(entry.path or "", keys, split=entry.split, left_aside=left_aside)
    if rows is not None:
        placed = (pair for pair in placed if pair[1].row in rows)
    # Samples are shown as soon as they are read, so a few first rows cost no more than a few.
    for batch in iter(lambda: list(islice(placed, 1 if rows else _ROWS_PER_BATCH)), []):
        readable = [row for _, row in batch if not isinstance(row, BadRow)]
        results = iter(reader.chat.tokenize_many(readable))
        for place, row in batch:
            result = row if isinstance(row, BadRow) else next(results)
            yield _judged(reader, row, result, source=source_name(entry), place=place)


def _judged(
    reader: Reader,
    row: Conversation | Document | BadRow,
    result: list[TokenizedSample] | UnusableRow | BadRow,
    *,
    source: str,
    place: str,
) -> _Looked:
    excerpt = _excerpt(row)

    def dropped(kind: str, reason: str) -> Dropped:
        return Dropped(source, row.row, place, kind=kind, reason=reason, excerpt=excerpt)

    if isinstance(result, BadRow | UnusableRow):
        is_empty = isinstance(result, BadRow) and result.is_empty
        reason = result.reason if isinstance(result, BadRow) else str(result)
        drops = (dropped(EMPTY if is_empty else MALFORMED, reason),)
        return _Looked(source, row.row, place, kept=(), dropped=drops)
    kept, refused = [], []
    for sample in result:
        fit = fitted(sample, reader.options)
        if isinstance(fit, str):
            refused.append(dropped(fit, _why(fit, sample, reader.options)))
        else:
            kept.append(_Kept(fit[0], cut_from=sample.token_ids.size if fit[1] else None))
    return _Looked(source, row.row, place, kept=tuple(kept), dropped=tuple(refused))


def _why(kind: str, sample: TokenizedSample, options: SourceOptions) -> str:
    if kind != OVERLONG:
        return "no token of it is trained on"
    length = f"{sample.token_ids.size} tokens, more than data.sequence_length="
    cut = (
        ", and nothing supervised is left of it when cut" if options.overlong == "truncate" else ""
    )
    return f"{length}{options.sequence_length}{cut}"


def _excerpt(row: Conversation | Document | BadRow) -> str:
    """The beginning of what a row says, empty for one that cannot be read."""
    if isinstance(row, BadRow):
        return ""
    if isinstance(row, Document):
        text = row.text
    else:
        text = "\n".join(f"{message.role}: {message.content}" for message in row.messages)
    cut = text[:_EXCERPT_CHARACTERS]
    return f"{cut}\u2026" if len(text) > len(cut) else cut
