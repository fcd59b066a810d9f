"""One run in MLflow: a `Tracker`. MLflow is imported when the record is opened.

A server has the last step of each metric, so values that it has are never sent twice. Promise: runs
that share an SQLite file create its tables and their experiment once.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from roll_sft.base.text import redacted
from roll_sft.tracking.journal import Record, safe_name
from roll_sft.tracking.mlflow_pages import RUN_FILE, SQLITE, NotedRun, noted_run
from roll_sft.tracking.run_facts import DataInput, RunFacts
from roll_sft.tracking.sample_table import table_of
from roll_sft.tracking.system_metrics import SystemMetrics
from roll_sft.tracking.trackers import FINISHED, RecordedRun, Request, Status

# Limits of MLflow's own validation.
MAX_PARAMS_PER_BATCH = 100
MAX_VALUE_LENGTH = 6000
MAX_DATASET_NAME_LENGTH = 500
MAX_TAG_LENGTH = 5000
SYSTEM_METRICS_EVERY_S = 30.0
KILLED, RUNNING = "KILLED", "RUNNING"  # MLflow's words, as those of Status
TABLES_TAG = "mlflow.loggedArtifacts"  # artifacts that its pages show as tables
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


class MlflowRun:
    """The record of the run in `folder`.

    A run that `continues` is recorded in the MLflow run that its folder names, each metric after
    the last step there.
    """

    name = "mlflow"

    def __init__(self, address: Address, folder: Path, *, continues: bool = False) -> None:
        self._address, self._folder, self._continues = address, folder, continues
        self.title = redacted(f"MLflow at {address.uri}")
        uri = address.uri
        # The file of an SQLite database; its lock and artifacts lie beside it.
        self._database = Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None
        self._recorded: dict[str, int] = {}  # metric -> the last step of it before this process
        self._known_params: Mapping[str, str] = {}
        self._client: Any = None
        self._run_id = self._experiment_id = ""
        self._systems: list[SystemMetrics] | None = None  # empty where there is none to sample
        self._tables = list[str]()  # artifacts of samples

    @classmethod
    def of(cls, run: RecordedRun) -> "MlflowRun":
        """The record that the configuration of `run` asks for."""
        tracking, folder = run.config.tracking, run.folder
        address = Address(
            uri=tracking.mlflow_uri or f"{SQLITE}{folder.parent / 'mlflow.db'}",
            experiment=tracking.experiment,
            run_name=run.config.run_name,
        )
        return cls(address, folder, continues=run.continues)

    def open(self) -> None:
        """Open the MLflow run, and create database and experiment where they are missing."""
        self._open(_import_client())

    def describe(self, facts: RunFacts) -> Iterator[Request]:
        """Parameters, tags and data sets; of a continued run, the parameters it lacks."""
        from mlflow.entities import Param

        items = [(safe_name(key), _shortened(value)) for key, value in facts.params.items()]
        # MLflow refuses a new value for a parameter that it has.
        params = [Param(*item) for item in items if item[0] not in self._known_params]
        for first in range(0, len(params), MAX_PARAMS_PER_BATCH):
            batch = params[first : first + MAX_PARAMS_PER_BATCH]
            yield Request("parameters", partial(self._log_batch, params=batch))
        if facts.tags:
            yield Request("tags", partial(self._log_tags, facts.tags))
        inputs = [_dataset(each) for each in facts.inputs]
        yield Request("data sets", lambda: self._client.log_inputs(self._run_id, inputs))
        yield from self._files(FIRST_FILES)

    def send(self, records: Sequence[Record]) -> Iterator[Request]:
        """Metrics, a table of samples for each step that has some, and the machine's load."""
        from mlflow.entities import Metric

        if self._systems is None:
            self._systems = []
            yield Request("system metrics", self._begin_sampling, is_repeated=False)
        points = [point for record in records for point in record.points]
        points = [point for point in points if point.step > self._recorded.get(point.name, -1)]
        for system in self._systems if not records else ():
            points += system.points(every_s=SYSTEM_METRICS_EVERY_S)
        if points:
            now_ms = int(time.time() * 1000)
            batch = [Metric(point.name, point.value, now_ms, point.step) for point in points]
            yield Request("metrics", partial(self._log_batch, metrics=batch))
        for record in records:
            if record.samples:
                yield Request("samples", partial(self._log_samples, record), is_repeated=False)

    def finish(self, status: Status) -> Iterator[Request]:
        """Status and artifacts."""
        set_status = partial(self._client.set_terminated, self._run_id, status=status)
        yield Request("status", set_status)
        yield from self._files(ALL_FILES)
        self._note(status)

    def is_refused(self, error: Exception) -> bool:
        """Whether MLflow found the request itself wrong."""
        from mlflow.exceptions import MlflowException

        known: Any = error  # MLflow has no types
        is_known = isinstance(error, MlflowException)
        return is_known and known.get_http_status_code() in (400, 413, 422)

    def was_finished(self) -> bool:
        """Whether the folder names an MLflow run that is finished."""
        noted = noted_run(self._folder)
        return noted is not None and noted.status == FINISHED

    def _begin_sampling(self) -> None:
        self._systems = [SystemMetrics(self._recorded)]

    def _log_batch(self, **what: Any) -> None:
        self._client.log_batch(self._run_id, **what)

    def _log_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._log_batch(tags=[RunTag(name, _shortened(value)) for name, value in tags.items()])

    def _log_samples(self, record: Record) -> None:
        """A table in the format that MLflow's pages read; the same step replaces its own."""
        head, *rows = table_of(record.samples)
        table = {"columns": head, "data": rows}
        name = f"generations/step_{record.step:08d}.json"
        self._client.log_text(self._run_id, json.dumps(table), name)
        self._tables.append(name)
        shown = [{"path": path, "type": "table"} for path in self._tables]
        while len(tag := json.dumps(shown)) > MAX_TAG_LENGTH:
            shown.pop(0)
        self._client.set_tag(self._run_id, TABLES_TAG, tag)

    def _files(self, files: Mapping[str, str | None]) -> Iterator[Request]:
        for name, place in files.items():
            path = self._folder / name
            if path.is_file():
                send = partial(self._client.log_artifact, self._run_id, str(path), place)
                yield Request("artifacts", send, is_repeated=False)

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
            tables = json.loads(earlier.data.tags.get(TABLES_TAG, "[]"))
            self._tables = [each["path"] for each in tables]
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


def _import_client() -> Any:
    # Takes seconds, so it runs in the thread.
    from mlflow import MlflowClient

    # These log each table of a new database and each attempt of a request.
    for chatty in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    return MlflowClient


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
