"""Which trackers a run has, and how each learns that it ends."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from roll_sft.checkpoint.resume import AUTO, Start
from roll_sft.job.job import Job
from roll_sft.tracking.journal import Journal
from roll_sft.tracking.mlflow_run import (
    FAILED,
    FINISHED,
    KILLED,
    Address,
    MlflowRun,
    noted_run,
)
from roll_sft.tracking.run_facts import facts_of


@contextlib.contextmanager
def tracked(job: Job, folder: Path, *, start: Start) -> Iterator[list[MlflowRun]]:
    """The trackers of a run that begins with `start`: to be started, and closed at the end.

    Where training was finished before and MLflow does not know it, it is started here.
    """
    if "mlflow" not in job.config.tracking.backends:
        yield []
        return
    run = _mlflow_run(job, folder, start=start)
    noted = noted_run(folder)
    if start.step >= job.total_steps and noted is not None and noted.status != FINISHED:
        run.start()
        run.begin()
    status = FAILED
    try:
        yield [run]
        status = FINISHED
    except (KeyboardInterrupt, SystemExit):
        status = KILLED
        raise
    finally:
        run.close(status)


def _mlflow_run(job: Job, folder: Path, *, start: Start) -> MlflowRun:
    config = job.config
    address = Address(
        uri=config.tracking.mlflow_uri or f"sqlite:///{folder.parent / 'mlflow.db'}",
        experiment=config.tracking.experiment,
        run_name=config.run_name,
    )
    journal = Journal(folder, logging_steps=config.train.logging_steps, total_steps=job.total_steps)
    # The same command gives the same curve again. Going back, or on with other settings, gives
    # another one from there: that is another MLflow run, with all steps up to there.
    is_same = config.resume == AUTO and not config.checkpoint.allow_changes
    return MlflowRun(
        address,
        folder,
        journal=journal,
        facts=partial(facts_of, job),
        continues=start.step > 0 and is_same,
    )
