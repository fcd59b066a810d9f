"""Errors and warnings about the rows of a source that are dropped."""

import logging
from collections.abc import Mapping, Sequence

from roll_sft.base.errors import DataError
from roll_sft.data.tokens.build_shard import MALFORMED, OVERLONG, ShardTask, SourceOptions
from roll_sft.data.tokens.cache import ShardReport, SourceReport

_log = logging.getLogger(__name__)

_DROPPED_SHARE = 0.05  # of the rows or samples of a source, above which a warning is given


def refuse_row(report: ShardReport, task: ShardTask) -> None:
    """Raise `DataError`, with the place, for a row that the options make an error."""
    if task.options.on_bad_row == "error" and MALFORMED in report.dropped:
        place = task.place_of(report.dropped_at[MALFORMED][0])
        raise DataError(f"{place}: {report.first_malformed}")
    if task.options.overlong == "error" and report.first_overlong:
        *at, length = report.first_overlong
        raise DataError(
            f"{task.place_of(at)}: the sample has {length} tokens, more than"
            f" data.sequence_length={task.options.sequence_length}; raise it, or set"
            " data.overlong to drop or truncate"
        )


def check_dropped(
    path: str,
    shards: Sequence[ShardReport],
    options: SourceOptions,
    *,
    dropped: Mapping[str, int],
    places: Mapping[str, Sequence[str]],
) -> None:
    """Raise `DataError` if no row is kept, or too many are malformed; warn of malformed ones.

    `dropped` and `places` are those of the whole source, by reason.
    """
    rows, malformed = sum(shard.rows for shard in shards), dropped.get(MALFORMED, 0)
    reason = next((shard.first_malformed for shard in shards if shard.first_malformed), "")
    if not any(shard.kept for shard in shards):
        if overlong := dropped.get(OVERLONG, 0):
            shortest = min(shard.shortest_overlong for shard in shards if shard.shortest_overlong)
            raise DataError(
                f"{path}: data.sequence_length={options.sequence_length} is shorter than every"
                f" sample (the shortest of {overlong} has {shortest} tokens); raise"
                f" data.sequence_length to at least {shortest}"
            )
        counts = ", ".join(f"{number} {why}" for why, number in sorted(dropped.items()))
        first = f"; the first malformed one: {reason}" if reason else ""
        raise DataError(
            f"{path}: none of its {rows} rows can be trained on ({counts}); correct the rows or"
            f" name another source{first}"
        )
    if malformed == 0:
        return
    first, limit = f"{places[MALFORMED][0]}: {reason}", options.max_bad_fraction
    if malformed > limit * rows:
        raise DataError(
            f"{path}: {malformed} of {rows} rows are malformed, more than "
            f"data.max_bad_fraction={limit}; correct them or raise it (the first: {first})"
        )
    _log.warning("skipped %d of %d rows as malformed (the first: %s)", malformed, rows, first)


def warn_of_dropped(report: SourceReport, *, longest: int) -> None:
    """Warn where many rows or samples are left out, with what would keep them.

    `longest`: tokens of the longest sample that is overlong.
    """
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
