"""The main job with its real engine and no Ray: one rank, in the process that calls.

For a rank of `tests.pool`, which has process groups. Everything but Ray's actors is what users run.
"""

import contextlib
import importlib
import io
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from roll_sft import run, stages
from roll_sft.base.metrics import EvalMetrics, StepMetrics
from roll_sft.checkpoint import tensors
from roll_sft.data.steps.plan import StepPlan
from roll_sft.engine.engine import Engine
from roll_sft.job.job import Job
from roll_sft.report import starts
from roll_sft.train import driver
from tests.doors import prepares_here


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run."""

    step: int = 0
    values: tuple[tuple[str, float], ...] = ()  # metrics that `step` reports in place of its own
    learning_rate: float | None = None  # of `step`: one that no configuration may ask for
    error: type[BaseException] | None = None  # what is raised where `step` is waited for
    save_s: float = 0.0  # how long a save takes


class LocalGroup:
    """The verbs of a `WorkerGroup`, done at once."""

    gpus = ()

    def __init__(self, engine: Engine, fault: Fault) -> None:
        self._engine, self._fault = engine, fault

    def train_step(
        self, plan: StepPlan, *, learning_rate: float, following: StepPlan | None = None
    ) -> StepMetrics:
        if self._hits(plan.step):
            learning_rate = self._fault.learning_rate or learning_rate
        work = plan.work_for(0, learning_rate=learning_rate, following=following)
        result = self._engine.train_step(work)
        assert result is not None
        return replace(result, **dict(self._fault.values)) if self._hits(plan.step) else result

    def wait_step(self, result: StepMetrics) -> StepMetrics:
        if self._hits(result.step) and self._fault.error is not None:
            raise self._fault.error
        return result

    def evaluate(self, name: str, plans: Sequence[StepPlan]) -> EvalMetrics:
        parts = [self._engine.evaluate(name, plan.ranks[0]) for plan in plans]
        return sum(filter(None, parts), EvalMetrics(0.0, 0))

    def begin_save(self, folder: Path) -> None:
        self._engine.begin_save(folder)

    def is_saved(self) -> None: ...

    def answer_of(self, _question: None) -> bool:
        return self._engine.is_saved()

    def finish_save(self) -> None:
        self._engine.finish_save()

    def call(self, function: str, argument: Any, *, phase: str, deadline_s: float) -> list[Any]:
        module, _, name = function.partition(":")
        return [getattr(importlib.import_module(module), name)(self._engine, argument)]

    def _hits(self, step: int) -> bool:
        return step == self._fault.step


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

    logger, handler = logging.getLogger("roll_sft"), signal.getsignal(signal.SIGTERM)
    errors, handlers = io.StringIO(), logger.handlers[:]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for name, stand_in in (("connected", nothing), ("reserved", nothing), ("workers", workers)):
            stack.enter_context(patch.object(driver, name, stand_in))
        stack.enter_context(patch.object(stages, "preparing", prepares_here))
        stack.enter_context(patch.object(starts, "make_report", nothing))
        stack.enter_context(patch.object(tensors, "write", slowly(tensors.write)))
        code = run.main([*arguments])
    logger.handlers[:] = handlers
    signal.signal(signal.SIGTERM, handler)
    return code, errors.getvalue()
