"""MLflow, with the driver as its only writer and off the critical path.

A thread owns the client: the import, the database's first migration, every request and every retry
are there. Promises: losing the tracker never loses or slows a run, and is said once, with its
cause; `close` is bounded. `steps.jsonl` is written by the driver whatever happens here.
"""

import contextlib
import functools
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from roll_sft.errors import first_line

LOG = logging.getLogger(__name__)
# Limits of MLflow's own validation.
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
MAX_PARAM_LENGTH = 6000
MAX_WAITING_METRICS = 100_000  # 20 MB of them; beyond, the newest are not recorded
RETRY_PAUSES_S = (10.0, 60.0, 600.0)  # on top of MLflow's own retries
CLOSE_TIMEOUT_S = 30.0
CLOSE_IN_TROUBLE_TIMEOUT_S = 3.0  # of the run or of MLflow
SQLITE = "sqlite:///"


class MlflowTracker:
    """One MLflow run. Calls return at once; `close` waits for what is queued, within a bound.

    A run that `resumes` goes on in the newest MLflow run of its folder, and records of a step what
    is not recorded there yet.
    """

    def __init__(
        self, *, uri: str, experiment: str, run_name: str, folder: Path, resumes: bool = False
    ) -> None:
        self._uri, self._experiment = uri, experiment
        # The file of an SQLite database, beside which its lock and its artifacts lie.
        self._database = Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None
        self._run_name, self._folder = run_name, folder
        self._resumes = resumes
        self._recorded: dict[str, int] = {}  # metric -> the last step of it before this process
        self._client: Any = None
        self._run_id = ""
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._metrics: queue.Queue[tuple[str, float, int, int]] = queue.Queue(MAX_WAITING_METRICS)
        self._status = "FAILED"
        self._errors: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, ImportError)
        self._has_warned = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record `params`; values past MLflow's length limit are cut, with a mark."""
        items = [(key, _shortened(without_password(str(value)))) for key, value in params.items()]
        self._put(lambda: self._send_params(items))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` at `step`."""
        now_ms = int(time.time() * 1000)
        with contextlib.suppress(queue.Full):
            for key, value in metrics.items():
                self._metrics.put_nowait((key, float(value), now_ms, step))
        self._put(self._send_metrics)

    def log_file(self, path: Path) -> None:
        """Keep a copy of `path` among the run's artifacts."""
        self._put(lambda: self._try(lambda: self._client.log_artifact(self._run_id, str(path))))

    def close(self, *, succeeded: bool) -> None:
        """Finish the run's record; waits at most `CLOSE_TIMEOUT_S`."""
        self._status = "FINISHED" if succeeded else "FAILED"
        self._closing.set()
        self._jobs.put(None)
        is_patient = succeeded and not self._has_warned
        self._thread.join(CLOSE_TIMEOUT_S if is_patient else CLOSE_IN_TROUBLE_TIMEOUT_S)
        if self._thread.is_alive():
            self._warn("is too slow, so that not all is recorded")

    def _put(self, job: Callable[[], None]) -> None:
        if self._thread.is_alive():
            self._jobs.put(job)

    def _work(self) -> None:
        try:
            client_class = self._import_mlflow()
            self._try(lambda: self._open_run(client_class))
            while (job := self._jobs.get()) is not None:
                job()
            self._try(lambda: self._client.set_terminated(self._run_id, status=self._status))
        except self._errors as error:
            self._warn(first_line(error))

    def _try(self, request: Callable[[], Any]) -> None:
        """Make `request`, again after each pause; raises what the last attempt raises."""
        for pause_s in RETRY_PAUSES_S:
            try:
                request()
                return
            except self._errors as error:
                self._warn(first_line(error))
            if self._closing.wait(pause_s):
                break
        request()

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            line = without_password(f"MLflow at {self._uri}: {reason}")
            LOG.warning("%s; the run goes on without it", line)
        self._has_warned = True

    def _import_mlflow(self) -> Any:
        # Slow to import (seconds), so in this thread and only when MLflow is asked for.
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self._errors += (MlflowException, SQLAlchemyError)
        # These announce each table of a new database and each attempt of a request.
        for chatty in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        return MlflowClient

    def _open_run(self, client_class: Any) -> None:
        shelf = self._database and self._database.parent / ".mlflow_artifacts"
        if self._database is not None:
            self._database.open("ab").close()  # where it cannot, MLflow would try for minutes
        with self._alone():
            if self._database is not None and self._database.stat().st_size == 0:
                _make_tables(self._database, client_class)
            self._client = client_class(tracking_uri=self._uri)
            found = self._client.get_experiment_by_name(self._experiment)
            experiment_id = (
                found.experiment_id
                if found is not None
                else self._client.create_experiment(self._experiment, shelf and str(shelf))
            )
        tags = {"output_dir": str(self._folder)}
        run = self._earlier_run(experiment_id) if self._resumes else None
        if run is not None:
            self._run_id = run.info.run_id
            self._recorded = self._last_steps(run)
            self._client.update_run(self._run_id, status="RUNNING")
            return
        self._resumes = False  # nothing is recorded
        run = self._client.create_run(experiment_id, run_name=self._run_name, tags=tags)
        self._run_id = run.info.run_id
        place = Path(run.info.artifact_uri)
        if shelf is not None and place.is_relative_to(shelf):
            # MLflow derives a run's artifact folder from its experiment, which all runs share to
            # be compared; a link puts the files where they belong, in the run's own folder.
            artifacts = self._folder / "mlflow"
            artifacts.mkdir(parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(artifacts)

    def _earlier_run(self, experiment_id: str) -> Any:
        folder = str(self._folder).replace("'", "\\'")
        found = self._client.search_runs(
            [experiment_id],
            filter_string=f"tags.output_dir = '{folder}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        return found[0] if found else None

    def _last_steps(self, run: Any) -> dict[str, int]:
        """The last step of each metric of an earlier run, which may be past its checkpoint."""
        histories = {
            key: self._client.get_metric_history(run.info.run_id, key) for key in run.data.metrics
        }
        return {key: max(point.step for point in points) for key, points in histories.items()}

    def _alone(self) -> contextlib.AbstractContextManager[object]:
        """Two runs that start together would both make the tables, and the experiment."""
        if self._database is None:
            return contextlib.nullcontext()
        return FileLock(self._database.parent / ".mlflow.lock")

    def _send_params(self, items: list[tuple[str, str]]) -> None:
        from mlflow.entities import Param

        if self._resumes:  # MLflow refuses another value
            known = self._client.get_run(self._run_id).data.params
            items = [item for item in items if item[0] not in known]
        for first in range(0, len(items), MAX_PARAMS_PER_BATCH):
            batch = [Param(*item) for item in items[first : first + MAX_PARAMS_PER_BATCH]]
            self._try(functools.partial(self._client.log_batch, self._run_id, params=batch))

    def _send_metrics(self) -> None:
        """All metrics that wait: where MLflow is slower than the steps, many of them at once."""
        from mlflow.entities import Metric

        while not self._metrics.empty():
            size = min(self._metrics.qsize(), MAX_METRICS_PER_BATCH)
            waiting = [self._metrics.get_nowait() for _ in range(size)]
            batch = [Metric(*each) for each in waiting if each[3] > self._recorded.get(each[0], -1)]
            self._try(functools.partial(self._client.log_batch, self._run_id, metrics=batch))


def _make_tables(database: Path, client_class: Any) -> None:
    """Fill the empty `database` in one move: MLflow cannot use one whose tables are half made."""
    aside = database.with_name(f".{database.name}.new")
    aside.unlink(missing_ok=True)
    client_class(tracking_uri=f"{SQLITE}{aside}").search_experiments(max_results=1)
    aside.replace(database)


def without_password(text: str) -> str:
    """`text` with the user and password of every URL in it masked."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_PARAM_LENGTH else value[: MAX_PARAM_LENGTH - 4] + " ..."
