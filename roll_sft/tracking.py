"""MLflow, with the driver as its only writer and off the critical path.

A thread owns the client: the import, the database's first migration, every request and every retry
are there. Promises: losing the tracker never loses or slows a run, and is said once, with its
cause; `close` is bounded. `steps.jsonl` is written by the driver whatever happens here.
"""

import contextlib
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

LOG = logging.getLogger(__name__)
# Limits of MLflow's own validation.
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
MAX_PARAM_LENGTH = 6000
MAX_WAITING_METRICS = 100_000  # 20 MB of them; beyond, the newest are not recorded
RETRY_PAUSES_S = (10.0, 60.0, 600.0)  # on top of MLflow's own retries, of a minute or so
CLOSE_TIMEOUT_S = 30.0
CLOSE_AFTER_FAILURE_TIMEOUT_S = 5.0
SQLITE, SHELF = "sqlite:///", ".mlflow_artifacts"


class MlflowTracker:
    """One MLflow run. Calls return at once; `close` waits for what is queued, within a bound."""

    def __init__(self, *, uri: str, experiment: str, run_name: str, folder: Path) -> None:
        self._uri, self._experiment = uri, experiment
        self._run_name, self._folder = run_name, folder
        self._client: Any = None
        self._run_id = ""
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._metrics: queue.Queue[tuple[str, float, int, int]] = queue.Queue(MAX_WAITING_METRICS)
        self._status = "FAILED"
        self._has_failed = False  # a request, which is tried again or was the last
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
        is_hopeless = self._has_failed or not succeeded
        timeout_s = CLOSE_AFTER_FAILURE_TIMEOUT_S if is_hopeless else CLOSE_TIMEOUT_S
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"did not finish within {timeout_s:g} s")

    def _put(self, job: Callable[[], None]) -> None:
        if self._thread.is_alive():
            self._jobs.put(job)

    def _work(self) -> None:
        try:
            with _quiet_mlflow():
                self._try(self._open_run)
                while (job := self._jobs.get()) is not None:
                    job()
                self._try(lambda: self._client.set_terminated(self._run_id, status=self._status))
        except self._errors() as error:
            self._warn(_first_line(error))

    def _try(self, request: Callable[[], None]) -> None:
        """Make a request, again after each pause; raises what the last attempt does."""
        for pause_s in RETRY_PAUSES_S:
            try:
                return request()
            except self._errors() as error:
                self._warn(f"{_first_line(error)}; trying again")
            if self._closing.wait(pause_s):
                break
        return request()
