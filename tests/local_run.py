"""The main job with its real engine and no Ray: one rank, in the process that calls.

For a rank of `tests.pool`, which has process groups. Everything but Ray's actors is what users run.
"""

import contextlib
import copy
import importlib
import io
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from roll_sft import run, signals, stages
from roll_sft.base.layout import ParallelLayout
from roll_sft.base.metrics import EvalMetrics, StepMetrics
from roll_sft.checkpoint import tensors
from roll_sft.data.steps.plan import StepPlan
from roll_sft.engine.engine import Engine
from roll_sft.job.job import Job
from roll_sft.report import starts
from roll_sft.runtime import cluster
from roll_sft.training import driver, stop
from tests.doors import prepares_here, starts_nothing
from tests.pool import RankPool


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run."""

    step: int = 0
    values: tuple[tuple[str, float], ...] = ()  # metrics that `step` reports in place of its own
    gradient: float | None = None  # `step`'s, in place of its own
    learning_rate: float | None = None  # of `step`: one that no configuration may ask for
    error: type[BaseException] | None = None  # what is raised where `step` is waited for
    save_s: float = 0.0  # how long a save takes
    signals: tuple[signal.Signals, ...] = ()  # that this process gets, one after the other,
    where: str = "step"  # in a step, an evaluation or a save,
    hangs: bool = False  # which does not end then
    hours: float = 0.0  # by which the clock of the run jumps in `step`


class _Clock:
    """The clock of a run, which may jump."""

    hours = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + 3600 * self.hours


CLOCK = _Clock()


def spoil_gradient(
    accumulate: Callable[[Any], None], engine: Engine, batches: Any, value: float
) -> None:
    """`accumulate_gradients` where this rank's gradients are `value`, before they are reduced."""
    hooks = [
        parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
        for parameter in engine.chunks[0].parameters()
    ]
    accumulate(batches)
    for hook in hooks:
        hook.remove()


class LocalGroup:
    """The verbs of a `WorkerGroup`, done at once."""

    gpus = ()

    def __init__(self, engine: Engine, fault: Fault) -> None:
        self._engine, self._fault, self._step = engine, fault, 0

    def train_step(
        self, plan: StepPlan, *, learning_rate: float, following: StepPlan | None = None
    ) -> StepMetrics:
        if self._hits(plan.step):
            learning_rate = self._fault.learning_rate or learning_rate
        work = plan.work_for(0, learning_rate=learning_rate, following=following)
        accumulate = self._engine.accumulate_gradients
        with contextlib.ExitStack() as stack:
            if self._hits(plan.step) and self._fault.gradient is not None:
                value = self._fault.gradient
                stack.enter_context(
                    patch.object(
                        self._engine,
                        "accumulate_gradients",
                        lambda batches: spoil_gradient(accumulate, self._engine, batches, value),
                    )
                )
            result = self._engine.train_step(work)
        assert result is not None
        return replace(result, **dict(self._fault.values)) if self._hits(plan.step) else result

    def wait_step(self, result: StepMetrics) -> StepMetrics:
        self._step = result.step
        if self._hits(result.step) and self._fault.error is not None:
            raise self._fault.error
        self._signal("step")
        return result

    def evaluate(self, name: str, plans: Iterable[StepPlan]) -> EvalMetrics:
        self._signal("evaluation")
        parts = [self._engine.evaluate(name, plan.ranks[0]) for plan in plans]
        return sum(filter(None, parts), EvalMetrics(0.0, 0))

    def begin_save(self, folder: Path) -> None:
        self._signal("save")
        self._engine.begin_save(folder)

    def is_saved(self) -> None: ...

    def answers_of(self, _question: None) -> list[bool]:
        return [self._engine.is_saved()]

    def finish_save(self) -> None:
        self._engine.finish_save()

    def call(self, function: str, argument: Any, *, phase: str, deadline_s: float) -> list[Any]:
        module, _, name = function.partition(":")
        return [getattr(importlib.import_module(module), name)(self._engine, argument)]

    def _hits(self, step: int) -> bool:
        return step == self._fault.step

    def _signal(self, where: str) -> None:
        if self._hits(self._step) and where == self._fault.where:
            CLOCK.hours += self._fault.hours
            for number in self._fault.signals:
                os.kill(os.getpid(), number)
            if self._fault.hangs:
                time.sleep(60)


