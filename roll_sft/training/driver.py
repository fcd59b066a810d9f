"""The training loop: start the workers, step, evaluate, save.

The driver owns time (steps, evaluation, checkpoints) and knows nothing of models; workers know
models and nothing of time. One step is always queued ahead, so the driver is never on the critical
path.
"""

import contextlib
import functools
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from roll_sft.base.errors import DivergedError, WorkerError
from roll_sft.checkpoint.resume import Start, make_way
from roll_sft.data.steps.plan import StepPlan
from roll_sft.job.job import Job, verifying
from roll_sft.runtime.cluster import Slots, connected, reserved
from roll_sft.runtime.group import Pending, WorkerGroup
from roll_sft.training import run_folder
from roll_sft.training.records import BadSteps, Records, open_records
from roll_sft.training.saves import Saves, check_room
from roll_sft.training.stop import Command, Stop

if TYPE_CHECKING:
    from roll_sft.tracking.recorder import Recorder

LOG = logging.getLogger(__name__)
STEPS_AHEAD = 1
LONG_STEP_S = 5.0  # longer ones are not queued ahead: a run that has to end waits for one alone


@dataclass(slots=True)
class Attempt:
    """What a group of workers begins with. `begun` is called where its first step begins."""

    job: Job
    start: Start
    slots: Slots
    begun: Callable[[], None]
    stop: Stop
    is_begun: bool = False


def train_from(
    start: Start, job: Job, folder: Path, trackers: "Sequence[Recorder]", *, command: Command
) -> None:
    """Train `job` to the end in `folder`, on workers that begin where `start` says.

    Where they fail, others go on, see `training/supervisor.py`. Raises `PreemptedError` where
    `command.stop` ends the run before.
    """
    config, first_step, clock = job.config, start.step + 1, command.clock
    check_room(
        config,
        job.source.shape,
        folder / run_folder.CHECKPOINTS,
        first_step=start.step,
        total_steps=job.total_steps,
    )
    unstarted = deque(trackers)

    def begin(attempt: Attempt, group: WorkerGroup, records: Records) -> None:
        verified()
        clock.passed("workers and model")
        _make_folder_begin(attempt, folder, composed_yaml=command.composed_yaml)
        records.begin()
        records.device_name = _device(attempt.job, group)
        while unstarted:
            # Not beside the workers' start, whose cores it would take.
            device = f"{job.layout.world_size} x {records.device_name or 'CPU'}"
            unstarted.popleft().start(device=device)
        attempt.is_begun = True
        attempt.begun()

    tokens = verifying(job.data.folders)
    with tokens as verified, connected(config), reserved(config) as slots:
        clock.passed("Ray and placement")
        begun = functools.partial(LOG.info, "step %d begins %s", first_step, clock)
        first = Attempt(job, start, slots, begun, command.stop)
        try:
            train_on(first, folder, begin)
        except WorkerError as error:
            from roll_sft.training.supervisor import restarted

            restarted(error, first, folder, train=lambda next: train_on(next, folder, begin))


def train_on(
    attempt: Attempt, folder: Path, begin: Callable[[Attempt, WorkerGroup, Records], None]
) -> None:
    """Train on new workers; `begin` is called when they are ready."""
    job, start = attempt.job, attempt.start
    if start.checkpoint is not None:
        LOG.info("goes on from %s, with step %d", start.checkpoint, start.step + 1)
    with (
        open_records(job, folder, first_step=start.step + 1) as records,
        workers(job, folder, slots=attempt.slots, checkpoint=start.checkpoint) as group,
    ):
        begin(attempt, group, records)
        train(job, group, records, folder=folder, first_step=start.step + 1, stop=attempt.stop)


def _make_folder_begin(attempt: Attempt, folder: Path, *, composed_yaml: str) -> None:
    """Leave in `folder` what a run has that begins at the start of `attempt`."""
    # Not before the workers are ready: a start that fails leaves logs and checkpoints as they were.
    start = attempt.start
    make_way(folder / run_folder.CHECKPOINTS, start)
    if start.step or any((folder / name).exists() for name in run_folder.LOGS):
        from roll_sft.training.cut_logs import cut_logs

        origin = start.checkpoint.parents[1] if start.checkpoint else folder
        cut_logs(folder, step=start.step, origin=origin)
    run_folder.write_config(folder, composed_yaml)
    run_folder.write_json(folder / "data_report.json", attempt.job.data_report())


