"""What the driver and Ray cost per step, against an empty round trip to the same workers.

    python benchmarks/driver_overhead.py

Real Ray on this machine, the real `WorkerGroup` of two workers and the real loop of the driver,
with planning and `steps.jsonl`; only the engine is empty, so that what is left is the cost. Pairs
of the two are interleaved; `ratio` is the median of the pairs' ratios, `low` and `high` are the
extremes. `worker_idle_ms` is how long a worker waits between two steps of 20 ms, which is what a
training run feels of it: the next step is queued while one runs.
"""

import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray

from roll_sft import demo, driver
from roll_sft.config import RunConfig, build_config
from roll_sft.data.plan import RankWork
from roll_sft.engine.preflight import Job, prepare
from roll_sft.metrics import StepMetrics
from roll_sft.records import open_records
from roll_sft.runtime import group as group_module
from roll_sft.runtime.connection import connected
from roll_sft.runtime.group import WorkerGroup
from roll_sft.runtime.placement import reserved
from roll_sft.runtime.worker import Worker

PAIRS = 15
ROUNDS = 150  # of each kind in a pair
GOAL = 3.0
BUSY_S = 0.02


def main() -> None:
    """Measures and prints one JSON line."""
    with tempfile.TemporaryDirectory() as name, _workers(Path(name)) as (job, group):
        _round_trips(group)
        _steps(job, group, Path(name) / "warm_up")
        pairs = [
            (_steps(job, group, Path(name) / f"pair_{index}"), _round_trips(group))
            for index in range(PAIRS)
        ]
        idle_s = _worker_idle(job, group, Path(name) / "busy")
    ratios = [step_s / round_trip_s for step_s, round_trip_s in pairs]
    ratio = statistics.median(ratios)
    line = {
        "name": "driver_overhead",
        "ratio": round(ratio, 3),
        "low": round(min(ratios), 3),
        "high": round(max(ratios), 3),
        "pairs": PAIRS,
        "goal": f"<= {GOAL:g}",
        "holds": ratio <= GOAL,
        "denominator": "an empty call to each of the same two workers and back",
        "step_ms": round(1e3 * statistics.median(step for step, _ in pairs), 3),
        "round_trip_ms": round(1e3 * statistics.median(trip for _, trip in pairs), 3),
        "worker_idle_ms": round(1e3 * idle_s, 3),
        "device": "cpu",
        "versions": {name: version(name) for name in ("roll_sft", "ray", "torch")},
    }
    print(json.dumps(line))


class EmptyEngine:
    """Steps that do nothing, or keep the worker busy; remembers when each began and ended."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.times: list[tuple[float, float]] = []

    def train_step(self, work: RankWork) -> StepMetrics:
        started = time.perf_counter()
        time.sleep(self.busy_s)  # as where a GPU works, so that two cores are enough here
        self.times.append((started, time.perf_counter()))
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

    def serve_store(self) -> tuple[str, int]:
        return "", 0

    def setup(self, store: tuple[str, int], inputs: Any) -> None:
        self._engine: Any = EmptyEngine()

    def keep_busy(self, seconds: float) -> list[tuple[float, float]]:
        """Let each step take `seconds` from now on; returns the times of those before."""
        times, self._engine.times = self._engine.times, []
        self._engine.busy_s = seconds
        return times


@contextlib.contextmanager
def _workers(folder: Path) -> Iterator[tuple[Job, WorkerGroup]]:
    config = _config(folder)
    group_module.Worker = EmptyWorker  # type: ignore[misc]
    job = prepare(config)
    with connected(config), reserved(config) as slots:
        group = WorkerGroup(config, slots=slots, logs=folder / "logs")
        group.start(job.source, job.data)
        try:
            yield job, group
        finally:
            group.kill()


def _config(folder: Path) -> RunConfig:
    """A run of two data ranks over the demonstration's rows, 64 samples a step."""
    demo.make_assets(folder / "assets")
    return build_config(
        {
            "model": {"path": str(folder / "assets" / "model"), "random_init": True},
            "data": {
                "train": [{"path": str(folder / "assets" / "train.jsonl")}],
                "sequence_length": 512,
                "cache_dir": str(folder / "cache"),
            },
            "train": {"max_steps": ROUNDS, "global_batch_size": 64, "logging_steps": 10},
            "checkpoint": {"save": False},
            "tracking": {"backends": ["jsonl"]},
            "parallel": {"num_workers": 2, "device": "cpu"},
        }
    )


def _round_trips(group: WorkerGroup) -> float:
    """Seconds of one empty round trip."""
    started = time.perf_counter()
    for _ in range(ROUNDS):
        group.no_op()
    return (time.perf_counter() - started) / ROUNDS


def _steps(job: Job, group: WorkerGroup, folder: Path) -> float:
    """Seconds of one step of the driver's loop."""
    folder.mkdir()
    with open_records(job, folder) as records:
        started = time.perf_counter()
        driver.train(job, group, records, folder=folder)
        return (time.perf_counter() - started) / job.total_steps


def _worker_idle(job: Job, group: WorkerGroup, folder: Path) -> float:
    """Median seconds between the end of a busy step and the start of the next, on a worker."""
    ray.get([actor.keep_busy.remote(BUSY_S) for actor in group._actors])
    _steps(job, group, folder)
    times = ray.get(group._actors[0].keep_busy.remote(0.0))
    return statistics.median(later - ended for (_, ended), (later, _) in itertools.pairwise(times))


if __name__ == "__main__":
    main()