def main_job(arguments: Sequence[str], fault: Fault = Fault()) -> tuple[int, str]:
    """Exit code and stderr of the main job. In a pool of one rank."""

    @contextlib.contextmanager
    def workers(
        job: Job, _folder: Path, *, slots: None, checkpoint: Path | None
    ) -> Iterator[LocalGroup]:
        engine = Engine(job.config, source=job.source, data=job.data, checkpoint=checkpoint)
        yield LocalGroup(engine, fault)

    def nothing(*_: object) -> Any:
        return contextlib.nullcontext()

    def slowly(write: Callable[..., None]) -> Callable[..., None]:
        def late(*args: Any, **options: Any) -> None:
            time.sleep(fault.save_s)
            write(*args, **options)

        return late

    logger = logging.getLogger("roll_sft")
    errors, handlers = io.StringIO(), logger.handlers[:]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for name, stand_in in (("connected", nothing), ("reserved", nothing), ("workers", workers)):
            stack.enter_context(patch.object(driver, name, stand_in))
        stack.enter_context(patch.object(stages, "preparing", prepares_here))
        stack.enter_context(patch.object(cluster, "starting", starts_nothing))
        stack.enter_context(patch.object(starts, "make_report", nothing))
        stack.enter_context(patch.object(tensors, "write", slowly(tensors.write)))
        CLOCK.hours = 0.0
        stack.enter_context(patch.object(stop, "time", CLOCK))
        if fault.hangs:  # it is interrupted after a second, and has the rest of the grace to end
            stack.enter_context(patch.object(signals, "CLOSE_S", 59.0))
            stack.enter_context(patch.object(signals, "MOST_CLOSE_SHARE", 1.0))
        code = run.main([*arguments])
    logger.handlers[:] = handlers
    return code, errors.getvalue()


class Run:
    """One run folder, and commands over it."""

    def __init__(self, root: Path, pool: RankPool, output: Path) -> None:
        self._pool, self.output, self.errors = pool, output, ""
        rows = root / "rows.jsonl"
        self._keys: dict[str, object] = {
            "output_dir": output,
            "model.path": root / "model",
            "data.train": f"[{{path: {rows}}}]",
            "data.cache_dir": root / "cache",
            "data.sequence_length": 200,
            "train.global_batch_size": 2,
            "train.max_steps": 6,
            "train.save_steps": 1,
            "train.warmup_ratio": 0,
            "train.learning_rate": 1e-3,
            "train.lr_scheduler_type": "constant",
            "checkpoint.hf_export": "none",
            "tracking.backends": "[jsonl]",
            "parallel.device": "cpu",
        }
        self.validation = {"data.validation": f"[{{path: {rows}, name: held_out}}]"}

    def __call__(
        self, keys: dict[str, Any] | None = None, *extra: str, fault: Fault | None = None
    ) -> tuple[int, str]:
        values = {**self._keys, **(keys or {})}
        arguments = [*(f"{key}={value}" for key, value in values.items()), *extra]
        ((code, errors),) = self._pool.run(main_job, ParallelLayout(1), arguments, fault or Fault())
        assert "Traceback" not in errors, errors
        self.errors = errors
        return code, errors.rstrip().rpartition("\n")[2]

    def beside(self, name: str) -> "Run":
        """The same run in another folder."""
        other = copy.copy(self)
        other.output = self.output.with_name(name)
        other._keys = {**self._keys, "output_dir": other.output}
        return other

    @property
    def kept(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.output.glob("checkpoints/step_*"))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Lines of a log, which must be JSON: it knows no NaN."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} in {name}")

        path = self.output / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
