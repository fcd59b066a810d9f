"""The overview of a run that is not started: from the token cache, or estimated from the text."""

import logging
import math
from collections.abc import Mapping, Sequence

from roll_sft.config.schema import (
    DataConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    layout_of,
    source_name,
)
from roll_sft.data.chat.tokenizer import NoTokenizerError
from roll_sft.data.steps.epochs import Share
from roll_sft.data.tokens.cache import SourceReport
from roll_sft.data.tokens.estimate import TOKEN_BYTES, estimated_report
from roll_sft.data.tokens.prepare import NotPreparedError, Source
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import micro_batch_tokens, shares_of
from roll_sft.job.model import load_model, located
from roll_sft.job.overview import Overview, drawn_tokens, first_steps, overview_of
from roll_sft.job.prepare import column_keys

_log = logging.getLogger(__name__)


def dry_overview(config: RunConfig) -> Overview:
    """What `config` would do: from the token cache, which is not written, if it has all the data.

    Else estimated from the text, as where the model's folder has no tokenizer yet. Raises what
    `prepare` raises.
    """
    try:
        job = prepare_job(config)
        return overview_of(job, first_steps(job.planner))
    except NoTokenizerError as error:
        _log.warning("%s; until then tokens are guessed as UTF-8 bytes / %d", error, TOKEN_BYTES)
    except NotPreparedError as error:
        _log.info("%s; until then tokens are guessed as UTF-8 bytes / %d", error, TOKEN_BYTES)
    config, hub = located(config)
    reports = {
        kind: tuple(_estimated(entry, config.data) for entry in entries)
        for kind, entries in (("train", config.data.train), ("validation", config.data.validation))
    }
    kept = {report.name: range(report.kept) for report in reports["train"]}
    shares = shares_of(config.data.train, kept)
    steps_per_epoch = _estimated_steps(config.train, reports["train"], shares)
    layout = layout_of(config.parallel)
    return Overview(
        config=config,
        layout=layout,
        shape=load_model(config, hub).shape,
        reports=reports,
        pack_tokens=micro_batch_tokens(config, layout),
        steps_per_epoch=steps_per_epoch,
        total_steps=config.train.max_steps or config.train.num_train_epochs * steps_per_epoch,
        shares=shares,
        is_estimate=True,
    )


def _estimated_steps(
    train: TrainConfig, reports: Sequence[SourceReport], shares: Mapping[str, Share]
) -> int:
    """Steps of an epoch, where samples are only counted and tokens guessed."""
    if train.global_batch_tokens is None:
        samples = sum(share.per_epoch for share in shares.values())
        return math.ceil(samples / train.global_batch_size)
    # At least one: a few short words are fewer bytes than a token is taken for.
    return max(1, math.ceil(drawn_tokens(reports, shares) / train.global_batch_tokens))


def _estimated(entry: SourceConfig, data: DataConfig) -> SourceReport:
    """What a source holds, guessed for want of a tokenizer."""
    return estimated_report(
        Source(entry.path or "", name=source_name(entry), split=entry.split),
        keys=column_keys(data),
        is_strict=data.on_bad_row == "error",
    )
