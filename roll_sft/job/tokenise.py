"""The `data` section of a configuration -> token caches and reports.

`data/` knows no configuration; this is where its keys become arguments.
"""

from typing import Literal

from roll_sft.config.schema import (
    DataConfig,
    RunConfig,
    source_name,
    token_cache_folder,
)
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import SourceReport, TokenData, TokenSet
from roll_sft.data.tokens.prepare import CachePlace, Source, Spread, prepare_sources


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


def source_options(data: DataConfig) -> SourceOptions:
    """How rows become samples."""
    overlong: dict[str, Literal["drop", "truncate", "error"]] = {
        "drop": "drop",
        "truncate": "truncate",
        "error": "error",
    }
    return SourceOptions(
        keys=column_keys(data),
        sequence_length=data.sequence_length,
        overlong=overlong[data.overlong],
        on_bad_row="skip" if data.on_bad_row == "skip" else "error",
        max_bad_fraction=data.max_bad_fraction,
    )


def column_keys(data: DataConfig) -> ColumnKeys:
    return ColumnKeys(
        prompt=data.prompt_key,
        query=data.query_key,
        response=data.response_key,
        system=data.system_key,
        messages=data.messages_key,
        text=data.text_key,
        tools=data.tools_key,
    )
