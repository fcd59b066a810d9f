import logging
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roll_sft import tracking
from roll_sft.tracking import MlflowTracker, without_password
from tests.runtime.ray_cluster import wait_until

TWO_STARTS = """
import sys
from pathlib import Path
from roll_sft.tracking import MlflowTracker
folder = Path(sys.argv[1])
tracker = MlflowTracker(
    uri=f"sqlite:///{folder.parent}/mlflow.db", experiment="e", run_name=folder.name, folder=folder
)
tracker.log_metrics(1, {"loss": 2.0})
tracker.close(succeeded=True)
"""


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What the doors set."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(
        tracking, "CLOSE_IN_TROUBLE_TIMEOUT_S", 30.0
    )  # a busy machine is no trouble


def tracker_of(folder, uri=None):
    folder.mkdir(parents=True, exist_ok=True)
    return MlflowTracker(
        uri=uri or f"sqlite:///{folder.parent / 'mlflow.db'}",
        experiment="experiment",
        run_name=folder.name,
        folder=folder,
    )


def client_of(folder):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def runs_of(client, experiment="experiment"):
    found = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def timed(call):
    started = time.monotonic()
    call()
    return time.monotonic() - started


@pytest.mark.slow
def test_run_has_params_metrics_artifacts_and_a_status(tmp_path):
    folder = tmp_path / "first"
    tracker = tracker_of(folder)
    (folder / "config.yaml").write_text("seed: 42\n")
    tracker.log_params(
        {
            **{f"section.key{number}": number for number in range(120)},
            "long": "x" * 7000,
            "tracking.mlflow_uri": "https://me:secret@host/path",
        }
    )
    tracker.log_file(folder / "config.yaml")
    for step in range(1, 4):
        tracker.log_metrics(step, {"train_loss": 1.0 / step, "tokens": step})
    tracker.close(succeeded=True)

    client = client_of(tmp_path)
    run = runs_of(client)["first"]
    assert run.info.status == "FINISHED"
    assert run.data.params["section.key119"] == "119"
    assert len(run.data.params) == 122
    assert run.data.params["long"] == "x" * 5996 + " ..."
    assert run.data.params["tracking.mlflow_uri"] == "https://***@host/path"
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert (folder / "mlflow" / "config.yaml").read_text() == "seed: 42\n"


@pytest.mark.slow
def test_runs_of_one_parent_share_database_and_experiment_and_keep_their_artifacts(tmp_path):
    for name, succeeded in (("first", True), ("second", False)):
        tracker = tracker_of(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text(name)
        tracker.log_file(tmp_path / name / "config.yaml")
        tracker.close(succeeded=succeeded)
    client = client_of(tmp_path)
    runs = runs_of(client)
    statuses = {name: run.info.status for name, run in runs.items()}
    assert statuses == {"first": "FINISHED", "second": "FAILED"}
    for name, run in runs.items():
        place = Path(run.info.artifact_uri)
        assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
        assert (place / "config.yaml").read_text() == name
        assert place.resolve() == tmp_path / name / "mlflow"


@pytest.mark.slow
def test_two_runs_that_start_together_make_one_database(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    starts = [
        subprocess.Popen([sys.executable, "-c", TWO_STARTS, str(folder)]) for folder in folders
    ]
    assert [start.wait(120) for start in starts] == [0, 0]
    runs = runs_of(client_of(tmp_path), "e")
    assert {name: run.info.status for name, run in runs.items()} == {
        "first": "FINISHED",
        "second": "FINISHED",
    }


@pytest.mark.slow
def test_a_kill_while_the_tables_are_made_leaves_a_database_that_can_be_used(tmp_path):
    made = tmp_path / "made"
    program = """
import os, signal, sys
from pathlib import Path

steps = 0

def killed(*args):
    global steps
    steps += 1
    if steps == 3:
        Path(sys.argv[2]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

import alembic.runtime.migration as migration
original = migration.HeadMaintainer.update_to_step
migration.HeadMaintainer.update_to_step = killed
""" + TWO_STARTS.replace("tracker.close", "import time; time.sleep(60); tracker.close")
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path / "first"), str(made)])
    assert result.returncode == -signal.SIGKILL
    assert made.exists(), "the fault did not happen where it should"
    tracker = tracker_of(tmp_path / "second")
    tracker.log_metrics(1, {"loss": 2.0})
    tracker.close(succeeded=True)
    assert runs_of(client_of(tmp_path))["second"].data.metrics == {"loss": 2.0}


@pytest.mark.slow
def test_calls_return_at_once_while_the_database_is_made(tmp_path):
    def use():
        nonlocal tracker
        tracker = tracker_of(tmp_path / "run")
        tracker.log_params({"key": "value"})
        tracker.log_metrics(1, {"loss": 1.0})

    tracker = None
    assert timed(use) < 0.2
    tracker.close(succeeded=True)


def test_database_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tracker = tracker_of(tmp_path / "run", uri=f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    wait_until(lambda: caplog.records, timeout_s=30, what="a warning")
    for step in range(100):
        tracker.log_metrics(step, {"loss": 1.0})
    assert timed(lambda: tracker.close(succeeded=True)) < 1
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Not a directory" in warning.getMessage()
    assert warning.getMessage().endswith("; the run goes on without it")


def test_dead_server_costs_one_warning_without_its_password_and_a_bounded_close(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(tracking, "RETRY_PAUSES_S", (0.1, 0.1))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://me:secret@127.0.0.1:{unused.getsockname()[1]}"
        tracker = tracker_of(tmp_path / "run", uri=uri)
        for step in range(100):
            tracker.log_metrics(step, {"loss": 1.0})
        tracker._thread.join(30)
    assert not tracker._thread.is_alive()
    assert timed(lambda: tracker.close(succeeded=True)) < 1
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "secret" not in warning.getMessage()
    assert "Connection refused" in warning.getMessage()


def test_server_that_never_answers_is_left_after_a_bounded_wait(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "CLOSE_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = tracker_of(tmp_path / "run", uri=uri)
        assert timed(lambda: tracker.log_metrics(1, {"loss": 1.0})) < 0.1
        assert timed(lambda: tracker.close(succeeded=True)) < 1.5
    assert "is too slow, so that not all is recorded" in caplog.text


def test_request_that_fails_for_a_while_is_made_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "RETRY_PAUSES_S", (0.01, 0.01))
    tracker = tracker_of(tmp_path / "run", uri="http://127.0.0.1:9")
    tracker._closing.clear()
    answers = [OSError("down"), OSError("down"), None]

    def request():
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    tracker._try(request)
    assert answers == []


def test_steps_that_outrun_mlflow_are_sent_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(MlflowTracker, "_work", lambda self: None)
    tracker = tracker_of(tmp_path / "run")
    sizes = []

    class Client:
        def log_batch(self, run_id, *, metrics):
            sizes.append(len(metrics))

    tracker._client = Client()
    for step in range(300):
        tracker.log_metrics(step, dict.fromkeys("abcdefgh", 1.0))
    tracker._send_metrics()
    assert sizes == [1000, 1000, 400]


def test_metrics_that_nobody_takes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(MlflowTracker, "_work", lambda self: None)
    monkeypatch.setattr(tracking, "MAX_WAITING_METRICS", 100)
    tracker = tracker_of(tmp_path / "run")
    for step in range(1000):
        tracker.log_metrics(step, {"loss": 1.0})
    assert tracker._metrics.qsize() == 100


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("at https://a@b and postgresql://u:p@h/db", "at https://***@b and postgresql://***@h/db"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
    ],
)
def test_passwords_in_urls_are_masked(text, masked):
    assert without_password(text) == masked
