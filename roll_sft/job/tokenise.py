"""The `data` section of a configuration -> token caches and reports.

`data/` knows no configuration; this is where its keys become arguments.
"""

import logging
from typing import Literal

from roll_sft.config.schema import (
    DataConfig,
    RunConfig,
    SourceConfig,
    layout_of,
    source_name,
    token_cache_folder,
)
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.steps.packing import best_fit_decreasing
from roll_sft.data.steps.plan import Planner, StepPlan
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import TokenData, TokenSet
from roll_sft.data.tokens.estimate import estimated_report
from roll_sft.data.tokens.prepare import CachePlace, Source, prepare_sources
from roll_sft.data.tokens.report import SourceReport
from roll_sft.data.tokens.workers import Spread

_log = logging.getLogger(__name__)

_STEPS_SAMPLED = 8  # whose packs say how full they will be
_POOR_FILL = 0.6
# Of whole packs. A step just above them would need one pack more on each rank, nearly empty.
_FILL_TO_AIM_AT = 0.9


def tokenise(
    config: RunConfig, chat: ChatTokenizer, *, spread: Spread | None = None
) -> tuple[TokenData, dict[str, tuple[SourceReport, ...]]]:
    """The tokens of all sources, from the cache where they are there, and what became of the rows.

    What is missing is prepared by `spread`, or else on this machine; for a dry run it is not, but a
    `NotPreparedError`. Reports are by "train" and "validation".
    """
    data = config.data
    place = CachePlace(
        token_cache_folder(config),
        num_proc=data.num_proc,
        spread=spread,
        only_read=config.dry_run,
    )
    sources = [
        Source(entry.path or "", name=source_name(entry), split=entry.split)
        for entry in [*data.train, *data.validation]
    ]
    found = prepare_sources(sources, tokenizer=chat, options=source_options(data), place=place)
    train, validation = found[: len(data.train)], found[len(data.train) :]
    tokens = TokenData(
        TokenSet([source for source, _ in train]),
        {source.name: TokenSet([source]) for source, _ in validation},
    )
    reports = {
        "train": tuple(report for _, report in train),
        "validation": tuple(report for _, report in validation),
    }
    return tokens, reports


def rough(entry: SourceConfig, data: DataConfig) -> SourceReport:
    """What a source holds, guessed for want of a tokenizer."""
    return estimated_report(
        Source(entry.path or "", name=source_name(entry), split=entry.split),
        keys=_column_keys(data),
        is_strict=data.on_bad_row == "error",
    )


def expected_fill(planner: Planner) -> float:
    """Tokens in the packs of the first steps, over what these packs could hold."""
    plans = _first_steps(planner)
    return sum(plan.fill for plan in plans) / len(plans)


def warn_of_poor_fill(
    config: RunConfig, tokens: TokenSet, planner: Planner, *, pack_tokens: int
) -> None:
    """Say once that packs will be half empty on many ranks, and what would fill them.

    A single rank waits for nobody, and a set that is one step has no larger one to offer.
    """
    fill, data_size = expected_fill(planner), layout_of(config.parallel).data_size
    is_alone = data_size == 1 or planner.steps_per_epoch == 1
    if not config.data.packing or is_alone or fill >= _POOR_FILL:
        return
    plans = _first_steps(planner)
    lengths = tokens.lengths[[index for plan in plans for index in plan.sample_ids]]
    fewest = len(best_fit_decreasing(lengths.tolist(), capacity=pack_tokens))
    if lengths.sum() < _POOR_FILL * fewest * pack_tokens:
        remedy = "samples are long beside a pack, so raise train.micro_batch_tokens to join them"
    else:
        packs = -(-plans[0].total_tokens // (data_size * pack_tokens))
        wanted = int(_FILL_TO_AIM_AT * packs * data_size * pack_tokens)
        remedy = f"set train.global_batch_tokens={wanted}, or raise train.global_batch_size"
    _log.warning(
        "packs of %d tokens on %d data-parallel ranks will be %.0f %% full at %d tokens a step; %s",
        pack_tokens,
        data_size,
        100 * fill,
        plans[0].total_tokens,
        remedy,
    )


def _first_steps(planner: Planner) -> list[StepPlan]:
    num_steps = min(_STEPS_SAMPLED, planner.steps_per_epoch)
    return [planner.step(step) for step in range(1, num_steps + 1)]


def source_options(data: DataConfig) -> SourceOptions:
    """How rows become samples."""
    overlong: dict[str, Literal["drop", "truncate", "error"]] = {
        "drop": "drop",
        "truncate": "truncate",
        "error": "error",
    }
    return SourceOptions(
        keys=_column_keys(data),
        sequence_length=data.sequence_length,
        overlong=overlong[data.overlong],
        on_bad_row="skip" if data.on_bad_row == "skip" else "error",
        max_bad_fraction=data.max_bad_fraction,
    )


def _column_keys(data: DataConfig) -> ColumnKeys:
    return ColumnKeys(
        prompt=data.prompt_key,
        query=data.query_key,
        response=data.response_key,
        system=data.system_key,
        messages=data.messages_key,
        text=data.text_key,
        tools=data.tools_key,
    )
