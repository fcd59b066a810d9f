"""`Job`: a run that can start. `prepare` writes it into a folder, and training reads it there.

Of what only preparing needs (tokenizer, chat template, rows) a job holds the results: token caches,
reports, digests, and the files that belong beside the weights. Promise: a job that is read is the
job that was written, given the same configuration.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from roll_sft.base.files import write_durably, writing
from roll_sft.base.layout import ParallelLayout
from roll_sft.base.text import redacted_tree
from roll_sft.checkpoint.manifest import RunState
from roll_sft.config.schema import RunConfig
from roll_sft.data.steps.epochs import Share
from roll_sft.data.steps.learning_rate import Schedule
from roll_sft.data.steps.plan import Planner
from roll_sft.data.tokens.cache import SourceTokens, TokenCache, TokenData, TokenSet
from roll_sft.data.tokens.report import SourceReport
from roll_sft.job import plans
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource

JOB_FILE = "job.json"
DIGESTS = ("tokenizer", "chat_template")
ASSETS = "hf_assets"
_OPTIMIZER = ("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm")


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

    @classmethod
    def of(
        cls,
        config: RunConfig,
        *,
        source: ModelSource,
        data: TokenData,
        reports: dict[str, tuple[SourceReport, ...]],
        digests: Mapping[str, str],
        save_assets: Callable[[Path], None],
    ) -> "Job":
        """Plan what was prepared.

        In `config` every `auto` is decided and hub ids are local folders. `digests` are of what was
        rendered and tokenised with: `DIGESTS`. `save_assets` writes into a folder what an export
        needs beside the weights. Raises `ConfigError` for an epoch that cannot be shuffled.
        """
        shares = plans.shares_of(config.data.train, data.train.ranges)
        options = plans.options_of(config, source.shape)
        planner = plans.planner_of(data.train, options, shares)
        total_steps = config.train.max_steps or planner.steps_in(config.train.num_train_epochs)
        schedule = Schedule.of(config.train, total_steps=total_steps)
        return cls(
            config=config,
            layout=options.layout,
            source=source,
            data=data,
            reports=reports,
            planner=planner,
            shares=shares,
            validation={
                name: plans.planner_of(tokens, options) for name, tokens in data.validation.items()
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
                    **digests,
                    "template_kwargs": config.data.template_kwargs,
                    "schedule": asdict(schedule),
                    "optimizer": {name: getattr(config.train, name) for name in _OPTIMIZER},
                    "shuffle": config.data.shuffle,
                },
            ),
            save_assets=save_assets,
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


def write_job(job: Job, folder: Path) -> None:
    """Write `job` into `folder`, in place of an earlier one. The file of the job comes last.

    Raises `ResourceError` where the disk takes no more.
    """
    config, source = job.config, job.source
    values = {
        "device": config.parallel.device,
        "dtype": config.model.dtype,
        "model": config.model.path,
        "tokenizer_folder": config.model.tokenizer_path,
        "shape": asdict(source.shape),
        "hub": asdict(source.hub) if source.hub else None,
        "train": _sources(job.data.train),
        "validation": [_sources(tokens) for tokens in job.data.validation.values()],
        "reports": {
            kind: [redacted_tree(report.to_dict()) for report in reports]
            for kind, reports in job.reports.items()
        },
        "digests": {name: job.state.facts[name] for name in DIGESTS},
    }
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        job.save_assets(folder / ASSETS)
        write_durably(folder / JOB_FILE, json.dumps(values, indent=1) + "\n")


def read_job(config: RunConfig, folder: Path) -> Job:
    """The job of `config` that `write_job` has written into `folder`."""
    values = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    shape = values["shape"]
    shape["rotary_inv_freq"] = tuple(shape["rotary_inv_freq"])
    config = replace(
        config,
        model=replace(
            config.model,
            path=values["model"],
            tokenizer_path=values["tokenizer_folder"],
            dtype=values["dtype"],
        ),
        parallel=replace(config.parallel, device=values["device"]),
    )
    validation = [_opened(sources) for sources in values["validation"]]
    return Job.of(
        config,
        source=_source(config, ModelShape(**shape), hub=values["hub"]),
        data=TokenData(
            _opened(values["train"]), {tokens.sources[0].name: tokens for tokens in validation}
        ),
        reports={
            kind: tuple(SourceReport(**report) for report in reports)
            for kind, reports in values["reports"].items()
        },
        digests=values["digests"],
        save_assets=partial(shutil.copytree, folder / ASSETS),
    )


def _source(config: RunConfig, shape: ModelShape, *, hub: dict[str, str] | None) -> ModelSource:
    if config.model.random_init:
        return ModelSource(shape, seed=config.seed)
    if hub is None:
        return ModelSource(shape, folder=config.model.path)
    from roll_sft.models.hub import HubModel

    return ModelSource(shape, hub=HubModel(**hub))


def _sources(tokens: TokenSet) -> list[dict[str, Any]]:
    return [
        {"name": source.name, "folders": [str(cache.folder) for cache in source.caches]}
        for source in tokens.sources
    ]


def _opened(sources: Sequence[dict[str, Any]]) -> TokenSet:
    return TokenSet(
        [
            SourceTokens(each["name"], tuple(TokenCache(Path(path)) for path in each["folders"]))
            for each in sources
        ]
    )


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
