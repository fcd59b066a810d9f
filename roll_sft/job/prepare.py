"""What is prepared before a worker exists: the model is checked, and rows become tokens.

Assumes a configuration that passed `config.validate.check_config`. Promises that what `prepare`
returns can run, given the resources; nothing here starts Ray or writes into the run's folder.
"""

import hashlib
from dataclasses import fields, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from roll_sft.config.schema import DataConfig, RunConfig, source_name, token_cache_folder
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.tokenizer import load_tokenizer
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import SourceReport, TokenData, TokenSet
from roll_sft.data.tokens.prepare import CachePlace, Source, Spread, prepare_sources
from roll_sft.job.model import load_model, located, save_export_assets
from roll_sft.job.prepared import Prepared
from roll_sft.models.shape import ModelShape

# What begins a tool call alone: Qwen, Hermes, Mistral, Llama 3, Granite, Phi, Kimi, DeepSeek.
TOOL_CALLS = (
    *("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>"),
    *("<|tool_calls_section_begin|>", "<\uff5ctool\u2581calls\u2581begin\uff5c>"),
)


def prepare(config: RunConfig, *, spread: Spread | None = None) -> Prepared:
    """Check the model, then tokenise the data (or find the cache).

    `spread` prepares what the cache lacks, in place of processes of this machine.
    Raises `ConfigError` (all layout problems at once) and `DataError`.
    """
    config, hub = located(config)
    source = load_model(config, hub)
    tokenizer = tokenizer_of(config, source.shape)
    chat = chat_tokenizer(config, tokenizer)
    prompts = []
    if config.evaluation.prompts:
        from roll_sft.job.prompts import prepared_prompts

        prompts = prepared_prompts(config, source.shape, chat, column_keys(config.data))
    data, reports = tokenise(config, chat, spread=spread)
    added = tokenizer.get_added_vocab()
    data = replace(data, tool_call_ids=[added[each] for each in TOOL_CALLS if each in added])
    return Prepared(
        config,
        source,
        data,
        reports,
        digests={
            "tokenizer": _digest(_content_of(tokenizer)),
            "chat_template": _digest(str(tokenizer.chat_template)),
        },
        save_assets=partial(
            save_export_assets, config, tokenizer, end_of_turn_id=_end_of_turn_id(chat, data.train)
        ),
        prompts=prompts,
    )


def chat_tokenizer(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
    """The tokenizer as the data sees it; `tokenizer` is given the template, which exports carry."""
    data = config.data
    if data.chat_template is not None or data.template_kwargs:
        from roll_sft.data.chat.templates import chat_template, check_variables

        template = chat_template(data.chat_template, tokenizer)
        if template is not None:
            tokenizer.chat_template = template
        check_variables(data.template_kwargs, tokenizer)
    return ChatTokenizer(tokenizer, variables=data.template_kwargs, train_on=data.train_on)


def tokenise(
    config: RunConfig, chat: ChatTokenizer, *, spread: Spread | None = None
) -> tuple[TokenData, dict[str, tuple[SourceReport, ...]]]:
    """The tokens of all sources, from the cache where they are there, and what became of the rows.

    What is missing is prepared by `spread`, or else on this machine; for a dry run it is not, but a
    `NotPreparedError`. Reports are by "train" and "validation".
    """
    data = config.data
    place = CachePlace(
        token_cache_folder(config), num_proc=data.num_proc, spread=spread, only_read=config.dry_run
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
    return SourceOptions(
        keys=column_keys(data),
        sequence_length=data.sequence_length,
        overlong=data.overlong,
        on_bad_row=data.on_bad_row,
        max_bad_fraction=data.max_bad_fraction,
    )


def column_keys(data: DataConfig) -> ColumnKeys:
    return ColumnKeys(**{use.name: getattr(data, f"{use.name}_key") for use in fields(ColumnKeys)})


def _end_of_turn_id(chat: ChatTokenizer, train: TokenSet) -> int:
    """What the template ends an answer with; else the last token that a sample is taught."""
    if chat.end_of_turn_id is not None:
        return chat.end_of_turn_id
    tokens, label_mask = train.sample(0)
    return int(tokens[int(label_mask.nonzero()[0][-1]) + 1])


def _content_of(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a slow tokenizer has none
    return backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_of(config: RunConfig, shape: ModelShape) -> PreTrainedTokenizerBase:
    path = config.model.tokenizer_path or config.model.path
    assert path is not None, "check_config refuses a missing model.path"
    return load_tokenizer(
        path, trust_remote_code=config.model.trust_remote_code, embedding_size=shape.vocab_size
    )
