"""The checkpoints of a run: when they are begun, published and deleted, and room for them.

With `checkpoint.async_save` the workers write while they train, and the driver publishes when all
have written; it looks after each step, without waiting. Promises: one checkpoint is written at a
time; it is published after the logs up to its step are on disk, and before the run ends; what a
rank finds not to be finite is never published.
"""

import contextlib
import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from roll_sft.base.errors import CheckpointError, DivergedError, ResourceError, RollSftError
from roll_sft.base.files import writing
from roll_sft.checkpoint.publish import publish_step, staging_folder
from roll_sft.checkpoint.resume import LEFT_OVER, origin_of, step_folders, step_of
from roll_sft.config.schema import CheckpointConfig, RunConfig
from roll_sft.data.steps.plan import StepPlan
from roll_sft.job.job import Job
from roll_sft.models.shape import ModelShape
from roll_sft.runtime.group import Pending, WorkerGroup
from roll_sft.training import run_folder
from roll_sft.training.records import Records
from roll_sft.training.stop import kept

LOG = logging.getLogger(__name__)
GIB = 2**30


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
        self._checkpoints = folder / run_folder.CHECKPOINTS
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
        with writing(self._checkpoints, CheckpointError):
            staging = staging_folder(self._checkpoints, plan.step)
        with _not_sound_after(plan):
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
        with _not_sound_after(begun.plan):
            answers = self._group.answers_of(begun.question)
        if answers and all(answers):
            self._publish()
        elif answers:
            begun.question = None
            seconds = time.perf_counter() - begun.began
            if seconds > self._job.config.cluster.checkpoint_timeout_s:
                self.finish()  # where a deadline names the rank that is late

    def finish(self) -> None:
        """Publish what is being written, once it is."""
        if self._writing is not None:
            with _not_sound_after(self._writing.plan):
                self._group.finish_save()
            self._publish()

    def settle(self, sound_step: int) -> None:
        """Publish what is being written, if it is of a state up to `sound_step`."""
        if self._writing is not None and self._writing.plan.step <= sound_step:
            try:
                self.finish()
            except RollSftError as error:
                LOG.warning("the checkpoint that was being written is lost: %s", error)

    def what_is_kept(self) -> str:
        """What the same command goes on from."""
        own = step_folders(self._checkpoints)
        return kept(own[-1] if own else origin_of(self._checkpoints))

    def _publish(self) -> None:
        begun, self._writing = self._writing, None
        assert begun is not None, "nothing is being written"
        plan = begun.plan
        with writing(begun.staging, CheckpointError):
            self._records.sync()
            final = publish_step(
                self._job.state, plan, staging=begun.staging, save_assets=self._job.save_assets
            )
        seconds = time.perf_counter() - begun.began
        LOG.info("step %d  checkpoint %s in %.1f s", plan.step, final, seconds)
        config = self._job.config.checkpoint
        if config.hf_export == "every_save":
            from roll_sft.convert.each_save import hold

            hold(final, self._folder)
        if len(step_folders(self._checkpoints)) > (config.keep_last or math.inf):
            from roll_sft.training.evaluations import losses_of
            from roll_sft.training.retain import retain

            losses = losses_of(self._folder, config.keep_best)
            retain(self._checkpoints, config, losses=losses)


@contextlib.contextmanager
def _not_sound_after(plan: StepPlan) -> Iterator[None]:
    """Say of weights that a rank finds not to be finite after which step they still were."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(
            f"step {plan.step}: {error}, so no checkpoint is made of it", sound_step=plan.step - 1
        ) from error


def check_room(
    config: RunConfig, shape: ModelShape, checkpoints: Path, *, first_step: int, total_steps: int
) -> None:
    """Raise `ResourceError` where the checkpoints of the rest of a run would not fit on the disk.

    Older ones in `checkpoints` make room when they are deleted, which is after the next one is
    whole. What `train.save_minutes` adds is looked at when it is due.
    """
    checkpoint, train = config.checkpoint, config.train
    if not checkpoint.save:
        return
    every = train.save_steps or total_steps
    coming = -(-total_steps // every) - first_step // every
    folder, size = checkpoints.parent, checkpoint_bytes(config, shape)
    there = [_bytes_in(each) for each in step_folders(checkpoints) if step_of(each) <= first_step]
    left_over = [each for pattern in LEFT_OVER for each in checkpoints.glob(pattern)]
    needed = _most_added(size, coming=coming, there=there, config=checkpoint)
    free = free_bytes(folder) + sum(map(_bytes_in, left_over))
    if needed > free:
        raise ResourceError(
            f"output_dir: {-(-needed // size)} more checkpoints of {size / GIB:.3g} GiB need"
            f" {needed / GIB:.3g} GiB at once, and {str(folder)!r} has {free / GIB:.3g} GiB free;"
            " make room, lower checkpoint.keep_last, raise train.save_steps, or choose another"
            " output_dir"
        )


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Size of a checkpoint's tensors: weights, and two fp32 moments; masters where not fp32."""
    weight, master = (2, 4) if config.model.dtype == "bf16" else (4, 0)
    optimizer = 8 + master if config.checkpoint.save_optimizer else 0
    parameters = shape.num_parameters
    if config.trains_part:
        from roll_sft.job.trained import num_trained

        parameters = num_trained(config, shape)
    return parameters * (weight + optimizer)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where `folder` lies."""
    return shutil.disk_usage(folder).free


def _most_added(size: int, *, coming: int, there: list[int], config: CheckpointConfig) -> int:
    """The most bytes that `coming` checkpoints of `size` bytes add at any time.

    `there` are the sizes of those that lie there, oldest first.
    """
    if config.keep_last is None:
        return coming * size
    kept = config.keep_last + (1 if config.keep_best is not None else 0)
    queue, added, most = deque(there), 0, 0
    for _ in range(min(coming, len(there) + kept + 1)):  # from then on it repeats itself
        queue.append(size)
        added += size
        most = max(most, added)
        while len(queue) > kept:
            added -= queue.popleft()
    return most


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
