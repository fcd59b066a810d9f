"""Which MLflow run the folder of a run names, and where to see it. Does not import MLflow."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from roll_sft.base.text import redacted
from roll_sft.config.schema import RunConfig

SQLITE = "sqlite:///"
RUN_FILE = ".mlflow_run"  # in the folder of the run: a NotedRun
LOCAL_SERVER = "http://127.0.0.1:5000"  # the address of `mlflow ui`


class NotedRun(NamedTuple):
    """The MLflow run that the folder of a run names."""

    run_id: str
    experiment_id: str
    status: str

    def page(self, server: str) -> str:
        """Its page on an MLflow `server`, in the view of training runs and not of traces."""
        place = f"experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{server.rstrip('/')}/#/{place}?workflowType=machine_learning"


def pages(config: RunConfig, folder: Path, *, database: str) -> Iterator[str]:
    """The command that serves the curves of a run, where no server does, and the run's page.

    Nothing where MLflow has no run, as where it is not installed. `database` is how a user writes
    the path of the default SQLite file.
    """
    uri = config.tracking.mlflow_uri or f"{SQLITE}{database}"
    server = redacted(uri) if uri.startswith(("http://", "https://")) else None
    noted = noted_run(folder)
    if server is None and noted is not None:
        yield f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
    if noted is not None:
        yield f"curves: {noted.page(server or LOCAL_SERVER)}"
    elif server is not None:
        yield f"curves: {server}, experiment {config.tracking.experiment}"


def noted_run(folder: Path) -> NotedRun | None:
    """The MLflow run of the run in `folder`; None if it has none."""
    try:
        return NotedRun(*(folder / RUN_FILE).read_text(encoding="utf-8").split())
    except (FileNotFoundError, TypeError):  # TypeError: not three words
        return None
