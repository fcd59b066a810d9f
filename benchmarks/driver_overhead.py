"""What the driver and Ray cost per step, against an empty round trip to the same workers.

    python benchmarks/driver_overhead.py

Real Ray on this machine, the real `WorkerGroup` of two workers and the real loop of the driver,
with planning and `steps.jsonl`; only the engine is empty, so that what is left is the cost. Pairs
of the two are interleaved; `ratio` is the median of the pairs' ratios, `low` and `high` are the
extremes. A step sends one message to each worker, as an empty round trip does: with sixteen
workers, which share two cores, the ratio says what ours cost beside empty ones. `worker_idle_ms` is
how long a worker waits between two steps of 20 ms, which is what a training run feels of it: the
next step is queued while one runs.
"""

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from shared import measures

from roll_sft.base.metrics import StepMetrics
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.plan import RankWork
from roll_sft.demo import demo
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job
from roll_sft.runtime import group as group_module
from roll_sft.runtime.cluster import connected, reserved
from roll_sft.runtime.group import Pending, WorkerGroup
from roll_sft.runtime.worker import StoreAddress, Worker
from roll_sft.training import driver
from roll_sft.training.records import open_records
from roll_sft.training.stop import Stop

PAIRS = measures.pairs(9)
ROUNDS = measures.size(150, quick=30)  # of each kind in a pair
BATCH, LARGE_BATCH = 8, 512
MANY = 16
BUSY_S = 0.02


