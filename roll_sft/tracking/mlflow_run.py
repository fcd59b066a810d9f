"""One run in MLflow. The driver is its only writer and never waits for it.

A thread owns the client: the import, the first migration of the database, every request and every
retry run there. It reads metrics from the files of the run (see `journal`), so none is kept in
memory.

Promises: a failure of MLflow never ends or slows a run, and each kind of failure is logged once
with its cause; metrics that a server missed are sent when it answers again, or by the next start of
the same command; `close` is bounded.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from filelock import FileLock

from roll_sft.base.errors import first_line
from roll_sft.base.text import redacted
from roll_sft.checkpoint.resume import AUTO, Start
from roll_sft.job.job import Job
from roll_sft.tracking.journal import Journal, Point, safe_name
from roll_sft.tracking.mlflow_pages import RUN_FILE, SQLITE, NotedRun, noted_run
from roll_sft.tracking.run_facts import DataInput, RunFacts, facts_of
from roll_sft.tracking.system_metrics import SystemMetrics

LOG = logging.getLogger(__name__)
# Limits of MLflow's own validation.
MAX_PARAMS_PER_BATCH = 100
MAX_VALUE_LENGTH = 6000
MAX_DATASET_NAME_LENGTH = 500
SEND_EVERY_S = 2.0
SYSTEM_METRICS_EVERY_S = 30.0
RETRY_PAUSES_S = (10.0, 60.0, 600.0)  # between attempts; the last one repeats
CLOSE_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_AFTER_FAILURE_S = 10.0  # of the run, or of an earlier request
FINISHED, FAILED, KILLED, RUNNING = "FINISHED", "FAILED", "KILLED", "RUNNING"  # MLflow's words
FOLDER_TAG = "output_dir"
# Without this tag MLflow shows an experiment in its view for traces. Its newest versions also need
# the kind in the address of a page, see NotedRun.page.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
# Artifacts and the folder of each: those that exist when the run begins, and those at its end.
FIRST_FILES: dict[str, str | None] = {"config.yaml": None, "data_report.json": None}
ALL_FILES: dict[str, str | None] = {
    **FIRST_FILES,
    "loss.png": None,
    "hf/README.md": "model",
    "hf/loss.png": "model",
}


@dataclass(frozen=True, slots=True)
class Address:
    """The server or database of a run, and its names there."""

    uri: str
    experiment: str
    run_name: str


class _RefusedError(Exception):
    """MLflow refuses the request; another attempt would fail too."""


class _UnreachableError(Exception):
    """MLflow does not answer; another attempt may succeed."""


class MlflowRun:
    """The record of the run in `folder`: a `Tracker`.

    A run that `continues` is recorded in the MLflow run that its folder names, each metric after
    the last step there. `facts` is called in the thread.
    """

    def __init__(
        self,
        address: Address,
        folder: Path,
        *,
        journal: Journal,
        facts: Callable[[], RunFacts],
        continues: bool = False,
    ) -> None:
        self._address, self._folder = address, folder
        uri = address.uri
        # The file of an SQLite database; its lock and artifacts lie beside it.
        self._database = Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None
        self._journal, self._facts, self._continues = journal, facts, continues
        self._recorded: dict[str, int] = {}  # metric -> the last step of it before this process
        self._known_params: Mapping[str, str] = {}
        self._client: Any = None
        self._run_id = self._experiment_id = ""
        self._status = FAILED
        self._warned = set[str]()
        self._begun, self._closing = threading.Event(), threading.Event()
        self._device: str | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Import MLflow and open the record, in the thread."""
        self._thread.start()

    def begin(self, *, device: str | None = None) -> None:
        """Record from now on: the files of the run exist, and only grow."""
        self._device = device
        self._begun.set()

    def close(self, status: str) -> None:
        """Finish the record as `status`, if it was started; waits at most `CLOSE_TIMEOUT_S`."""
        if self._thread.ident is None:
            return
        self._status = status
        self._closing.set()
        self._begun.set()
        has_failed = status != FINISHED or self._warned
        self._thread.join(CLOSE_TIMEOUT_AFTER_FAILURE_S if has_failed else CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._warn("speed", "is too slow: not all metrics are recorded; steps.jsonl has all")

    def _work(self) -> None:
        try:
            client_class = _import_client()
            self._with_retries(lambda: self._open(client_class))
            self._describe(self._facts())
            self._begun.wait()
            self._send_files(FIRST_FILES)
            if self._device is not None:
                self._send_tags({"device": self._device})
            self._send_until_closed()
            finish = partial(self._client.set_terminated, self._run_id, status=self._status)
            self._with_retries(finish)
            self._send_files(ALL_FILES)
            self._note(self._status)
        except (_RefusedError, _UnreachableError, ImportError, OSError) as error:
            # OSError: from the files of the run.
            self._warn("server", f"{first_line(error)}; the run continues without it")

    def _send_until_closed(self) -> None:
        systems = list[SystemMetrics]()  # empty where the machine cannot be sampled
        self._once("system metrics", lambda: systems.append(SystemMetrics(self._recorded)))
        is_last = False
        while not is_last:
            # Before the files are read, so that the last round reads all lines.
            is_last = self._closing.wait(SEND_EVERY_S)
            for points in self._journal.points():
                self._send([p for p in points if p.step > self._recorded.get(p.name, -1)])
            for system in systems:
                self._send(system.points(every_s=SYSTEM_METRICS_EVERY_S))

    def _describe(self, facts: RunFacts) -> None:
        """Record parameters, tags and data sets; of a continued run, the parameters it lacks."""
        from mlflow.entities import Param

        items = [(safe_name(key), _shortened(value)) for key, value in facts.params.items()]
        # MLflow refuses a new value for a parameter that it has.
        params = [Param(*item) for item in items if item[0] not in self._known_params]
        for first in range(0, len(params), MAX_PARAMS_PER_BATCH):
            batch = params[first : first + MAX_PARAMS_PER_BATCH]
            self._record("parameters", partial(self._client.log_batch, self._run_id, params=batch))
        self._send_tags(facts.tags)
        inputs = [_dataset(each) for each in facts.inputs]
        self._record("data sets", lambda: self._client.log_inputs(self._run_id, inputs))

    def _send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        if points:
            now_ms = int(time.time() * 1000)
            batch = [Metric(point.name, point.value, now_ms, point.step) for point in points]
            self._record("metrics", lambda: self._client.log_batch(self._run_id, metrics=batch))

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            batch = [RunTag(name, _shortened(value)) for name, value in tags.items()]
            self._record("tags", lambda: self._client.log_batch(self._run_id, tags=batch))

    def _send_files(self, files: Mapping[str, str | None]) -> None:
        for name, place in files.items():
            path = self._folder / name
            if path.is_file():
                send = partial(self._client.log_artifact, self._run_id, str(path), place)
                self._once("artifacts", send)

    def _record(self, kind: str, request: Callable[[], object]) -> None:
        """Make `request` with retries; log a refusal and continue."""
        try:
            self._with_retries(request)
        except _RefusedError as error:
            self._warn(kind, f"{kind} are refused: {error}")

    def _once(self, kind: str, request: Callable[[], object]) -> None:
        """Make `request` once; log a failure and continue, so that metrics do not wait for it."""
        try:
            _attempt(request)
        except (_RefusedError, _UnreachableError) as error:
            self._warn(kind, f"{kind} are not recorded: {error}")

    def _with_retries(self, request: Callable[[], object]) -> None:
        """Make `request`; while MLflow does not answer, repeat it until the run is over."""
        for pause_s in chain(RETRY_PAUSES_S, repeat(RETRY_PAUSES_S[-1])):
            is_last = self._closing.is_set()
            try:
                _attempt(request)
                return
            except _UnreachableError as error:
                if is_last:
                    raise
                self._warn("server", f"{error}; the run continues and sends the metrics later")
            self._closing.wait(pause_s)

    def _warn(self, kind: str, reason: str) -> None:
        if kind not in self._warned:
            LOG.warning(redacted(f"MLflow at {self._address.uri}: {reason}"))
        self._warned.add(kind)

    def _open(self, client_class: Any) -> None:
        shelf = self._database.parent / ".mlflow_artifacts" if self._database else None
        if self._database is not None:
            self._database.open("ab").close()  # fails at once; MLflow would retry for minutes
        with self._locked():
            if self._database is not None and self._database.stat().st_size == 0:
                _make_tables(self._database, client_class)
            self._client = client_class(tracking_uri=self._address.uri)
            experiment_id = self._experiment(str(shelf) if shelf else None)
        earlier = self._earlier_run()
        if earlier is not None and self._continues:
            self._run_id, self._experiment_id = earlier.info.run_id, earlier.info.experiment_id
            self._known_params = earlier.data.params
            self._recorded = {each.key: each.step for each in earlier.data.to_proto().metrics}
            self._client.update_run(self._run_id, status=RUNNING)
            self._note(RUNNING)
            return
        if earlier is not None and earlier.info.status == RUNNING:  # its process was killed
            self._client.set_terminated(earlier.info.run_id, status=KILLED)
        run = self._client.create_run(
            experiment_id,
            run_name=self._address.run_name,
            tags={FOLDER_TAG: str(self._folder)},
        )
        self._run_id, self._experiment_id = run.info.run_id, run.info.experiment_id
        self._note(RUNNING)
        place = Path(run.info.artifact_uri)
        if shelf is not None and place.is_relative_to(shelf):
            # MLflow puts the artifacts of a run below the folder of its experiment, which all runs
            # share. The link moves them into the folder of the run.
            artifacts = self._folder / "mlflow"
            artifacts.mkdir(parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(artifacts)

    def _experiment(self, artifacts: str | None) -> str:
        """Id of the experiment, which is created if it does not exist."""
        name, client = self._address.experiment, self._client
        found = client.get_experiment_by_name(name)
        if found is None:
            return str(client.create_experiment(name, artifacts, tags={KIND_TAG: KIND}))
        if KIND_TAG not in found.tags:
            client.set_experiment_tag(found.experiment_id, KIND_TAG, KIND)
        return str(found.experiment_id)

    def _earlier_run(self) -> Any:
        """The MLflow run that the folder names; None if it is deleted or the folder is a copy."""
        from mlflow.exceptions import MlflowException

        noted = noted_run(self._folder)
        if noted is None:
            return None
        try:
            run = self._client.get_run(noted.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        is_own = run.data.tags.get(FOLDER_TAG) == str(self._folder)
        return run if is_own and run.info.lifecycle_stage == "active" else None

    def _locked(self) -> AbstractContextManager[object]:
        """Hold the lock of the database: two runs would both create tables and experiment."""
        if self._database is None:
            return nullcontext()
        return FileLock(self._database.parent / ".mlflow.lock")

    def _note(self, status: str) -> None:
        noted = NotedRun(self._run_id, self._experiment_id, status)
        (self._folder / RUN_FILE).write_text(" ".join(noted) + "\n", encoding="utf-8")


def open_run(job: Job, folder: Path, *, start: Start) -> MlflowRun:
    """The record of a run that begins at `start`.

    It is started here where training is finished and MLflow has not recorded that.
    """
    config = job.config
    address = Address(
        uri=config.tracking.mlflow_uri or f"{SQLITE}{folder.parent / 'mlflow.db'}",
        experiment=config.tracking.experiment,
        run_name=config.run_name,
    )
    every = config.train.logging_steps
    # The same command continues the same curve. A run that goes back to a checkpoint, or changes
    # its settings, gives another curve: a new MLflow run, with all steps up to there.
    is_same = config.resume == AUTO and not config.checkpoint.allow_changes
    run = MlflowRun(
        address,
        folder,
        journal=Journal(folder, logging_steps=every, total_steps=job.total_steps),
        facts=partial(facts_of, job),
        continues=start.step > 0 and is_same,
    )
    noted = noted_run(folder)
    if start.step >= job.total_steps and noted is not None and noted.status != FINISHED:
        run.start()
        run.begin()
    return run


def _import_client() -> Any:
    # Takes seconds, so it runs in the thread.
    from mlflow import MlflowClient

    # These log each table of a new database and each attempt of a request.
    for chatty in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    return MlflowClient


def _attempt(request: Callable[[], object]) -> None:
    """Make `request` once. Raises `_RefusedError` or `_UnreachableError`."""
    try:
        request()
    except Exception as error:
        # Any type is possible: MLflow's stores and credentials may be plugins.
        kind = _RefusedError if _is_refused(error) else _UnreachableError
        raise kind(first_line(error)) from error


def _is_refused(error: Exception) -> bool:
    """Whether MLflow found the request itself wrong."""
    from mlflow.exceptions import MlflowException

    known: Any = error  # MLflow has no types
    return isinstance(error, MlflowException) and known.get_http_status_code() in (400, 413, 422)


def _make_tables(database: Path, client_class: Any) -> None:
    """Fill the empty `database` atomically: MLflow cannot use one with half of its tables."""
    aside = database.with_name(f".{database.name}.new")
    aside.unlink(missing_ok=True)
    client_class(tracking_uri=f"{SQLITE}{aside}").search_experiments(max_results=1)
    aside.replace(database)


def _dataset(data: DataInput) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source_type = data.source.partition("://")[0] if "://" in data.source else "local"
    dataset = Dataset(
        name=data.name[:MAX_DATASET_NAME_LENGTH],
        digest=data.digest,
        source_type=source_type,
        source=json.dumps({"uri": data.source}),
        profile=json.dumps(data.profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", data.context)])


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_VALUE_LENGTH else value[: MAX_VALUE_LENGTH - 4] + " ..."
