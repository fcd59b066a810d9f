"""The three stages of a run, joined by folders on disk: prepare, train, convert.

prepare (files -> token cache and `<output_dir>/job/`) and convert (checkpoint -> `hf/`) are
processes of their own. A reader of one need not open the others.
"""

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_sft.base.errors import ConfigError
from roll_sft.checkpoint.resume import NONE, Start, find_checkpoint, start_from, step_folders
from roll_sft.config.schema import RunConfig, cluster_address
from roll_sft.convert.exports import export_final
from roll_sft.job.job import Job
from roll_sft.job.prepared import read_prepared
from roll_sft.preparing import preparing
from roll_sft.signals import interruption_named, stoppable
from roll_sft.training import run_folder
from roll_sft.training.stop import Command, Stop, kept
from roll_sft.training.terminal import StartUp

if TYPE_CHECKING:
    from roll_sft.tracking.recorder import Recorder

LOG = logging.getLogger(__name__)
JOB = run_folder.JOB  # the folder of a run that joins the stages
PREPARED = "what is prepared stays in the token cache: the same command goes on with it"


def run(
    config: RunConfig,
    *,
    composed_yaml: str,
    as_guest: bool = False,
    metric_fn: Callable[..., Any] | None = None,
) -> None:
    """Do what `config` says; `composed_yaml` is kept with the results.

    `as_guest` is for a user's own program, which goes on after the run, and which may give a
    `metric_fn` of its own: see `evaluation.metric_fn`. Raises errors of `roll_sft.base.errors`,
    each with the exit code that the doors end with.
    """
    if config.lora.adapter_path is not None:  # workers have another current folder
        path = str(Path(config.lora.adapter_path).absolute())
        config = replace(config, lora=replace(config.lora, adapter_path=path))
    if metric_fn is not None and not config.evaluation.prompts:
        raise ConfigError(
            "metric_fn: without evaluation.prompts there are no answers to measure; give some"
        )
    if config.dry_run:
        from roll_sft.job.dry_run import dry_overview
        from roll_sft.job.overview import show_overview

        show_overview(dry_overview(config))
        return
    clock = StartUp(as_guest=as_guest)
    folder = run_folder.output_folder(config)
    with (
        stoppable(config) as stop,
        run_folder.claimed(folder, resumes=config.resume != NONE) as folder,
    ):
        stop.outlook = PREPARED
        if config.prepare_only:
            _prepare_only(config, folder, composed_yaml=composed_yaml)
        else:
            _run(config, folder, Command(composed_yaml, clock, stop, as_guest, metric_fn))


def _prepare_only(config: RunConfig, folder: Path, *, composed_yaml: str) -> None:
    with preparing(_on_cluster(config), folder / JOB) as prepared:
        from roll_sft.job.overview import show_job

        prepared()
    job = Job.of(read_prepared(config, folder / JOB))
    show_job(job)
    run_folder.write_json(folder / "data_report.json", job.data_report())
    if not (folder / "steps.jsonl").exists():  # else it is of the run that wrote those
        run_folder.write_config(folder, composed_yaml)


def _run(config: RunConfig, folder: Path, command: Command) -> None:
    config, clock, stop = _on_cluster(config), command.clock, command.stop
    checkpoints = folder / run_folder.CHECKPOINTS
    checkpoint = find_checkpoint(config, checkpoints)
    with contextlib.ExitStack() as cluster:
        with preparing(config, folder / JOB) as prepared:
            _check_ahead(config)  # before Ray: what a tracker starts here is not Ray's
            # Heavy imports meanwhile, Ray's among them, and its start.
            from roll_sft.runtime.cluster import starting

            started = cluster.enter_context(starting(config, as_guest=command.as_guest))
            from roll_sft.job.overview import show_job
            from roll_sft.report.starts import reported
            from roll_sft.training.driver import train_from
            from roll_sft.training.summary import show_summary

            clock.passed("imports")
            prepared()
        job = replace(Job.of(read_prepared(config, folder / JOB)), metric_fn=command.metric_fn)
        start = start_from(checkpoint, job.state, allowed=config.checkpoint.allow_changes)
        show_job(job)
        clock.passed("data and plan")
        reason = _why_finished(start, job, folder)
        stop.outlook = kept(start.checkpoint)
        record = reported(job, folder, first_step=None if reason else start.step + 1)
        exports, trackers_of_run = _exports(job, folder), _trackers(job, folder, start=start)
        named = interruption_named(stop)
        with exports as finish_exports, trackers_of_run as trackers, record, named:
            if reason is not None:
                LOG.info("%s: %s: it is finished", folder, reason)
            else:
                started()
                with _node_notices(config, stop):
                    train_from(start, job, folder, trackers, command=command)
            stop.outlook = "training is finished: the same command goes on from there"
            cluster.close()
            finish_exports()
            if not config.checkpoint.save and config.checkpoint.hf_export != "none":
                LOG.warning("checkpoint.save=false: there is no checkpoint to make a model of")
            elif config.checkpoint.hf_export != "none" and not (
                reason is not None and _is_exported(folder, config)
            ):
                last = _checkpoint_to_export(job.config, folder, start)
                assert last is not None, "a run that is finished has a checkpoint"
                export_final(job.config, last, folder)
            if config.export.push_to_hub.repo_id is not None:
                _push(config, folder)
    show_summary(config, folder, elapsed_s=clock.elapsed_s())


