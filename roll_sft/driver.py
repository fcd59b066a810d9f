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

from roll_sft import console, outputs
from roll_sft.config import RunConfig
from roll_sft.data.plan import StepPlan
from roll_sft.engine.preflight import Job, dry_plan, prepare
from roll_sft.engine.publish import publish_step, staging_folder
from roll_sft.errors import CheckpointError, DivergedError
from roll_sft.records import Records, open_records
from roll_sft.runtime.connection import connected
from roll_sft.runtime.group import Pending, WorkerGroup
from roll_sft.runtime.placement import Slots, reserved

LOG = logging.getLogger(__name__)
STEPS_AHEAD = 1


def run(config: RunConfig, *, composed_yaml: str) -> None:
    """Do what `config` says; `composed_yaml` is kept with the results.

    Raises errors of `roll_sft.errors`, each with the exit code that the doors end with.
    """
    folder = outputs.output_folder(config)
    if config.dry_run:
        console.show_plan(dry_plan(config))
        return
    with outputs.claimed(folder) as folder:
        job = prepare(config)
        (folder / "config.yaml").write_text(composed_yaml, encoding="utf-8")
        outputs.write_json(folder / "data_report.json", _data_report(job))
        console.show_plan(job.plan)
        if config.prepare_only:
            return
        with (
            connected(config),
            reserved(config) as slots,
            open_records(job, folder) as records,
            workers(job, folder, slots=slots) as group,
        ):
            records.device_name = group.device_name
            _train(job, group, records, folder=folder)
        if not config.checkpoint.save and config.checkpoint.hf_export != "none":
            LOG.warning("checkpoint.save=false: there is no checkpoint to make a model of")
        elif config.checkpoint.hf_export == "final":
            _export(folder)


def _train(job: Job, group: WorkerGroup, records: Records, *, folder: Path) -> None:
    """Queue a step, collect the one before it; drain where something else is due."""
    train, pending = job.config.train, deque[tuple[StepPlan, Pending]]()
    for step in range(1, job.total_steps + 1):
        plan = job.planner.step(step)
        pending.append((plan, group.train_step(plan, learning_rate=job.schedule.at(step))))
        is_last = step == job.total_steps
        evaluates = bool(job.validation) and (is_last or _is_due(step, train.eval_steps))
        saves = job.config.checkpoint.save and (is_last or _is_due(step, train.save_steps))
        while len(pending) > (0 if is_last or evaluates or saves else STEPS_AHEAD):
            _finish_step(*pending.popleft(), group=group, records=records)
        if evaluates:
            _evaluate(job, group, records, step=step)
        if saves:
            _save(job, group, folder, plan=plan)


def _finish_step(plan: StepPlan, pending: Pending, *, group: WorkerGroup, records: Records) -> None:
    record = records.step(plan, group.wait_step(pending))
    if not (math.isfinite(record.train_loss) and math.isfinite(record.grad_norm)):
        raise DivergedError(
            f"step {record.step}: train_loss {record.train_loss} and grad_norm {record.grad_norm}"
            " must be finite; lower train.learning_rate or train.max_grad_norm, and look at the"
            " samples of this step (train.log_samples=true)"
        )


def _evaluate(job: Job, group: WorkerGroup, records: Records, *, step: int) -> None:
    for name, planner in job.validation.items():
        started = time.perf_counter()
        result = group.evaluate(name, planner.evaluation())
        loss = records.evaluation(step, name, result, seconds=time.perf_counter() - started)
        LOG.info("step %d  validation %s  loss %.4f", step, name, loss)


def _save(job: Job, group: WorkerGroup, folder: Path, *, plan: StepPlan) -> None:
    checkpoints = folder / outputs.CHECKPOINTS
    staging = staging_folder(checkpoints, plan.step)
    group.save(staging)
    final = publish_step(job, plan, staging=staging)
    LOG.info("step %d  checkpoint %s", plan.step, final)


def _export(folder: Path) -> None:
    """Convert the last checkpoint in a process of its own: it needs neither workers nor Ray."""
    latest = (folder / outputs.CHECKPOINTS / "latest").read_text().strip()
    checkpoint, output = folder / outputs.CHECKPOINTS / latest, folder / "hf"
    command = [sys.executable, "-m", "roll_sft.engine.export"]
    command += ["--checkpoint", str(checkpoint), "--output", str(output), "--replace"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise CheckpointError(f"the export of {checkpoint} failed: {lines[-1]}")
    LOG.info("HuggingFace model %s", output)


@contextlib.contextmanager
def workers(job: Job, folder: Path, *, slots: Slots) -> Iterator[WorkerGroup]:
    """Started workers, ended however the block ends."""
    group = WorkerGroup(job.config, slots=slots, logs=folder / "logs")
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
