"""The checkpoints of a run: when they are begun, published and deleted.

With `checkpoint.async_save` the workers write while they train, and the driver publishes when all
have written; it looks after each step, without waiting. Promises: one checkpoint is written at a
time; it is published after the logs up to its step are on disk, and before the run ends.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from roll_sft import outputs
from roll_sft.data.plan import StepPlan
from roll_sft.durable import writing
from roll_sft.engine.preflight import Job
from roll_sft.engine.publish import publish_step, staging_folder
from roll_sft.engine.retention import GIB, checkpoint_bytes, free_bytes, retain
from roll_sft.errors import CheckpointError
from roll_sft.records import Records
from roll_sft.runtime.group import Pending, WorkerGroup

LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Writing:
    """A checkpoint that the workers are writing, and the question to them whether they are done."""

    plan: StepPlan
    staging: Path
    began: float
    question: Pending | None = None


class Saves:
    """Makes checkpoints in the folder of a run."""

    def __init__(self, job: Job, group: WorkerGroup, records: Records, *, folder: Path) -> None:
        self._job, self._group, self._records, self._folder = job, group, records, folder
        self._checkpoints = folder / outputs.CHECKPOINTS
        self._writing: _Writing | None = None
        self._last_save = time.monotonic()

    def is_overdue(self) -> bool:
        """Whether `train.save_minutes` have passed since the last save, and there is room."""
        config = self._job.config
        minutes = config.train.save_minutes
        passed_s = time.monotonic() - self._last_save
        if not config.checkpoint.save or minutes is None or passed_s < 60 * minutes:
            return False
        size = checkpoint_bytes(config, self._job.source.shape)
        if free_bytes(self._folder) < size:
            # The steps of `save_steps` end a run that cannot keep them; the clock need not.
            LOG.warning(
                "no checkpoint after %.0f minutes: %s has no room for %.3g GiB; make room",
                passed_s / 60,
                self._folder,
                size / GIB,
            )
            self._last_save = time.monotonic()
            return False
        return True

    def begin(self, plan: StepPlan) -> None:
        """Save the state after the step of `plan`, which all workers have finished."""
        self.finish()
        self._last_save = time.monotonic()
        began = time.perf_counter()
        staging = self._staging(plan.step)
        self._group.begin_save(staging)
        self._writing = _Writing(plan, staging, began)
        if not self._job.config.checkpoint.async_save:
            self._publish()

    def look(self) -> None:
        """Publish what has been written by now; waits for nothing."""
        begun = self._writing
        if begun is None:
            return
        if begun.question is None:
            begun.question = self._group.is_saved()
            return
        answer = self._group.answer_of(begun.question)
        if answer:
            self._publish()
        elif answer is not None:
            begun.question = None
            seconds = time.perf_counter() - begun.began
            if seconds > self._job.config.cluster.checkpoint_timeout_s:
                self.finish()  # where a deadline names the rank that is late

    def finish(self) -> None:
        """Publish what is being written, once it is."""
        if self._writing is not None:
            self._group.finish_save()
            self._publish()

    def _staging(self, step: int) -> Path:
        with writing(self._checkpoints, CheckpointError):
            return staging_folder(self._checkpoints, step)

    def _publish(self) -> None:
        begun, self._writing = self._writing, None
        assert begun is not None, "nothing is being written"
        plan = begun.plan
        with writing(begun.staging, CheckpointError):
            self._records.sync()
            final = publish_step(self._job, plan, staging=begun.staging)
        seconds = time.perf_counter() - begun.began
        LOG.info("step %d  checkpoint %s in %.1f s", plan.step, final, seconds)
        config = self._job.config.checkpoint
        losses = outputs.losses(self._folder, config.keep_best)
        retain(self._checkpoints, config, losses=losses)
