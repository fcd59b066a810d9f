"""Everything that is decided before a worker exists: checks, tokens, plan, steps, memory.

Assumes a configuration that passed `config.validate.check_config`. Promises that what `prepare`
returns can run, given the resources; nothing here starts Ray or writes into the run's folder.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from roll_sft.base.errors import ConfigError, refuse
from roll_sft.base.layout import ParallelLayout, round_up
from roll_sft.config.schema import RunConfig, TrainConfig, layout_of, on_device
from roll_sft.config.validate import backend_problems, layout_problems
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.templates import chat_template, check_variables
from roll_sft.data.chat.tokenizer import NoTokenizerError, load_tokenizer
from roll_sft.data.steps.epochs import Share
from roll_sft.data.steps.learning_rate import Schedule
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.data.tokens.estimate import TOKEN_BYTES
from roll_sft.data.tokens.prepare import NotPreparedError
from roll_sft.data.tokens.report import SourceReport
from roll_sft.data.tokens.workers import Spread
from roll_sft.job import corpus
from roll_sft.job.inputs import ModelSource, TokenData
from roll_sft.models.assets import TrainedTokenizer, save_assets
from roll_sft.models.family import Family, ModelShape
from roll_sft.models.hub import HubModel, HubSource, local_model
from roll_sft.models.registry import family_of, load_hf_config
from roll_sft.models.safetensors_in import RandomSource, SafetensorsSource, TensorSource

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, for people to read."""

    config: RunConfig
    layout: ParallelLayout
    shape: ModelShape
    reports: dict[str, tuple[SourceReport, ...]]  # "train" and "validation"
    steps_per_epoch: int
    total_steps: int
    shares: dict[str, Share]  # train source -> how much of it an epoch draws
    fill: float | None = None  # of the packs: their tokens over what they could hold
    is_rough: bool = False  # rows and tokens are guessed from the text, for want of tokens

    @property
    def pack_tokens(self) -> int:
        """Padded tokens that a pack holds at most."""
        return micro_batch_tokens(self.config, self.layout)


@dataclass(frozen=True, slots=True)
class Job:
    """A run that can start."""

    config: RunConfig
    layout: ParallelLayout
    source: ModelSource
    data: TokenData
    reports: dict[str, tuple[SourceReport, ...]]  # "train" and "validation"
    planner: Planner
    shares: dict[str, Share]  # train source -> how much of it an epoch draws
    validation: dict[str, Planner]
    schedule: Schedule
    tokenizer: PreTrainedTokenizerBase  # with the chat template that is trained with
    end_of_turn_id: int  # the token that ends an answer

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.total_steps

    @property
    def plan(self) -> Plan:
        """What there is to show of it."""
        return Plan(
            config=self.config,
            layout=self.layout,
            shape=self.source.shape,
            reports=self.reports,
            steps_per_epoch=self.planner.steps_per_epoch,
            total_steps=self.total_steps,
            shares=self.shares,
            fill=corpus.expected_fill(self.planner),
        )

    @property
    def source_addresses(self) -> dict[str, str]:
        """Train source -> address of what is trained on; see `corpus.addresses_of`."""
        return corpus.addresses_of(self.data.train, self.shares)

    def save_assets(self, folder: Path) -> None:
        """Write what an export needs beside the weights into `folder`."""
        model = self.config.model
        assert model.path is not None, "check_config refuses a missing model.path"
        is_given = self.config.data.chat_template is not None
        trained = TrainedTokenizer(
            self.tokenizer,
            folder=Path(model.tokenizer_path or model.path),
            end_of_turn_id=self.end_of_turn_id,
            chat_template=str(self.tokenizer.chat_template) if is_given else None,
        )
        save_assets(Path(model.path), trained=trained, output=folder)


