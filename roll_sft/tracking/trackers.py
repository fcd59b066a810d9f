"""The trackers of a run: what each one offers, and the status that each gets when the run ends.

Another tracker is one more module in this folder and one more entry in `_OPEN`.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

from roll_sft.checkpoint.resume import Start
from roll_sft.job.job import Job

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Records one run. It reads metrics from the files of the run, so that none is lost.

    No method raises because of the tracker, and none but `close` waits.
    """

    def start(self) -> None:
        """Open the record of the run, in a thread."""

    def begin(self, *, device: str | None = None) -> None:
        """Record from now on: the files of the run exist, and only grow."""

    def close(self, status: Status) -> None:
        """Send the rest and finish the record as `status`; waits for a bounded time."""


@contextlib.contextmanager
def tracked(job: Job, folder: Path, *, start: Start) -> Iterator[list[Tracker]]:
    """The trackers that `tracking.backends` names, for a run that begins at `start`.

    The caller starts them; they are closed after the block.
    """
    names = [name for name in job.config.tracking.backends if name in _OPEN]
    trackers = [_OPEN[name](job, folder, start) for name in names]
    status: Status = "FAILED"
    try:
        yield trackers
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        for tracker in trackers:
            tracker.close(status)


def _open_mlflow(job: Job, folder: Path, start: Start) -> Tracker:
    from roll_sft.tracking.mlflow_run import open_run

    return open_run(job, folder, start=start)


_OPEN: dict[str, Callable[[Job, Path, Start], Tracker]] = {"mlflow": _open_mlflow}