def main() -> None:
    """Measures and prints a JSON line for each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _workers(folder / "few") as (job, group):
            _round_trips(group)
            _steps(job, group, folder / "warm_up")
            pairs = [
                (_steps(job, group, folder / f"pair_{index}"), _round_trips(group))
                for index in range(PAIRS)
            ]
            idle_s = _worker_idle(job, group, folder / "busy")
        with _workers(folder / "large", batch=LARGE_BATCH) as (job, group):
            _steps(job, group, folder / "warm_up_large")
            large_idle_s = _worker_idle(job, group, folder / "busy_large")
        with _workers(folder / "many", num_workers=MANY) as (job, group):
            _steps(job, group, folder / "warm_up_many")
            many = [
                (_steps(job, group, folder / f"many_{index}"), _round_trips(group))
                for index in range(PAIRS)
            ]
    _show(
        "driver_overhead",
        [step_s / round_trip_s for step_s, round_trip_s in pairs],
        goal="<= 1.3",
        denominator="an empty call to each of the same two workers and back",
        step_ms=_ms(step for step, _ in pairs),
        round_trip_ms=_ms(trip for _, trip in pairs),
        worker_idle_ms=_ms([idle_s]),
    )
    _show(
        "worker_idle_at_64_times_the_tokens",
        [large_idle_s / idle_s],
        goal="<= 1.2",
        denominator=f"a worker's wait between two steps of 20 ms at {BATCH} samples a step",
        worker_idle_ms=_ms([large_idle_s]),
        samples=LARGE_BATCH,
    )
    _show(
        "driver_at_16_workers",
        [step_s / trip_s for step_s, trip_s in many],
        goal="<= 1.2",
        denominator=f"an empty call to each of the same {MANY} workers and back",
        step_ms=_ms(step_s for step_s, _ in many),
        round_trip_ms=_ms(trip_s for _, trip_s in many),
    )


def _show(name: str, ratios: list[float], *, goal: str, denominator: str, **facts: object) -> None:
    measures.show(
        name, ratios, goal=goal, denominator=denominator, packages=("ray", "torch"), **facts
    )


def _ms(seconds: Iterable[float]) -> float:
    return round(1e3 * statistics.median(seconds), 3)


class EmptyEngine:
    """Steps that do nothing, or keep the worker busy; remembers when each began and ended."""

    def __init__(self, *, is_reporting: bool) -> None:
        self._is_reporting = is_reporting
        # What the driver's look for slow ranks asks for.
        config = SimpleNamespace(finalize_model_grads_func=lambda: None)
        weight = torch.zeros(1)
        self.chunks = [SimpleNamespace(config=config, parameters=lambda: iter((weight,)))]
        self.on_micro_batch = lambda: None
        self.busy_s = 0.0
        self.times: list[tuple[float, float]] = []

    def train_step(self, work: RankWork) -> StepMetrics | None:
        started = time.perf_counter()
        time.sleep(self.busy_s)  # as where a GPU works, so that two cores are enough here
        self.times.append((started, time.perf_counter()))
        if not self._is_reporting:  # as with a real engine
            return None
        return StepMetrics(
            step=work.step,
            loss_sum=1.0,
            supervised_tokens=work.supervised_tokens,
            grad_norm=1.0,
            learning_rate=work.learning_rate,
            step_time_s=1e-3,
            data_wait_s=0.0,
            peak_memory_gib=0.0,
        )


class EmptyWorker(Worker):
    """A worker with an empty engine and no process groups."""

    def serve_store(self, *, is_spread: bool) -> StoreAddress:
        return StoreAddress("", 0)

    def setup(self, store: StoreAddress, inputs: Any) -> None:
        reporting_rank = layout_of(self._spec.config.parallel).reporting_rank
        self._engine: Any = EmptyEngine(is_reporting=self._spec.rank == reporting_rank)

    def no_op(self) -> None:
        """What a step is measured against."""

    def keep_busy(self, seconds: float) -> list[tuple[float, float]]:
        """Let each step take `seconds` from now on; returns the times of those before."""
        times, self._engine.times = self._engine.times, []
        self._engine.busy_s = seconds
        return times


@contextlib.contextmanager
def _workers(
    folder: Path, *, num_workers: int = 2, batch: int = BATCH
) -> Iterator[tuple[Job, WorkerGroup]]:
    config = _config(folder, num_workers=num_workers, batch=batch)
    group_module.Worker = EmptyWorker  # type: ignore[misc]
    job = prepare_job(config)
    with connected(config), reserved(config) as slots:
        group = WorkerGroup(config, slots=slots, logs=folder / "logs")
        group.start(job.source, job.data)
        try:
            yield job, group
        finally:
            group.kill()


def _config(folder: Path, *, num_workers: int, batch: int) -> RunConfig:
    """A run of data ranks alone over the demonstration's rows."""
    demo.make_assets(folder / "assets")
    return build_config(
        {
            "model": {"path": str(folder / "assets" / "model"), "random_init": True},
            "data": {
                "train": [{"path": str(folder / "assets" / "train.jsonl")}],
                "sequence_length": 512,
                "cache_dir": str(folder / "cache"),
            },
            "train": {"max_steps": ROUNDS, "global_batch_size": batch, "logging_steps": 10},
            "checkpoint": {"save": False},
            "tracking": {"backends": ["jsonl"]},
            "parallel": {"num_workers": num_workers, "device": "cpu"},
        }
    )


def _round_trips(group: WorkerGroup) -> float:
    """Seconds of one empty round trip."""
    started = time.perf_counter()
    for _ in range(ROUNDS):
        references = [actor.no_op.remote() for actor in group._actors]
        group._collect(Pending("no-op", 60.0, references))
    return (time.perf_counter() - started) / ROUNDS


def _steps(job: Job, group: WorkerGroup, folder: Path) -> float:
    """Seconds of one step of the driver's loop."""
    folder.mkdir()
    with open_records(job, folder) as records:
        records.begin()
        started = time.perf_counter()
        stop = Stop(job.config, grace_s=1.0)
        driver.train(job, group, records, folder=folder, first_step=1, stop=stop)
        return (time.perf_counter() - started) / job.total_steps


def _worker_idle(job: Job, group: WorkerGroup, folder: Path) -> float:
    """Median seconds between the end of a busy step and the start of the next, on a worker."""
    ray.get([actor.keep_busy.remote(BUSY_S) for actor in group._actors])
    _steps(job, group, folder)
    times = ray.get(group._actors[0].keep_busy.remote(0.0))
    return statistics.median(later - ended for (_, ended), (later, _) in itertools.pairwise(times))


if __name__ == "__main__":
    main()