def prepare(config: RunConfig, *, spread: Spread | None = None) -> Job:
    """Check the layout against the model, tokenise (or find the cache), plan.

    `spread` prepares what the cache lacks, in place of processes of this machine.
    Raises `ConfigError` (all layout problems at once) and `DataError`.
    """
    config, hub = _located(config)
    source = _load_model(config, hub)
    tokenizer = _load_tokenizer(config, source.shape)
    layout = layout_of(config.parallel)
    chat = _chat_tokenizer(config, tokenizer)
    data, reports = corpus.tokenise(config, chat, spread=spread)
    options = _plan_options(config, layout, source.shape)
    shares = corpus.shares_of(config.data.train, data.train.ranges)
    planner = corpus.planner_of(data.train, options, shares)
    corpus.warn_of_poor_fill(config, data.train, planner, pack_tokens=options.micro_batch_tokens)
    return Job(
        config=config,
        layout=layout,
        source=source,
        data=data,
        reports=reports,
        planner=planner,
        shares=shares,
        validation={
            name: corpus.planner_of(tokens, options) for name, tokens in data.validation.items()
        },
        schedule=Schedule.of(config.train, total_steps=_total_steps(config, planner.steps_in)),
        tokenizer=tokenizer,
        end_of_turn_id=_end_of_turn_id(chat, data.train),
    )


def chat_of(config: RunConfig) -> tuple[ChatTokenizer, PreTrainedTokenizerBase]:
    """What a run would tokenise with, without its weights or its data.

    Raises `ConfigError` as `prepare` does, and `DataError` for a tokenizer that data cannot use.
    """
    config, hub = _located(replace(config, dry_run=True))
    shape = _load_model(config, hub).shape
    tokenizer = _load_tokenizer(config, shape)
    return _chat_tokenizer(config, tokenizer), tokenizer


