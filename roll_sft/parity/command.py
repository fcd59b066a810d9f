"""`roll-sft parity`: the first batch of a run, beside transformers, before the run is paid for.

The batch runs on the worker group as the run would run it, with the layout, packs and kernels of
the configuration, and through transformers alone. Promises: of the run's folder nothing is touched
but `parity/` in it; green means that every supervised token and every parameter was compared; red
names the tensor at which the two computations part.
"""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from roll_sft.base.console import stdout_console
from roll_sft.base.errors import ConfigError, RollSftError
from roll_sft.config.recipes import CHANGE_STEP, is_set
from roll_sft.config.schema import RunConfig
from roll_sft.job.in_process import prepare_job
from roll_sft.parity.measurement import RankParity
from roll_sft.parity.oracle import read_facts
from roll_sft.parity.task import ParityTask
from roll_sft.parity.verdict import Verdict, judge
from roll_sft.runtime.cluster import connected, reserved
from roll_sft.runtime.joining import with_device_of_cluster
from roll_sft.training import run_folder
from roll_sft.training.driver import workers

LOG = logging.getLogger(__name__)
DEFAULT_SAMPLES = 8


class ParityError(RollSftError):
    """The run does not compute what transformers computes."""

    exit_code = 1


def run(config: RunConfig, *, samples: int | None) -> None:
    """Compare the first `samples` of the first batch of `config`; `ParityError` if it is red."""
    if config.lora.rank:
        raise ConfigError(
            f"lora.rank: {config.lora.rank}, and parity compares the whole model; leave lora out:"
            " adapters change nothing before the first step"
        )
    for name in ("freeze", "num_layers_unfrozen", *CHANGE_STEP):
        if is_set(config.train, name):
            raise ConfigError(
                f"train.{name}: {getattr(config.train, name)}, and parity compares the plain loss"
                " and the gradients of all weights; leave it out"
            )
    config = _bounded(config, samples=samples)
    with run_folder.claimed(run_folder.output_folder(config) / "parity") as folder:
        job = prepare_job(with_device_of_cluster(config))
        if job.source.shape.experts is not None:
            raise ConfigError(
                f"model.path: {job.source.shape.architecture} has experts, and parity compares"
                " models without in this version; give such a model"
            )
        plan = job.planner.step(1)
        with (
            # It grows as large as the model in fp32, so it does not outlive the comparison.
            tempfile.TemporaryDirectory(dir=folder, prefix="reference_") as reference,
            connected(job.config),
            reserved(job.config) as slots,
            workers(job, folder, slots=slots) as group,
        ):
            task = ParityTask(job.config, job.source, job.data.train, plan, Path(reference))
            # A model's gradients pass through files here: as long as a checkpoint may take.
            ranks: list[RankParity] = group.call(
                "roll_sft.parity.compare:compare",
                task,
                phase="parity",
                deadline_s=job.config.cluster.checkpoint_timeout_s,
            )
            facts = read_facts(Path(reference))
    verdict = judge(ranks, facts, source=job.source, dtype=job.config.model.dtype)
    _show(
        verdict,
        title=f"{config.run_name} beside transformers: {len(plan.sample_ids)} samples on"
        f" {config.parallel.num_workers} workers",
    )
    if verdict.first_difference is not None:
        raise ParityError(f"parity: {verdict.first_difference}")


def _bounded(config: RunConfig, *, samples: int | None) -> RunConfig:
    """`config` with a batch of `samples`, as the comparison can run it."""
    for key in ("dry_run", "prepare_only"):
        if getattr(config, key):
            raise ConfigError(f"{key}: true leaves nothing to compare; leave it out")
    # In samples, whatever the run counts by: the comparison is over a handful.
    size = config.train.global_batch_size
    if samples is not None and not 1 <= samples <= size:
        raise ConfigError(
            f"--samples: {samples} is not from 1 to train.global_batch_size {size}; choose such"
        )
    if config.parallel.use_distributed_optimizer:
        LOG.info("whole gradients are compared, so parallel.use_distributed_optimizer is off here")
    return replace(
        config,
        train=replace(
            config.train,
            global_batch_size=samples or min(size, DEFAULT_SAMPLES),
            global_batch_tokens=None,
        ),
        parallel=replace(config.parallel, use_distributed_optimizer=False),
    )


def _show(verdict: Verdict, *, title: str) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for column in ("what", "measured", "tolerance", ""):
        table.add_column(column, no_wrap=True)
    table.add_column("worst at", overflow="fold")
    for check in verdict.checks:
        table.add_row(
            check.what,
            f"{check.measured:.1e}",
            f"{check.tolerance:.1e}",
            Text("ok", "green") if check.holds else Text("differs", "red"),
            check.where,
        )
    stdout_console().print(table)
