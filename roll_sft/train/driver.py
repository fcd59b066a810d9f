"""The run: prepare, claim the folder, start the workers, step, evaluate, save, export.

The driver owns time (steps, evaluation, checkpoints) and knows nothing of models; workers know
models and nothing of time. One step is always queued ahead, so the driver is never on the critical
path.
"""

import contextlib
import logging
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from roll_sft.base.errors import CheckpointError, DivergedError
from roll_sft.checkpoint.resume import (
    NONE,
    Start,
    find_checkpoint,
    make_way,
    start_from,
    step_folders,
)
from roll_sft.checkpoint.retention import check_room
from roll_sft.config.schema import RunConfig
from roll_sft.data.steps.plan import StepPlan
from roll_sft.data.tokens.integrity import verifying
from roll_sft.job.prepare import Job, dry_plan, prepare
from roll_sft.runtime.cluster import connected
from roll_sft.runtime.group import Pending, WorkerGroup
from roll_sft.runtime.placement import Slots, reserved, with_device_of_cluster
from roll_sft.runtime.preparation import spread_over_cluster
from roll_sft.tracking.mlflow_run import MlflowRun
from roll_sft.tracking.trackers import tracked
from roll_sft.train import console, run_folder
from roll_sft.train.loss_curve import CURVE, draw_losses
from roll_sft.train.records import Records, open_records
from roll_sft.train.saves import Saves
from roll_sft.train.start_clock import StartUp
from roll_sft.train.summary import show_summary

LOG = logging.getLogger(__name__)
STEPS_AHEAD = 1


def run(config: RunConfig, *, composed_yaml: str) -> None:
    """Do what `config` says; `composed_yaml` is kept with the results.

    Raises errors of `roll_sft.base.errors`, each with the exit code that the doors end with.
    """
    clock = StartUp()
    clock.passed("imports")
    folder = run_folder.output_folder(config)
    if config.dry_run:
        console.show_plan(dry_plan(config))
        return
    with run_folder.claimed(folder, resumes=config.resume != NONE) as folder:
        config = with_device_of_cluster(config)
        is_run = not config.prepare_only
        checkpoint = find_checkpoint(config, folder / run_folder.CHECKPOINTS) if is_run else None
        job = prepare(config, spread=spread_over_cluster(config))
        start = start_from(job, checkpoint)
        console.show_plan(job.plan)
        if not is_run:
            run_folder.write_json(folder / "data_report.json", _data_report(job))
            if not (folder / "steps.jsonl").exists():  # else it is of the run that wrote those
                run_folder.write_text(folder / "config.yaml", composed_yaml)
            return
        with tracked(job, folder, start=start) as trackers:
            if start.step >= job.total_steps:
                LOG.info("%s has all %d steps of this run: it is finished", folder, start.step)
            else:
                check_room(job.plan, folder / run_folder.CHECKPOINTS, first_step=start.step)
                clock.passed("data and plan")
                _train_from(start, job, folder, trackers, composed_yaml=composed_yaml, clock=clock)
            if not config.checkpoint.save and config.checkpoint.hf_export != "none":
                LOG.warning("checkpoint.save=false: there is no checkpoint to make a model of")
            elif config.checkpoint.hf_export == "final" and not _is_exported(folder, start, job):
                own = step_folders(folder / run_folder.CHECKPOINTS)
                _export(own[-1] if own else start.checkpoint, folder / "hf")
            if start.step < job.total_steps or not (folder / CURVE).exists():
                draw_losses(folder)
        show_summary(config, folder, elapsed_s=clock.elapsed_s())


def _train_from(
    start: Start,
    job: Job,
    folder: Path,
    trackers: list[MlflowRun],
    *,
    composed_yaml: str,
    clock: StartUp,
) -> None:
    """Train to the end, on workers that begin where `start` says."""
    config, first_step = job.config, start.step + 1
    if start.checkpoint is not None:
        LOG.info("goes on from %s, with step %d", start.checkpoint, first_step)
    tokens = verifying(job.data.folders)
    with tokens as verified, connected(config), reserved(config) as slots:
        clock.passed("Ray and placement")
        for tracker in trackers:
            tracker.start()
        with (
            open_records(job, folder, first_step=first_step) as records,
            workers(job, folder, slots=slots, checkpoint=start.checkpoint) as group,
        ):
            verified()
            clock.passed("workers and model")
            # Not before: a start that fails leaves logs and checkpoints as they were.
            make_way(folder / run_folder.CHECKPOINTS, start)
            origin = start.checkpoint.parents[1] if start.checkpoint else folder
            run_folder.cut_logs(folder, step=start.step, origin=origin)
            run_folder.write_text(folder / "config.yaml", composed_yaml)
            run_folder.write_json(folder / "data_report.json", _data_report(job))
            records.begin()
            for tracker in trackers:
                tracker.begin(device=f"{job.layout.world_size} x {group.device_name or 'CPU'}")
            LOG.info("step %d begins %s", first_step, clock)
            records.device_name = group.device_name
            train(job, group, records, folder=folder, first_step=first_step)