def _chat_tokenizer(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
    """The tokenizer as the data sees it; `tokenizer` is given the template, which exports carry."""
    data = config.data
    template = chat_template(data.chat_template, tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    check_variables(data.template_kwargs, tokenizer)
    return ChatTokenizer(tokenizer, variables=data.template_kwargs, train_on=data.train_on)


def _end_of_turn_id(chat: ChatTokenizer, train: TokenSet) -> int:
    """What the template ends an answer with; else the last token that a sample is taught."""
    if chat.end_of_turn_id is not None:
        return chat.end_of_turn_id
    tokens, label_mask = train.sample(0)
    return int(tokens[int(label_mask.nonzero()[0][-1]) + 1])


def dry_plan(config: RunConfig) -> Plan:
    """The plan of a dry run: from the token cache, which is not written, if it has all the data.

    Else from the text, roughly, as where the model's folder has no tokenizer yet. Raises what
    `prepare` raises.
    """
    try:
        return prepare(config).plan
    except NoTokenizerError as error:
        _log.warning("%s; until then tokens are guessed as UTF-8 bytes / %d", error, TOKEN_BYTES)
    except NotPreparedError as error:
        _log.info("%s; until then tokens are guessed as UTF-8 bytes / %d", error, TOKEN_BYTES)
    config, hub = _located(config)
    reports = {
        kind: tuple(corpus.rough(entry, config.data) for entry in entries)
        for kind, entries in (("train", config.data.train), ("validation", config.data.validation))
    }
    kept = {report.name: range(report.kept) for report in reports["train"]}
    shares = corpus.shares_of(config.data.train, kept)
    steps_per_epoch = _rough_steps(config.train, reports["train"], shares)
    return Plan(
        config=config,
        layout=layout_of(config.parallel),
        shape=_load_model(config, hub).shape,
        reports=reports,
        steps_per_epoch=steps_per_epoch,
        total_steps=_total_steps(config, lambda epochs: epochs * steps_per_epoch),
        shares=shares,
        is_rough=True,
    )


def _located(config: RunConfig) -> tuple[RunConfig, HubModel | None]:
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


def _load_model(config: RunConfig, hub: HubModel | None) -> ModelSource:
    """The model's family, shape and tensors, checked against the layout."""
    path = config.model.path
    assert path is not None, "check_config refuses a missing model.path"
    problems = [*layout_problems(config.parallel), *backend_problems(config)]
    try:
        hf_config = load_hf_config(path, trust_remote_code=config.model.trust_remote_code)
        family = family_of(hf_config)
        shape = family.shape(hf_config)
    except ConfigError as error:
        refuse([*problems, str(error)])
        raise
    refuse([*problems, *_model_problems(config, shape)])
    return ModelSource(family, shape, _tensors(config, hub, family=family, shape=shape))


def _tensors(
    config: RunConfig, hub: HubModel | None, *, family: Family, shape: ModelShape
) -> TensorSource:
    """The weights: random ones if asked, else the model's own, checked for completeness.

    A dry run says what a job would need, which may be wanted before the weights are there.
    """
    if config.model.random_init or config.dry_run:
        return RandomSource(
            family.hf_shapes(shape),
            seed=config.seed,
            initializer_range=shape.initializer_range,
        )
    tensors = HubSource(hub) if hub else SafetensorsSource(config.model.path or "")
    family.check_source(shape, source=tensors)
    return tensors


def micro_batch_tokens(config: RunConfig, layout: ParallelLayout) -> int:
    """The cap on padded tokens of a pack: as asked, and room for the longest sample."""
    asked = max(config.train.micro_batch_tokens or 0, config.data.sequence_length)
    return round_up(asked, layout.pack_alignment)


def _load_tokenizer(config: RunConfig, shape: ModelShape) -> PreTrainedTokenizerBase:
    path = config.model.tokenizer_path or config.model.path
    assert path is not None, "check_config refuses a missing model.path"
    return load_tokenizer(
        path,
        trust_remote_code=config.model.trust_remote_code,
        embedding_size=shape.vocab_size,
    )


def _plan_options(config: RunConfig, layout: ParallelLayout, shape: ModelShape) -> PlanOptions:
    return PlanOptions(
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        global_batch_tokens=config.train.global_batch_tokens,
        shuffle=config.data.shuffle,
        packing=config.data.packing,
        micro_batch_tokens=micro_batch_tokens(config, layout),
        layout=layout,
        cost=CostModel.of(
            shape.num_matmul_parameters,
            num_layers=shape.num_layers,
            attention_width=shape.attention_width,
        ),
    )


def _total_steps(config: RunConfig, steps_in: Callable[[int], int]) -> int:
    return config.train.max_steps or steps_in(config.train.num_train_epochs)


def _rough_steps(
    train: TrainConfig, reports: Sequence[SourceReport], shares: Mapping[str, Share]
) -> int:
    """Steps of an epoch, where samples are only counted and tokens guessed."""
    if train.global_batch_tokens is None:
        samples = sum(share.per_epoch for share in shares.values())
        return math.ceil(samples / train.global_batch_size)
    # At least one: a few short words are fewer bytes than a token is taken for.
    return max(1, math.ceil(drawn_tokens(reports, shares) / train.global_batch_tokens))


def drawn_tokens(reports: Sequence[SourceReport], shares: Mapping[str, Share]) -> int:
    """Tokens that an epoch draws, a source that is not drawn whole at its mean length."""
    return round(
        sum(report.tokens / report.kept * shares[report.name].per_epoch for report in reports)
    )


def _model_problems(config: RunConfig, shape: ModelShape) -> Iterator[str]:
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
    if shape.sliding_window is not None and length > shape.sliding_window:
        yield (
            f"data.sequence_length: {length} exceeds the model's sliding_window"
            f" {shape.sliding_window}, and attention over a window is not available in this"
            " version; lower it"
        )
    if length > shape.max_position_embeddings:
        yield (
            f"data.sequence_length: {length} exceeds the model's max_position_embeddings"
            f" {shape.max_position_embeddings}; lower it"
        )
