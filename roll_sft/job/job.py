"""`Job`: a run that can start: what was prepared, planned. Its tokens are verified meanwhile."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from roll_sft.base.errors import ConfigError, DataError
from roll_sft.base.layout import ParallelLayout, round_up
from roll_sft.checkpoint.manifest import RunState
from roll_sft.config.schema import RunConfig, SourceConfig, layout_of, source_name
from roll_sft.data.steps.epochs import Share
from roll_sft.data.steps.learning_rate import Schedule
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions
from roll_sft.data.tokens.cache import (
    ARRAYS,
    PER_SAMPLE,
    REPORT_FILE,
    SourceReport,
    TokenData,
    TokenSet,
    check_arrays,
    read_report,
)
from roll_sft.job.prepared import Prepared
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource

_OPTIMIZER = ("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm")
_MOST_REPEATS = 1000  # of one sample in an epoch
_MOST_SAMPLES = 1 << 30  # of an epoch: they are numbered by 32 bits
_PER_TOKEN = [array for array in ARRAYS if array not in PER_SAMPLE]
_VERIFIERS = 4  # the checksum leaves the interpreter's lock alone; more would only wait for a disk


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
    state: RunState  # of the run before its first step
    save_assets: Callable[[Path], None]
    metric_fn: Callable[..., Any] | None = None  # of answers, given by a user's program

    @classmethod
    def of(cls, prepared: Prepared) -> "Job":
        """Plan what was prepared. Raises `ConfigError` for an epoch that cannot be shuffled."""
        config, source, data = prepared.config, prepared.source, prepared.data
        shares = shares_of(config.data.train, data.train.ranges)
        options = options_of(config, source.shape)
        planner = planner_of(data.train, options, shares)
        if config.train.changes_loss or data.train.weights is not None:
            from roll_sft.job.trained import scale_of

            planner.loss_scale = scale_of(config.train, data.train)
        total_steps = config.train.max_steps or planner.steps_in(config.train.num_train_epochs)
        schedule = Schedule.of(config.train, total_steps=total_steps)
        optimizer = (*_OPTIMIZER, *config.train.changed_keys)
        return cls(
            config=config,
            layout=options.layout,
            source=source,
            data=data,
            reports=prepared.reports,
            planner=planner,
            shares=shares,
            validation={
                name: planner_of(tokens, options) for name, tokens in data.validation.items()
            },
            schedule=schedule,
            state=RunState(
                step=0,
                epoch=0,
                samples_seen_in_epoch=0,
                seed=config.seed,
                global_batch_size=config.train.global_batch_size,
                global_batch_tokens=config.train.global_batch_tokens,
                sequence_length=config.data.sequence_length,
                sources=_addresses(data.train, shares),
                layout=options.layout,
                dtype=config.model.dtype,
                facts={
                    **prepared.digests,
                    "template_kwargs": config.data.template_kwargs,
                    "schedule": asdict(schedule),
                    "optimizer": {name: getattr(config.train, name) for name in optimizer},
                    "shuffle": config.data.shuffle,
                    **_facts_of_recipe(prepared),
                },
            ),
            save_assets=prepared.save_assets,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.total_steps

    def data_report(self) -> dict[str, Any]:
        """The content of `data_report.json`."""
        return {
            "sources": [
                {**report.to_dict(), "samples_per_epoch": self.shares[report.name].per_epoch}
                for report in self.reports["train"]
            ],
            "validation": [report.to_dict() for report in self.reports["validation"]],
        }


def _facts_of_recipe(prepared: Prepared) -> dict[str, Any]:
    if not prepared.config.trains_part:
        return {}
    from roll_sft.job.trained import recipe_facts

    return recipe_facts(prepared.config, prepared.source)


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


def _addresses(tokens: TokenSet, shares: dict[str, Share]) -> dict[str, str]:
    """Source -> address of its tokens, which changes with data, tokenizer and options.

    Where an epoch does not draw each sample once, the number that it draws is part of it.
    """
    addresses = {}
    for source in tokens.sources:
        shards = "\n".join(cache.folder.name for cache in source.caches)
        share = shares[source.name]
        drawn = "" if share.is_whole else f"*{share.per_epoch}"
        addresses[source.name] = hashlib.sha256(shards.encode()).hexdigest() + drawn
    return addresses


@contextlib.contextmanager
def verifying(folders: Iterable[Path]) -> Iterator[Callable[[], None]]:
    """Read the tokens of `folders` once while the block runs, so that no step meets damage.

    The block is given a function that waits for the end, and raises `DataError` for a folder that
    is damaged. What has not been read when the block ends is left.
    """
    with ThreadPoolExecutor(_VERIFIERS, thread_name_prefix="token-verifier") as pool:
        checks = [pool.submit(_check, folder) for folder in folders]

        def finish() -> None:
            for check in checks:
                check.result()

        try:
            yield finish
        finally:
            for check in checks:
                check.cancel()


def _check(folder: Path) -> None:
    report = read_report(folder)
    try:
        check_arrays(folder, report, _PER_TOKEN)
    except DataError as damage:
        with contextlib.suppress(OSError):  # a cache that may only be read: whoever may must do it
            (folder / REPORT_FILE).unlink()
        raise DataError(f"{damage}; run the same command again, which prepares it anew") from damage