def train(
    job: Job, group: WorkerGroup, records: Records, *, folder: Path, first_step: int = 1
) -> None:
    """All steps, evaluations and saves from `first_step` on.

    Raises `DivergedError` that says how to go on. What else ends it is said with what is kept.
    """
    saves = Saves(job, group, records, folder=folder)
    try:
        _train(job, group, records, saves=saves, first_step=first_step)
    except DivergedError as error:
        raise DivergedError(f"{error}; {saves.way_back(error.sound_step)}") from error
    except BaseException:
        LOG.info("%s", saves.what_is_kept())
        raise


def _train(
    job: Job, group: WorkerGroup, records: Records, *, saves: Saves, first_step: int
) -> None:
    """Queue a step, collect the one before it; drain where something else is due."""
    train, pending = job.config.train, deque[tuple[StepPlan, Pending]]()
    plan = job.planner.step(first_step)
    for step in range(first_step, job.total_steps + 1):
        is_last = step == job.total_steps
        following = None if is_last else job.planner.step(step + 1)
        queued = group.train_step(plan, learning_rate=job.schedule.at(step), following=following)
        pending.append((plan, queued))
        is_planned = job.config.checkpoint.save and (is_last or _is_due(step, train.save_steps))
        # The best checkpoint is told by its own loss. One that only the clock asks for has none,
        # so that the clock does not decide what is evaluated.
        is_judged = is_planned and job.config.checkpoint.keep_best is not None
        is_saved = is_planned or saves.is_overdue()
        is_evaluated = is_last or is_judged or _is_due(step, train.eval_steps)
        while len(pending) > (0 if is_last or is_evaluated or is_saved else STEPS_AHEAD):
            _finish_step(*pending.popleft(), group=group, records=records)
        saves.look()
        if is_evaluated:
            _evaluate(job, group, records, step=step)
        if is_saved:
            saves.begin(plan)
        if following is not None:
            plan = following
    saves.finish()


def _finish_step(plan: StepPlan, pending: Pending, *, group: WorkerGroup, records: Records) -> None:
    result = group.wait_step(pending)
    loss = result.loss_sum / result.supervised_tokens
    if math.isfinite(loss) and math.isfinite(result.grad_norm):
        records.step(plan, result)
        return
    records.bad_batch(plan, result)
    # A loss is computed with the weights of the step before, so it says whether those are sound.
    sound_step = plan.step - (1 if math.isfinite(loss) else 2)
    raise DivergedError(
        f"step {plan.step}: train_loss {loss} and grad_norm {result.grad_norm} must be finite; the"
        " samples of this step are in bad_batches.jsonl",
        sound_step=sound_step,
    )


def _evaluate(job: Job, group: WorkerGroup, records: Records, *, step: int) -> None:
    for name, planner in job.validation.items():
        started = time.perf_counter()
        result = group.evaluate(name, planner.evaluation())
        loss = result.loss_sum / result.supervised_tokens
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {step}: the loss of validation set {name!r} is {loss} and must be finite",
                sound_step=step - 1,
            )
        records.evaluation(step, name, result, seconds=time.perf_counter() - started)
        LOG.info("step %d/%d  eval/%s loss %.4f", step, job.total_steps, name, loss)


def _is_exported(folder: Path, start: Start, job: Job) -> bool:
    """Whether a run that was finished before has its model already."""
    return start.step >= job.total_steps and (folder / "hf").exists()


def _export(checkpoint: Path | None, output: Path) -> None:
    """Convert a checkpoint in a process of its own: it needs neither workers nor Ray."""
    assert checkpoint is not None, "a run that is finished has a checkpoint"
    LOG.info("exporting %s", checkpoint)
    command = [sys.executable, "-m", "roll_sft.convert.command"]
    command += ["--checkpoint", str(checkpoint), "--output", str(output), "--replace"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        kind = DivergedError if result.returncode == DivergedError.exit_code else CheckpointError
        raise kind(f"the export of {checkpoint} failed: {lines[-1]}")
    told = "; ".join(result.stdout.strip().splitlines()[:-1])  # the last is the folder
    LOG.info("HuggingFace model %s (%s)", output, told)


@contextlib.contextmanager
def workers(
    job: Job, folder: Path, *, slots: Slots, checkpoint: Path | None = None
) -> Iterator[WorkerGroup]:
    """Started workers, ended however the block ends."""
    logs = folder / "logs"
    group = WorkerGroup(job.config, slots=slots, logs=logs, checkpoint=checkpoint)
    try:
        group.start(job.source, job.data)
        yield group
    except BaseException:
        # Ranks no longer agree on what comes next, so no collective teardown.
        group.kill()
        raise
    group.close()


def _data_report(job: Job) -> dict[str, list[dict[str, object]]]:
    return {
        "sources": [
            {**report.to_dict(), "samples_per_epoch": job.shares[report.name].per_epoch}
            for report in job.reports["train"]
        ],
        "validation": [report.to_dict() for report in job.reports["validation"]],
    }


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
