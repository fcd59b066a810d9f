"""Workers without torch, and workers that fail on purpose: real Ray, real processes, in a second.

`python -m tests.runtime.light ...` is the main job's door with light workers.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from roll_sft.base.metrics import EvalMetrics, StepMetrics
from roll_sft.data.steps.plan import RankWork, StepPlan
from roll_sft.data.tokens.cache import TokenData
from roll_sft.models.source import ModelSource
from roll_sft.runtime import group
from roll_sft.runtime.worker import StoreAddress, Worker, check_tokens_visible

# For engines that need neither.
NO_INPUTS: Any = (ModelSource(None), TokenData(SimpleNamespace(caches=()), {}))  # type: ignore[arg-type]
Fault = Callable[[int, int], None]  # called with rank and step, within the step
STEP_S = 0.02
TIMES = "roll_sft.engine.step_timer:times"  # what runs of several data ranks ask for


class LightEngine:
    """The verbs of an engine; counts tokens, learns nothing."""

    def __init__(self, rank: int, fault: Fault | None = None, num_ranks: int = 2) -> None:
        self._rank, self._fault, self._num_ranks = rank, fault, num_ranks
        self.train_micro_batches: list[tuple[tuple[int, ...], ...]] = []

    def train_step(self, work: RankWork) -> StepMetrics:
        self.train_micro_batches.append(work.micro_batches)
        if self._fault is not None:
            self._fault(self._rank, work.step)
        time.sleep(STEP_S)
        return StepMetrics(
            step=work.step,
            loss_sum=2.0 * work.supervised_tokens,
            supervised_tokens=work.supervised_tokens,
            grad_norm=1.0,
            learning_rate=work.learning_rate,
            step_time_s=STEP_S,
            data_wait_s=0.0,
            peak_memory_gib=0.0,
        )

    def evaluate(self, name: str, micro_batches: tuple[tuple[int, ...], ...]) -> EvalMetrics:
        num_samples = sum(map(len, micro_batches))
        return EvalMetrics(loss_sum=0.5 * num_samples, supervised_tokens=num_samples)

    def begin_save(self, folder: Path) -> None:
        from roll_sft.checkpoint import tensors

        writer = tensors.Writer(self._rank, self._num_ranks, optimizer_step=0)
        tensors.write(folder, [], objects={}, writer=writer)

    def is_saved(self) -> bool:
        return True

    def finish_save(self) -> None: ...


class LightWorker(Worker):
    """A worker with a light engine and no process groups."""

    fault: Fault | None = None

    def serve_store(self, *, is_spread: bool) -> StoreAddress:
        return StoreAddress("", 0)

    def setup(self, store: StoreAddress, inputs: Any) -> None:
        with self._phase("setup", self._spec.config.cluster.setup_timeout_s):
            check_tokens_visible(inputs[1].folders, address=self._address)
            num_ranks = self._spec.config.parallel.num_workers
            self._engine: Any = LightEngine(self._spec.rank, type(self).fault, num_ranks)

    def call(self, function: str, argument: Any, *, phase: str, deadline_s: float) -> Any:
        """No times of steps; nothing else is called here."""
        assert function == TIMES, function
        return "CPU", []

    def seen(self) -> list[Any]:
        """The micro-batches of the steps so far."""
        return list(self._engine.train_micro_batches)


def light_worker(fault: Fault) -> type[LightWorker]:
    """A class of workers that suffer `fault` in each step; it travels to them by value."""

    class Faulty(LightWorker):
        pass

    Faulty.fault = staticmethod(fault)
    return Faulty


def gloo_worker(fault: Fault) -> type[LightWorker]:
    """As `light_worker`, with a real collective after the fault, which all ranks must reach."""

    class Gloo(LightWorker):
        def setup(self, store: StoreAddress, inputs: Any) -> None:
            with self._phase("setup", self._spec.config.cluster.setup_timeout_s):
                import torch
                import torch.distributed as dist

                files = dist.FileStore(str(self._spec.logs / "store"), 2)
                dist.init_process_group("gloo", store=files, rank=self._spec.rank, world_size=2)

                def meet(rank: int, step: int) -> None:
                    fault(rank, step)
                    dist.all_reduce(torch.ones(1))

                self._engine = LightEngine(self._spec.rank, meet)

    return Gloo


def plan(step: int, *, data_size: int = 1, samples_per_rank: int = 3) -> StepPlan:
    """A step of consecutive samples, one micro-batch a sample."""
    ids = range(data_size * samples_per_rank)
    ranks = tuple(
        tuple((rank * samples_per_rank + index,) for index in range(samples_per_rank))
        for rank in range(data_size)
    )
    return StepPlan(
        step=step,
        epoch=0,
        samples_seen_in_epoch=step * len(ids),
        sample_ids=tuple(ids),
        ranks=ranks,
        supervised_tokens=10 * len(ids),
        total_tokens=20 * len(ids),
        total_tokens_including_padding=24 * len(ids),
        fill=1.0,
        dp_imbalance=1.0,
    )


def main() -> int:
    from roll_sft import run

    group.Worker = LightWorker  # type: ignore[misc]
    return run.main()


if __name__ == "__main__":
    sys.exit(main())