def _trackers(job: Job, folder: Path, *, start: Start) -> "AbstractContextManager[list[Recorder]]":
    """The trackers of `job`; each is loaded where a configuration names it."""
    if not job.config.tracking.services:
        return contextlib.nullcontext([])
    from roll_sft.tracking.trackers import tracked

    return tracked(job, folder, start=start)


def _node_notices(config: RunConfig, stop: Stop) -> AbstractContextManager[None]:
    """Have a node that is about to leave the cluster ask the run to end."""
    if cluster_address(config) is None:
        return contextlib.nullcontext()
    from roll_sft.runtime.draining import watching

    def ask(reason: str, left_s: float) -> None:
        stop.grace_s = min(stop.grace_s, left_s)
        stop.ask(reason)

    return watching(ask)


def _check_ahead(config: RunConfig) -> None:
    """Raise `ConfigError` for a tracker or a repository that would fail after training."""
    if config.tracking.services:
        from roll_sft.tracking.trackers import check_trackers

        check_trackers(config)
    push = config.export.push_to_hub
    if push.repo_id is not None:
        from roll_sft.convert.push import Destination, check_push

        check_push(Destination(push.repo_id, push.private, push.revision))


def _exports(job: Job, folder: Path) -> "AbstractContextManager[Callable[[], None]]":
    """The exports of each checkpoint, where a configuration asks for them."""
    if job.config.checkpoint.hf_export != "every_save" or not job.config.checkpoint.save:
        return contextlib.nullcontext(lambda: None)
    from roll_sft.convert.each_save import exporting_saves

    return exporting_saves(job.config, folder, last_step=job.total_steps)


def _push(config: RunConfig, folder: Path) -> None:
    """Push what is exported; nothing that an earlier attempt has pushed is sent again."""
    from roll_sft.convert.push import Destination, push_run

    push = config.export.push_to_hub
    assert push.repo_id is not None, "there is a repository to push to"
    destination = Destination(push.repo_id, push.private, push.revision)
    for line in push_run(folder, destination, what=push.what):
        LOG.info("%s", line)


def _on_cluster(config: RunConfig) -> RunConfig:
    """`config` with `auto` decided by the cluster that it joins, if it joins one."""
    if cluster_address(config) is None:
        return config
    from roll_sft.runtime.joining import with_device_of_cluster

    return with_device_of_cluster(config)


def _why_finished(start: Start, job: Job, folder: Path) -> str | None:
    """Why the run in `folder` has nothing left to train; None if it has."""
    if (folder / run_folder.EVALUATION_DUE).exists():
        return None
    if start.step >= job.total_steps:
        return f"has all {start.step} steps of this run"
    if job.config.train.early_stopping is None or start.step == 0:
        return None
    from roll_sft.training.early_stopping import why_stopped

    return why_stopped(job.config, folder, step=start.step)


def _is_exported(folder: Path, config: RunConfig) -> bool:
    """Whether a run that was finished before has its model already."""
    is_adapter = config.checkpoint.hf_export == "adapter"
    return (folder / (run_folder.ADAPTER if is_adapter else run_folder.MODEL)).exists()


def _checkpoint_to_export(config: RunConfig, folder: Path, start: Start) -> Path | None:
    """The last checkpoint, or the best of a run that may stop early and keeps it."""
    if config.train.early_stopping is not None:
        from roll_sft.training.early_stopping import checkpoint_to_export

        if (best := checkpoint_to_export(config, folder)) is not None:
            return best
    own = step_folders(folder / run_folder.CHECKPOINTS)
    return own[-1] if own else start.checkpoint
