"""What three trackers at once cost a training step of 20 ms.

    python benchmarks/tracker_overhead.py

Real Ray, two workers that are busy for 20 ms a step, and the real loop of the driver; MLflow on its
SQLite file, TensorBoard and W&B (offline) record every step. Pairs of a run with and a run without
trackers are interleaved, and both are timed from the first step to the last, once the trackers are
open; `ratio` is the median of the pairs' ratios. `cpu_ms_per_step` is what the trackers' threads
compute beside the loop, on other cores where there are some.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import driver_overhead
import ray
from shared import measures

from roll_sft.checkpoint.resume import Start
from roll_sft.job.job import Job
from roll_sft.run import be_quiet
from roll_sft.runtime.group import WorkerGroup
from roll_sft.tracking.trackers import tracked
from roll_sft.training import driver
from roll_sft.training.records import open_records
from roll_sft.training.stop import Stop

PAIRS = measures.pairs(7)
TRACKERS = ["mlflow", "tensorboard", "wandb"]
OPENED = (".mlflow_run", ".tensorboard_run", ".wandb_run")  # in the folder of a run


def main() -> None:
    """Measures and prints a JSON line."""
    be_quiet()
    os.environ["WANDB_MODE"] = "offline"
    with (
        tempfile.TemporaryDirectory() as name,
        driver_overhead._workers(Path(name) / "few") as (job, group),
    ):
        ray.get([actor.keep_busy.remote(driver_overhead.BUSY_S) for actor in group._actors])
        folder = Path(name)
        _steps(job, group, folder / "warm_up", backends=TRACKERS)
        pairs = [
            (
                _steps(job, group, folder / f"with_{index}", backends=TRACKERS),
                _steps(job, group, folder / f"without_{index}", backends=["jsonl"]),
            )
            for index in range(PAIRS)
        ]
    measures.show(
        "tracker_overhead",
        [tracked_s / plain_s for (tracked_s, _), (plain_s, _) in pairs],
        goal="<= 1.01",
        denominator="the same steps of 20 ms with steps.jsonl alone",
        packages=("mlflow", "tensorboard", "wandb"),
        step_ms=round(1e3 * statistics.median(step_s for (step_s, _), _ in pairs), 3),
        cpu_ms_per_step=round(
            1e3 * statistics.median(more - plain for (_, more), (_, plain) in pairs), 3
        ),
    )


def _steps(
    job: Job, group: WorkerGroup, folder: Path, *, backends: list[str]
) -> tuple[float, float]:
    """Seconds of one step of the driver's loop, and of this process's CPUs for one step."""
    folder.mkdir()
    config = replace(
        job.config,
        train=replace(job.config.train, logging_steps=1),
        tracking=replace(job.config.tracking, backends=backends),
    )
    job = replace(job, config=config)
    with open_records(job, folder) as records, _recording(job, folder):
        records.begin()
        started, cpu = time.perf_counter(), time.process_time()
        stop = Stop(job.config, grace_s=1.0)
        driver.train(job, group, records, folder=folder, first_step=1, stop=stop)
        seconds = (time.perf_counter() - started) / job.total_steps
        return seconds, (time.process_time() - cpu) / job.total_steps


@contextlib.contextmanager
def _recording(job: Job, folder: Path) -> Iterator[None]:
    """Trackers that are open when the block begins, and closed after it."""
    with tracked(job, folder, start=Start(0, None)) as recorders:
        for recorder in recorders:
            recorder.start()
        while recorders and not all((folder / name).exists() for name in OPENED):
            time.sleep(0.05)
        yield


if __name__ == "__main__":
    main()
