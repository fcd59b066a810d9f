"""The three stages of a run, joined by folders on disk: prepare, train, convert.

prepare (files -> token cache and `<output_dir>/job/`) and convert (checkpoint -> `hf/`) are
processes of their own. A reader of one need not open the others.
"""

import contextlib
import logging
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from roll_sft.base.errors import CheckpointError, DivergedError
from roll_sft.checkpoint.resume import NONE, Start, find_checkpoint, start_from, step_folders
from roll_sft.config.schema import RunConfig, cluster_address
from roll_sft.job.job import Job
from roll_sft.job.prepared import read_prepared
from roll_sft.preparing import preparing
from roll_sft.train import run_folder
from roll_sft.train.terminal import StartUp

if TYPE_CHECKING:
    from roll_sft.tracking.recorder import Recorder

LOG = logging.getLogger(__name__)
JOB = run_folder.JOB  # the folder of a run that joins the stages


def run(config: RunConfig, *, composed_yaml: str, as_guest: bool = False) -> None:
    """Do what `config` says; `composed_yaml` is kept with the results.

    `as_guest` is for a user's own program, which goes on after the run. Raises errors of
    `roll_sft.base.errors`, each with the exit code that the doors end with.
    """
    if config.lora.adapter_path is not None:  # workers have another current folder
        path = str(Path(config.lora.adapter_path).absolute())
        config = replace(config, lora=replace(config.lora, adapter_path=path))
    if config.dry_run:
        from roll_sft.job.dry_run import dry_overview
        from roll_sft.job.overview import show_overview

        show_overview(dry_overview(config))
        return
    clock = StartUp(as_guest=as_guest)
    folder = run_folder.output_folder(config)
    with run_folder.claimed(folder, resumes=config.resume != NONE) as folder:
        if config.prepare_only:
            _prepare_only(config, folder, composed_yaml=composed_yaml)
        else:
            _run(config, folder, composed_yaml=composed_yaml, clock=clock, as_guest=as_guest)


def _prepare_only(config: RunConfig, folder: Path, *, composed_yaml: str) -> None:
    with preparing(_on_cluster(config), folder / JOB) as prepared:
        from roll_sft.job.overview import show_job

        prepared()
    job = Job.of(read_prepared(config, folder / JOB))
    show_job(job)
    run_folder.write_json(folder / "data_report.json", job.data_report())
    if not (folder / "steps.jsonl").exists():  # else it is of the run that wrote those
        run_folder.write_config(folder, composed_yaml)


def _run(
    config: RunConfig, folder: Path, *, composed_yaml: str, clock: StartUp, as_guest: bool
) -> None:
    config = _on_cluster(config)
    checkpoints = folder / run_folder.CHECKPOINTS
    checkpoint = find_checkpoint(config, checkpoints)
    with contextlib.ExitStack() as cluster:
        with preparing(config, folder / JOB) as prepared:
            # Heavy imports meanwhile, Ray's among them, and its start.
            from roll_sft.runtime.cluster import starting

            started = cluster.enter_context(starting(config, as_guest=as_guest))
            from roll_sft.job.overview import show_job
            from roll_sft.report.starts import reported
            from roll_sft.train.driver import train_from
            from roll_sft.train.summary import show_summary

            clock.passed("imports")
            if config.tracking.services:
                from roll_sft.tracking.trackers import check_trackers

                check_trackers(config)
            prepared()
        job = Job.of(read_prepared(config, folder / JOB))
        start = start_from(checkpoint, job.state, allowed=config.checkpoint.allow_changes)
        show_job(job)
        clock.passed("data and plan")
        reason = _why_finished(start, job, folder)
        record = reported(job, folder, first_step=None if reason else start.step + 1)
        with _trackers(job, folder, start=start) as trackers, record:
            if reason is not None:
                LOG.info("%s: %s: it is finished", folder, reason)
            else:
                started()
                train_from(start, job, folder, trackers, composed_yaml=composed_yaml, clock=clock)
            cluster.close()
            if not config.checkpoint.save and config.checkpoint.hf_export != "none":
                LOG.warning("checkpoint.save=false: there is no checkpoint to make a model of")
            elif config.checkpoint.hf_export != "none" and not (
                reason is not None and _is_exported(folder, config)
            ):
                _export(job.config, _checkpoint_to_export(job.config, folder, start), folder)
    show_summary(config, folder, elapsed_s=clock.elapsed_s())


def _trackers(job: Job, folder: Path, *, start: Start) -> "AbstractContextManager[list[Recorder]]":
    """The trackers of `job`; each is loaded where a configuration names it."""
    if not job.config.tracking.services:
        return contextlib.nullcontext([])
    from roll_sft.tracking.trackers import tracked

    return tracked(job, folder, start=start)


def _on_cluster(config: RunConfig) -> RunConfig:
    """`config` with `auto` decided by the cluster that it joins, if it joins one."""
    if cluster_address(config) is None:
        return config
    from roll_sft.runtime.joining import with_device_of_cluster

    return with_device_of_cluster(config)


def _why_finished(start: Start, job: Job, folder: Path) -> str | None:
    """Why the run in `folder` has nothing left to train; None if it has."""
    if start.step >= job.total_steps:
        return f"has all {start.step} steps of this run"
    if job.config.train.early_stopping is None or start.step == 0:
        return None
    from roll_sft.train.early_stopping import why_stopped

    return why_stopped(job.config, folder, step=start.step)


def _is_exported(folder: Path, config: RunConfig) -> bool:
    """Whether a run that was finished before has its model already."""
    is_adapter = config.checkpoint.hf_export == "adapter"
    return (folder / (run_folder.ADAPTER if is_adapter else run_folder.MODEL)).exists()


def _checkpoint_to_export(config: RunConfig, folder: Path, start: Start) -> Path | None:
    """The last checkpoint, or the best of a run that may stop early and keeps it."""
    if config.train.early_stopping is not None:
        from roll_sft.train.early_stopping import checkpoint_to_export

        if (best := checkpoint_to_export(config, folder)) is not None:
            return best
    own = step_folders(folder / run_folder.CHECKPOINTS)
    return own[-1] if own else start.checkpoint


def _export(config: RunConfig, checkpoint: Path | None, folder: Path) -> None:
    """Make of a checkpoint what `checkpoint.hf_export` asks for."""
    assert checkpoint is not None, "a run that is finished has a checkpoint"
    convert = ["roll_sft.convert.command", "--checkpoint", str(checkpoint)]
    if config.train.freezes:
        convert += ["--base", str(config.model.path)]
    if not config.lora.rank:
        _convert(convert, folder / run_folder.MODEL)
        return
    wanted = config.checkpoint.hf_export
    if wanted in ("adapter", "final"):
        _convert(convert, folder / run_folder.ADAPTER)
    if wanted in ("merged", "final"):
        merge = ["roll_sft.convert.merge_lora", "--adapter", str(checkpoint)]
        merge += ["--dequantize"] if config.lora.quantize_base != "none" else []
        _convert([*merge, "--base", str(config.model.path)], folder / run_folder.MODEL)


def _convert(command: list[str], output: Path) -> None:
    """Run a module and its arguments, as a process of its own: no workers and no Ray are needed."""
    LOG.info("exporting %s", command[2])
    command = [sys.executable, "-m", *command, "--output", str(output), "--replace"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        kind = DivergedError if result.returncode == DivergedError.exit_code else CheckpointError
        raise kind(f"the export to {output} failed: {lines[-1]}")
    told = "; ".join(result.stdout.strip().splitlines()[:-1])  # the last is the folder
    LOG.info("Hugging Face folder %s (%s)", output, told)
