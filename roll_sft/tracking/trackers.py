"""The trackers of a run: what each one offers, and the status that each gets when the run ends.

Another tracker is one more module in this folder, which implements `Tracker`, and one more entry in
`_OPEN`. `recorder` does what all share.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

from roll_sft.base.errors import ConfigError, PreemptedError
from roll_sft.checkpoint.resume import AUTO, Start
from roll_sft.config.schema import RunConfig
from roll_sft.job.job import Job
from roll_sft.tracking.journal import Journal, Record
from roll_sft.tracking.run_facts import RunFacts, facts_of
from roll_sft.tracking.run_record import RunRecord

if TYPE_CHECKING:
    from roll_sft.tracking.recorder import Recorder

Status = Literal["FINISHED", "FAILED", "KILLED"]
FINISHED: Final = "FINISHED"
# How long a tracker's thread keeps the interpreter from the training loop. Python's own 5 ms, which
# a loop meets several times a step, add up to more than a short step.
SWITCH_INTERVAL_S = 0.0005


class Request(NamedTuple):
    """A call of a tracker. `kind` names in warnings what it sends: `metrics`.

    One that is not repeated is made once, so that what follows does not wait for it.
    """

    kind: str
    make: Callable[[], object]
    is_repeated: bool = True


class Tracker(Protocol):
    """A service that records a run. All methods are called in the thread of a `Recorder`.

    `open` and the requests may raise anything; `is_refused` says what to do then.
    """

    name: str  # of the backend
    title: str  # with its place, for warnings

    def open(self) -> None:
        """Import the package, and open a record, or the one that the folder of the run names."""

    def describe(self, facts: RunFacts) -> Iterator[Request]:
        """Record parameters, tags and data sets."""

    def send(self, records: Sequence[Record]) -> Iterator[Request]:
        """Record what the record lacks of `records`; called without any in each round, too."""

    def finish(self, status: Status) -> Iterator[Request]:
        """Finish the record."""

    def is_refused(self, error: Exception) -> bool:
        """Whether the request that raised `error` is wrong, so that a repetition would fail too."""

    def was_finished(self) -> bool:
        """Whether an earlier process has recorded the run whole. Needs no server."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What a tracker needs to know of a run.

    One that `continues` goes on in the record that its folder names, after `start_step`.
    """

    config: RunConfig
    folder: Path
    continues: bool
    start_step: int


def check_trackers(config: RunConfig) -> None:
    """Raise `ConfigError` for a tracker whose package or credentials are missing."""
    for name in ("tensorboard", "wandb"):
        if name in config.tracking.services and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.backends: the package of {name} is not installed;"
                f" pip install 'roll_sft[{name}]'"
            )
    if "wandb" in config.tracking.services:
        from roll_sft.tracking.wandb_run import check_credentials

        check_credentials()


@contextlib.contextmanager
def tracked(job: Job, folder: Path, *, start: Start) -> "Iterator[list[Recorder]]":
    """The recorders of the trackers that `tracking.backends` names, for a run begun at `start`.

    The caller starts them; they are closed after the block. One is started here where training is
    finished and its tracker has not recorded that.
    """
    # The same command continues the same curve. A run that goes back to a checkpoint, or changes
    # its settings, gives another curve: a new record, with all steps up to there.
    is_same = job.config.resume == AUTO and not job.config.checkpoint.allow_changes
    continues = start.step > 0 and is_same
    run = RecordedRun(job.config, folder, continues=continues, start_step=start.step)
    record = RunRecord(folder, job.config.train.logging_steps, job.total_steps)
    opened = open_recorders(run, record, facts=lambda: record.facts(lambda: facts_of(job)))
    interval_s = sys.getswitchinterval()
    if opened:
        sys.setswitchinterval(min(interval_s, SWITCH_INTERVAL_S))
    if start.step >= job.total_steps:
        for recorder, tracker in opened:
            if not tracker.was_finished():
                recorder.start()
    status: Status = "FAILED"
    try:
        yield [recorder for recorder, _ in opened]
        status = FINISHED
    except (KeyboardInterrupt, SystemExit, PreemptedError):
        status = "KILLED"
        raise
    finally:
        record.close(status)
        for recorder, _ in opened:
            recorder.close(status)
        sys.setswitchinterval(interval_s)


def open_recorders(
    run: RecordedRun, record: RunRecord, *, facts: Callable[[], RunFacts]
) -> "list[tuple[Recorder, Tracker]]":
    """A recorder for each tracker that `tracking.backends` names, each once."""
    from roll_sft.tracking.recorder import Recorder

    opened = list[tuple[Recorder, Tracker]]()
    steps, total = record.logging_steps, record.total_steps
    for name in run.config.tracking.services:
        tracker = _OPEN[name](run)
        journal = Journal(run.folder, logging_steps=steps, total_steps=total)
        opened.append((Recorder(tracker, run.folder, journal=journal, facts=facts), tracker))
    return opened


def _open_mlflow(run: RecordedRun) -> Tracker:
    from roll_sft.tracking.mlflow_run import MlflowRun

    return MlflowRun.of(run)


def _open_tensorboard(run: RecordedRun) -> Tracker:
    from roll_sft.tracking.tensorboard_run import TensorboardRun

    return TensorboardRun(run)


def _open_wandb(run: RecordedRun) -> Tracker:
    from roll_sft.tracking.wandb_run import WandbRun

    return WandbRun(run)


_OPEN: dict[str, Callable[[RecordedRun], Tracker]] = {
    "mlflow": _open_mlflow,
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
}
