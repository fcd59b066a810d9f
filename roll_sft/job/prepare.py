"""Everything that is decided before a worker exists: checks, tokens, plan, steps, memory.

Assumes a configuration that passed `config.validate.check_config`. Promises that what `prepare`
returns can run, given the resources; nothing here starts Ray or writes into the run's folder.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import PreTrainedTokenizerBase

from roll_sft.base.errors import ConfigError, refuse
from roll_sft.config.layout_checks import backend_problems, layout_problems
from roll_sft.config.schema import (
    DataConfig,
    RunConfig,
    on_device,
    source_name,
    token_cache_folder,
)
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.tokenizer import load_tokenizer
from roll_sft.data.rows.columns import ColumnKeys
from roll_sft.data.tokens.build_shard import SourceOptions
from roll_sft.data.tokens.cache import SourceReport, TokenData, TokenSet
from roll_sft.data.tokens.prepare import CachePlace, Source, Spread, prepare_sources
from roll_sft.job.prepared import Prepared
from roll_sft.models.assets import TrainedTokenizer, generation_of, save_assets
from roll_sft.models.config_file import load_hf_config
from roll_sft.models.model_folder import check_source, local_model
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource, family_of

if TYPE_CHECKING:
    from roll_sft.models.hub import HubModel


def prepare(config: RunConfig, *, spread: Spread | None = None) -> Prepared:
    """Check the layout against the model, tokenise (or find the cache).

    `spread` prepares what the cache lacks, in place of processes of this machine.
    Raises `ConfigError` (all layout problems at once) and `DataError`.
    """
    config, hub = located(config)
    source = load_model(config, hub)
    tokenizer = _load_tokenizer(config, source.shape)
    chat = _chat_tokenizer(config, tokenizer)
    data, reports = tokenise(config, chat, spread=spread)
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
            _save_assets, config, tokenizer, end_of_turn_id=_end_of_turn_id(chat, data.train)
        ),
    )


def chat_of(config: RunConfig) -> tuple[ChatTokenizer, PreTrainedTokenizerBase]:
    """What a run would tokenise with, without its weights or its data.

    Raises `ConfigError` as `prepare` does, and `DataError` for a tokenizer that data cannot use.
    """
    config, hub = located(replace(config, dry_run=True))
    shape = load_model(config, hub).shape
    tokenizer = _load_tokenizer(config, shape)
    return _chat_tokenizer(config, tokenizer), tokenizer


def _chat_tokenizer(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
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


def _save_assets(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, *, end_of_turn_id: int
) -> None:
    """Write what an export needs beside the weights into `folder`."""
    model = config.model
    assert model.path is not None, "check_config refuses a missing model.path"
    is_given = config.data.chat_template is not None
    trained = TrainedTokenizer(
        tokenizer,
        folder=Path(model.tokenizer_path or model.path),
        end_of_turn_id=end_of_turn_id,
        chat_template=str(tokenizer.chat_template) if is_given else None,
    )
    save_assets(Path(model.path), trained=trained, output=folder)


def located(config: RunConfig) -> "tuple[RunConfig, HubModel | None]":
    """`config` with every `auto` decided and hub ids made local folders; the model on the hub.

    A device that nobody has decided by now is this machine's.
    """
    config = on_device(config, "cuda" if torch.cuda.is_available() else "cpu")
    model = config.model
    assert model.path is not None, "check_config refuses a missing model.path"
    needs_weights = not (model.random_init or config.dry_run)
    path, hub = local_model(model.path, with_weights=needs_weights)
    tokenizer_path = model.tokenizer_path
    if tokenizer_path is not None:
        tokenizer_path, _ = local_model(tokenizer_path, with_weights=False)
    located = replace(config, model=replace(model, path=path, tokenizer_path=tokenizer_path))
    return located, hub


def load_model(config: RunConfig, hub: "HubModel | None") -> ModelSource:
    """The model's family, shape and tensors, checked against the layout."""
    path = config.model.path
    assert path is not None, "check_config refuses a missing model.path"
    problems = [*layout_problems(config.parallel), *backend_problems(config)]
    try:
        hf_config = load_hf_config(path, trust_remote_code=config.model.trust_remote_code)
        generation_of(Path(path))  # which the export needs
        family = family_of(hf_config)
        shape = family.shape(hf_config)
    except ConfigError as error:
        refuse([*problems, str(error)])
        raise
    refuse([*problems, *model_problems(config, shape)])
    if config.trains_part:
        from roll_sft.job.trained import check_trained

        check_trained(config, family, shape)
    # A dry run says what a job would need, which may be wanted before the weights are there.
    if config.model.random_init or config.dry_run:
        return ModelSource(shape, seed=config.seed)
    source = ModelSource(shape, hub=hub) if hub else ModelSource(shape, folder=path)
    check_source(family, shape, source=source.tensors)
    return source


def _load_tokenizer(config: RunConfig, shape: ModelShape) -> PreTrainedTokenizerBase:
    path = config.model.tokenizer_path or config.model.path
    assert path is not None, "check_config refuses a missing model.path"
    return load_tokenizer(
        path,
        trust_remote_code=config.model.trust_remote_code,
        embedding_size=shape.vocab_size,
    )


def model_problems(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """What the layout and the length of samples ask for that a model of `shape` does not have."""
    parallel, length = config.parallel, config.data.sequence_length
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    tensor_size = parallel.tensor_model_parallel_size
    key = "parallel.tensor_model_parallel_size"
    divided = {
        "num_attention_heads": shape.num_attention_heads,
        "intermediate_size": shape.ffn_hidden_size,
    }
    groups = shape.num_key_value_heads
    # Fewer key heads than tensor ranks are shared between ranks; their norm, if one spans all
    # heads of the projection, cannot be.
    if groups > tensor_size or tensor_size % groups or shape.qk_norm == "projection":
        divided["num_key_value_heads"] = groups
    elif groups < tensor_size:  # Megatron then cuts the rows of the fused projection evenly
        fused = (shape.num_attention_heads + 2 * groups) * shape.head_dim
        divided["rows of the fused query, key and value projection"] = fused
    for name, value in divided.items():
        if tensor_size >= 1 and value % tensor_size:
            rule = f"does not divide the model's {name} {value}"
            yield f"{key}: {tensor_size} {rule}; choose a divisor"
    stages = parallel.pipeline_model_parallel_size
    if stages * virtual > shape.num_layers:
        chunks = f"{stages} stages" + (f" x {virtual} virtual ones" if virtual > 1 else "")
        yield (
            f"parallel.pipeline_model_parallel_size: {chunks} exceed the model's"
            f" {shape.num_layers} layers; choose at most {shape.num_layers} in all"
        )
    if shape.norm_placement == "post" and "layernorm" in config.train.recompute:
        yield "train.recompute: layernorm is of norms before a part of a layer; this model has none"
    if shape.variation is not None:
        yield from shape.variation.problems(length)
    if length > shape.max_position_embeddings:
        yield (
            f"data.sequence_length: {length} exceeds the model's max_position_embeddings"
            f" {shape.max_position_embeddings}; lower it"
        )