def train(
    job: Job, group: WorkerGroup, records: Records, *, folder: Path, first_step: int, stop: Stop
) -> None:
    """All steps, evaluations and saves from `first_step` on.

    Raises `DivergedError` that says how to go on. What else ends it is said with what is kept.
    """
    saves = Saves(job, group, records, folder=folder)
    try:
        with stop.deferred():
            if (folder / run_folder.EVALUATION_DUE).exists():
                from roll_sft.training.preempted import make_up_evaluation

                evaluate = functools.partial(_evaluate, group=group, records=records, stop=stop)
                if make_up_evaluation(folder, job, evaluate, step=first_step - 1):
                    return
            _train(job, group, records, saves=saves, first_step=first_step, stop=stop)
    except DivergedError as error:
        from roll_sft.training.way_back import way_back

        saves.settle(error.sound_step)
        way = way_back(job.config, folder / run_folder.CHECKPOINTS, error.sound_step)
        raise DivergedError(f"{error}; {way}") from error
    except BaseException:
        stop.outlook = saves.what_is_kept()
        LOG.info("%s", stop.outlook)
        raise


def _train(
    job: Job, group: WorkerGroup, records: Records, *, saves: Saves, first_step: int, stop: Stop
) -> None:
    """Queue a step, collect the one before it; drain where something else is due."""
    train, pending = job.config.train, deque[tuple[StepPlan, Pending]]()
    ahead, bad = STEPS_AHEAD, BadSteps(job, records, group, step=first_step - 1)
    plan = job.planner.step(first_step)
    for step in range(first_step, job.total_steps + 1):
        is_last = step == job.total_steps
        following = None if is_last else job.planner.step(step + 1)
        plan = bad.begin(plan)
        queued = group.train_step(plan, learning_rate=job.schedule.at(step), following=following)
        pending.append((plan, queued))
        is_planned = job.config.checkpoint.save and (is_last or _is_due(step, train.save_steps))
        # The best checkpoint is told by its own loss. One that only the clock asks for has none,
        # so that the clock does not decide what is evaluated.
        is_judged = is_planned and job.config.checkpoint.keep_best is not None
        is_saved = is_planned or saves.is_overdue()
        is_evaluated = is_last or is_judged or _is_due(step, train.eval_steps)
        is_drained = is_last or is_evaluated or is_saved
        while len(pending) > (0 if is_drained or stop.is_asked() else ahead):
            done, queued = pending.popleft()
            ahead = STEPS_AHEAD * (bad.finish(done, group.wait_step(queued)) < LONG_STEP_S)
        saves.look()
        is_stopped = is_evaluated and _evaluate(job, group, records, step=step, stop=stop)
        if not stop.is_asked() and (is_saved or (is_stopped and job.config.checkpoint.save)):
            saves.begin(plan)
        if stop.is_asked():
            from roll_sft.training.preempted import save_early

            for done, queued in pending:
                bad.finish(done, group.wait_step(queued))
            stop.outlook = save_early(job, saves, records, plan=plan, evaluates=is_evaluated)
            return
        if is_stopped:
            break
        if following is not None:
            plan = following
    saves.finish()
    stop.outlook = saves.what_is_kept()


def _evaluate(job: Job, group: WorkerGroup, records: Records, *, step: int, stop: Stop) -> bool:
    """Evaluate until `stop`. Whether the run ends here, by `train.early_stopping`."""
    for name, planner in job.validation.items():
        started = time.perf_counter()
        plans = itertools.takewhile(lambda _: not stop.is_asked(), planner.evaluation())
        result = group.evaluate(name, plans)
        if stop.is_asked():
            return False
        loss = result.loss_sum / result.supervised_tokens
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {step}: the loss of validation set {name!r} is {loss} and must be finite",
                sound_step=step - 1,
            )
        records.evaluation(step, name, result, seconds=time.perf_counter() - started)
        LOG.info("step %d/%d  eval/%s loss %.4f", step, job.total_steps, name, loss)
    if job.config.evaluation.prompts and not stop.is_asked():
        from roll_sft.training.generations import evaluate_answers

        evaluate_answers(job, group, records, step=step)
    if job.config.train.early_stopping is None:
        return False
    from roll_sft.training.early_stopping import is_stopped

    return is_stopped(job.config, records.folder, step=step)


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


def _device(job: Job, group: WorkerGroup) -> str | None:
    """Name of the GPUs, None on CPUs; warns where a run is estimated to need more memory."""
    if not group.gpus:
        return None
    from roll_sft.job.memory import warn_of_memory

    warn_of_memory(job.config, job.source.shape, min(gpu.free_gib for gpu in group.gpus))
    return group.gpus[0].name


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
