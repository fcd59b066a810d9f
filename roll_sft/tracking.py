"""MLflow, with the driver as its only writer and off the critical path.

A thread owns the client: the database's first migration, every request and every retry are there.
Promise: losing the tracker never loses or slows a run; the loss of it is said once, with its cause.
`steps.jsonl` is written by the driver whatever happens here.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)
# Limits of MLflow's own validation.
MAX_PARAMS_PER_BATCH = 100
MAX_PARAM_LENGTH = 6000
CLOSE_TIMEOUT_S = 60.0


class MlflowTracker:
    """One MLflow run. Calls return at once; `close` waits for what is queued, within a bound."""

    def __init__(self, *, uri: str, experiment: str, run_name: str, folder: Path) -> None:
        self._uri, self._experiment = uri, experiment
        self._run_name, self._folder = run_name, folder
        self._jobs: queue.Queue[Callable[[Any, str], None] | None] = queue.Queue()
        self._status = "FAILED"
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record `params`; values past MLflow's length limit are cut, with a mark."""
        items = [(key, _shortened(str(value))) for key, value in params.items()]

        def job(client: Any, run_id: str) -> None:
            from mlflow.entities import Param

            for first in range(0, len(items), MAX_PARAMS_PER_BATCH):
                batch = items[first : first + MAX_PARAMS_PER_BATCH]
                client.log_batch(run_id, params=[Param(key, value) for key, value in batch])

        self._jobs.put(job)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` at `step`."""
        now_ms = int(time.time() * 1000)

        def job(client: Any, run_id: str) -> None:
            from mlflow.entities import Metric

            entries = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
            client.log_batch(run_id, metrics=entries)

        self._jobs.put(job)

    def log_file(self, path: Path) -> None:
        """Keep a copy of `path` among the run's artifacts."""
        self._jobs.put(lambda client, run_id: client.log_artifact(run_id, str(path)))

    def close(self, *, succeeded: bool) -> None:
        """Finish the run's record; waits at most `CLOSE_TIMEOUT_S`."""
        self._status = "FINISHED" if succeeded else "FAILED"
        self._jobs.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            LOG.warning("MLflow at %s did not finish in %g s", self._uri, CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            client, run_id = self._open_run()
            while (job := self._jobs.get()) is not None:
                job(client, run_id)
            client.set_terminated(run_id, status=self._status)
        except (MlflowException, SQLAlchemyError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            LOG.warning("MLflow at %s stopped recording: %s; the run goes on", self._uri, reason)

    def _open_run(self) -> tuple[Any, str]:
        # Slow to import (seconds), so in this thread and only when MLflow is asked for.
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        artifacts = self._folder / "mlflow"
        if found is not None:
            experiment_id = found.experiment_id
        elif self._uri.startswith("sqlite:///"):
            shelf = Path(self._uri.removeprefix("sqlite:///")).parent / ".mlflow_artifacts"
            experiment_id = client.create_experiment(self._experiment, str(shelf))
        else:
            experiment_id = client.create_experiment(self._experiment)
        tags = {"output_dir": str(self._folder)}
        run = client.create_run(experiment_id, run_name=self._run_name, tags=tags)
        place = Path(run.info.artifact_uri)
        if place.is_absolute() and ".mlflow_artifacts" in place.parts:
            # MLflow derives a run's artifact folder from its experiment, which all runs share to
            # be compared; a link puts the files where they belong, in the run's own folder.
            artifacts.mkdir(parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(artifacts)
        return client, run.info.run_id


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_PARAM_LENGTH else value[: MAX_PARAM_LENGTH - 4] + " ..."
