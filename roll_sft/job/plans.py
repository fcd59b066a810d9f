"""What an epoch draws of each source, and the planner of a token set, from the configuration."""

from collections.abc import Mapping, Sequence

from roll_sft.base.errors import ConfigError
from roll_sft.base.layout import ParallelLayout, round_up
from roll_sft.config.schema import RunConfig, SourceConfig, layout_of, source_name
from roll_sft.data.steps.epochs import Share
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.models.shape import ModelShape

_MOST_REPEATS = 1000  # of one sample in an epoch
_MOST_SAMPLES = 1 << 30  # of an epoch: they are numbered by 32 bits


def micro_batch_tokens(config: RunConfig, layout: ParallelLayout) -> int:
    """The cap on padded tokens of a pack: as asked, and room for the longest sample."""
    asked = max(config.train.micro_batch_tokens or 0, config.data.sequence_length)
    return round_up(asked, layout.pack_alignment)


def options_of(config: RunConfig, shape: ModelShape) -> PlanOptions:
    """How the steps of `config` are planned for a model of `shape`."""
    layout = layout_of(config.parallel)
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


def planner_of(
    tokens: TokenSet, options: PlanOptions, shares: Mapping[str, Share] | None = None
) -> Planner:
    """The planner of one set; without `shares` an epoch holds each sample once."""
    drawn = tuple(shares.values()) if shares else ()
    return Planner(tokens.lengths, tokens.supervised, options=options, shares=drawn)


def shares_of(entries: Sequence[SourceConfig], samples: Mapping[str, range]) -> dict[str, Share]:
    """How much of each train source an epoch draws; `samples` are the indices of each.

    Raises `ConfigError` for more than could be shuffled.
    """
    shares = {
        source_name(entry): Share.of(
            samples[source_name(entry)], weight=entry.weight, samples=entry.samples
        )
        for entry in entries
    }
    for name, share in shares.items():
        size = share.stop - share.start
        if share.per_epoch > _MOST_REPEATS * size:
            raise ConfigError(
                f"data.train: an epoch of {share.per_epoch:,} samples of {name} repeats each of its"
                f" {size:,} more than {_MOST_REPEATS:,} times; lower samples or weight, and raise"
                " train.num_train_epochs"
            )
    if (total := sum(share.per_epoch for share in shares.values())) > _MOST_SAMPLES:
        raise ConfigError(
            f"data.train: an epoch of {total:,} samples is more than {_MOST_SAMPLES:,}; lower"
            " samples or weight, and raise train.num_train_epochs"
        )
    return shares
