"""MLflow itself, on its SQLite store: what a run leaves there, however either of them ends."""

import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from roll_sft.base.errors import DivergedError
from roll_sft.checkpoint.resume import Start
from roll_sft.config.build import build_config
from roll_sft.tracking import mlflow_pages, mlflow_run, recorder, trackers
from roll_sft.tracking.journal import Journal
from roll_sft.tracking.mlflow_pages import noted_run
from roll_sft.tracking.mlflow_run import Address, MlflowRun
from roll_sft.tracking.recorder import Recorder
from roll_sft.tracking.run_facts import DataInput, RunFacts
from tests.runtime.ray_cluster import wait_until

FINISHED, FAILED = "FINISHED", "FAILED"
NO_FACTS = RunFacts(params={}, tags={}, inputs=())
TWO_STARTS = """
import sys
from pathlib import Path
from roll_sft.tracking.run_facts import RunFacts
from roll_sft.tracking.journal import Journal
from roll_sft.tracking import recorder
from roll_sft.tracking.mlflow_run import Address, MlflowRun
recorder.CLOSE_TIMEOUT_S = 100.0
folder = Path(sys.argv[1])
address = Address(f"sqlite:///{folder.parent}/mlflow.db", "experiment", folder.name)
run = recorder.Recorder(
    MlflowRun(address, folder),
    folder,
    journal=Journal(folder, logging_steps=1, total_steps=9),
    facts=lambda: RunFacts(params={}, tags={}, inputs=()),
)
run.start()
run.close("FINISHED")
"""


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What the doors set."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(recorder, "SEND_EVERY_S", 0.05)
    # A busy machine is no trouble.
    monkeypatch.setattr(recorder, "CLOSE_TIMEOUT_AFTER_FAILURE_S", 30.0)


@pytest.fixture
def outputs(tmp_path, empty_database):
    """A folder of runs whose database is made."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def tracker_of(folder, uri=None, facts=NO_FACTS, continues=False, device=None):
    folder.mkdir(parents=True, exist_ok=True)
    address = Address(uri or f"sqlite:///{folder.parent / 'mlflow.db'}", "experiment", folder.name)
    tracker = Recorder(
        MlflowRun(address, folder, continues=continues),
        folder,
        journal=Journal(folder, logging_steps=1, total_steps=1000),
        facts=lambda: facts,
    )
    tracker.start(device=device)
    return tracker


def write_steps(folder, steps):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "steps.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": n, "train_loss": 1 / n}) + "\n" for n in steps)


def client_of(folder):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def runs_of(folder):
    """The newest run of each name, and how many there are."""
    client = client_of(folder)
    found = client.get_experiment_by_name("experiment")
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"])
    return {run.info.run_name: run for run in runs}, len(runs)


def history(folder, run, name):
    points = client_of(folder).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in points]


def warnings_of(caplog):
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


# What is recorded


def test_run_has_params_tags_data_sets_metrics_artifacts_and_a_status(outputs, monkeypatch):
    monkeypatch.setattr(mlflow_run, "SYSTEM_METRICS_EVERY_S", 0.0)
    folder = outputs / "first"
    write_steps(folder, range(1, 4))
    (folder / "config.yaml").write_text("seed: 42\n")
    (folder / "hf").mkdir()
    facts = RunFacts(
        params={
            **{f"section.key{number}": str(number) for number in range(120)},
            "long": "x" * 7000,
            "data.template_kwargs.a|b": "true",
        },
        tags={"layout": "TP 2", "mlflow.source.git.commit": "c" * 40, "long": "y" * 9000},
        inputs=tuple(
            DataInput(name, "d" * 16, "s3://bucket/x", context, {"num_rows": 7, "tokens": 99})
            for name, context in (("val (1)", "validation"), ("n" * 600, "train"))
        ),
    )
    tracker = tracker_of(folder, facts=facts, device="8 x NVIDIA H100")
    wait_until(lambda: noted_run(folder), timeout_s=60, what="a run")
    (folder / "hf" / "README.md").write_text("# card")
    (folder / "loss.png").write_bytes(b"png")
    tracker.close(FINISHED)

    (run,) = runs_of(outputs)[0].values()
    assert run.info.status == "FINISHED"
    assert noted_run(folder) == (run.info.run_id, run.info.experiment_id, "FINISHED")
    assert run.data.params["section.key119"] == "119"
    assert len(run.data.params) == 122
    assert run.data.params["long"] == "x" * 5996 + " ..."
    assert {"layout": "TP 2", "device": "8 x NVIDIA H100"}.items() <= run.data.tags.items()
    inputs = {each.dataset.name: each for each in run.inputs.dataset_inputs}
    assert json.loads(inputs["val (1)"].dataset.profile) == {"num_rows": 7, "tokens": 99}
    assert inputs["val (1)"].tags[0].value == "validation"
    assert "n" * 500 in inputs
    for name in ("train/loss", "train_loss"):
        assert history(outputs, run, name) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    client = client_of(outputs)
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"config.yaml", "loss.png", "model"}
    assert (folder / "mlflow" / "model" / "README.md").read_text() == "# card"
    experiment = client.get_experiment_by_name("experiment")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_validation_set_of_any_name_is_recorded_with_all_that_follows(outputs, caplog):
    folder = outputs / "first"
    names = ["val (1)", "a|b", "x" * 300, "../..", "plain"]
    write_steps(folder, range(1, 3))
    with (folder / "eval.jsonl").open("w") as file:
        for name in names:
            file.write(json.dumps({"step": 1, "name": name, "loss": 2.0, "perplexity": 7.4}) + "\n")
    tracker = tracker_of(folder)
    wait_until(lambda: noted_run(folder), timeout_s=60, what="a run")
    write_steps(folder, range(3, 5))
    tracker.close(FINISHED)
    (run,) = runs_of(outputs)[0].values()
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(outputs, run, "train/loss")] == [1, 2, 3, 4]
    losses = [name for name in run.data.metrics if name.startswith("eval/")]
    assert len(losses) == 2 * len(names)
    assert run.data.metrics["eval/plain/loss"] == 2.0
    assert not warnings_of(caplog)


def test_a_request_that_mlflow_refuses_costs_only_itself(outputs, caplog, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    log_batch = MlflowClient.log_batch

    def refusing(self, run_id, **what):
        if any(metric.step in (1, 3) for metric in what.get("metrics", ())):
            raise MlflowException("Invalid value", error_code=INVALID_PARAMETER_VALUE)
        return log_batch(self, run_id, **what)

    monkeypatch.setattr(MlflowClient, "log_batch", refusing)
    folder = outputs / "first"
    tracker = tracker_of(folder)
    for step in range(1, 5):
        write_steps(folder, [step])
        wait_until(
            lambda: tracker._journal._steps._read == (folder / "steps.jsonl").stat().st_size,
            timeout_s=60,
            what="a read",
        )
        time.sleep(0.1)
    tracker.close(FINISHED)
    (run,) = runs_of(outputs)[0].values()
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(outputs, run, "train/loss")] == [2, 4]
    (warning,) = warnings_of(caplog)
    assert "metrics are refused: Invalid value" in warning


@pytest.mark.slow
def test_runs_of_one_parent_share_database_and_experiment_and_keep_their_artifacts(outputs):
    for name, status in (("first", FINISHED), ("second", FAILED)):
        (outputs / name).mkdir()
        (outputs / name / "config.yaml").write_text(name)
        tracker_of(outputs / name).close(status)
    client = client_of(outputs)
    runs, _ = runs_of(outputs)
    statuses = {name: run.info.status for name, run in runs.items()}
    assert statuses == {"first": "FINISHED", "second": "FAILED"}
    for name, run in runs.items():
        place = Path(run.info.artifact_uri)
        assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
        assert (place / "config.yaml").read_text() == name
        assert place.resolve() == outputs / name / "mlflow"


# How a run ends, and goes on


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (None, "FINISHED"),
        (DivergedError("loss nan"), "FAILED"),
        (OSError("a fault of ours"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
    ],
)
def test_every_end_of_a_run_leaves_its_status(end, status, outputs, monkeypatch):
    monkeypatch.setattr(trackers, "facts_of", lambda job: NO_FACTS)
    folder = outputs / "first"
    folder.mkdir()
    job = SimpleNamespace(config=build_config({}), total_steps=4)
    try:
        with trackers.tracked(job, folder, start=Start(0, None)) as (tracker,):
            tracker.start()
            wait_until(lambda: noted_run(folder), timeout_s=60, what="a run")
            if end is not None:
                raise end
    except BaseException as error:
        if error is not end:
            raise
    found = client_of(outputs).get_run(noted_run(folder).run_id)
    assert found.info.status == status
    assert noted_run(folder).status == status


def killed_run(outputs, last_step):
    """A run whose process is gone: recorded up to `last_step`, and RUNNING for ever."""
    folder = outputs / "run"
    write_steps(folder, range(1, last_step + 1))
    facts = RunFacts(params={"layout": "TP 1"}, tags={}, inputs=())
    tracker_of(folder, facts=facts).close(FAILED)
    run_id = noted_run(folder).run_id
    client_of(outputs).update_run(run_id, status="RUNNING")
    (folder / mlflow_pages.RUN_FILE).write_text(f"{run_id} 1 RUNNING\n")
    return folder, run_id


def test_a_killed_run_that_goes_on_is_one_run_without_a_double_step(outputs, caplog):
    folder, run_id = killed_run(outputs, 5)
    (folder / "steps.jsonl").unlink()
    write_steps(folder, range(1, 4))  # it goes on from the checkpoint of step 3
    changed = RunFacts(params={"layout": "TP 2", "new": "1"}, tags={}, inputs=())
    tracker = tracker_of(folder, continues=True, facts=changed)
    write_steps(folder, range(4, 8))
    tracker.close(FINISHED)
    runs, number = runs_of(outputs)
    assert number == 1
    assert (runs["run"].info.run_id, runs["run"].info.status) == (run_id, "FINISHED")
    assert runs["run"].data.params == {"layout": "TP 1", "new": "1"}
    assert not warnings_of(caplog)
    assert [step for step, _ in history(outputs, runs["run"], "train/loss")] == [*range(1, 8)]


def test_a_killed_run_that_begins_anew_or_goes_back_leaves_no_running_one(outputs):
    folder, run_id = killed_run(outputs, 5)
    tracker_of(folder).close(FINISHED)
    _, number = runs_of(outputs)
    assert number == 2
    assert client_of(outputs).get_run(run_id).info.status == "KILLED"
    assert noted_run(folder).run_id != run_id


def test_a_copy_of_a_run_is_another_run(outputs):
    folder, run_id = killed_run(outputs, 2)
    shutil.copytree(folder, outputs / "copy")
    tracker_of(outputs / "copy", continues=True).close(FINISHED)
    assert noted_run(outputs / "copy").run_id != run_id
    assert client_of(outputs).get_run(run_id).info.status == "RUNNING"


@pytest.mark.parametrize(
    ("settings_", "is_same"),
    [
        ({}, True),
        ({"resume": "/runs/a/checkpoints/step_00000002"}, False),
        ({"checkpoint": {"allow_changes": ["schedule"]}}, False),
    ],
)
def test_only_the_same_command_goes_on_in_the_same_mlflow_run(settings_, is_same, tmp_path):
    job = SimpleNamespace(config=build_config(settings_), total_steps=4)
    with trackers.tracked(job, tmp_path, start=Start(2, None)) as (tracker,):
        assert tracker._tracker._continues == is_same
    with trackers.tracked(job, tmp_path, start=Start(0, None)) as (tracker,):
        assert not tracker._tracker._continues


def test_what_was_not_recorded_of_a_finished_run_is_recorded_by_the_next_start(
    outputs, monkeypatch
):
    monkeypatch.setattr(trackers, "facts_of", lambda job: NO_FACTS)
    folder, run_id = killed_run(outputs, 2)
    write_steps(folder, [3, 4])
    job = SimpleNamespace(config=build_config({}), total_steps=4)
    for _ in range(2):
        with trackers.tracked(job, folder, start=Start(4, None)) as (tracker,):
            pass
    assert tracker._thread.ident is None, "all was recorded, and it began again"
    run = client_of(outputs).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(outputs, run, "train/loss")] == [1, 2, 3, 4]


# What MLflow does wrong


@pytest.mark.slow
def test_two_runs_that_start_together_make_one_database(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    starts = [
        subprocess.Popen([sys.executable, "-c", TWO_STARTS, str(folder)]) for folder in folders
    ]
    assert [start.wait(120) for start in starts] == [0, 0]
    runs, _ = runs_of(tmp_path)
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
""" + TWO_STARTS.replace("run.close", "import time; time.sleep(60); run.close")
    (tmp_path / "first").mkdir()
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path / "first"), str(made)])
    assert result.returncode == -signal.SIGKILL
    assert made.exists(), "the fault did not happen where it should"
    write_steps(tmp_path / "second", [1])
    tracker_of(tmp_path / "second").close(FINISHED)
    assert runs_of(tmp_path)[0]["second"].data.metrics["train/loss"] == 1.0


def test_database_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tracker = tracker_of(tmp_path / "run", uri=f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    wait_until(lambda: caplog.records, timeout_s=60, what="a warning")
    tracker.close(FINISHED)
    assert not tracker._thread.is_alive()
    (warning,) = warnings_of(caplog)
    assert "Not a directory" in warning
    assert warning.endswith("; the run continues and sends the metrics later")


def test_dead_server_costs_one_warning_without_its_password_and_a_bounded_close(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(recorder, "RETRY_PAUSES_S", (0.1,))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://me:secret@127.0.0.1:{unused.getsockname()[1]}"
        tracker = tracker_of(tmp_path / "run", uri=uri)
        write_steps(tmp_path / "run", range(1, 100))
        wait_until(lambda: caplog.records, timeout_s=60, what="a warning")
        time.sleep(0.5)  # some more attempts
        tracker.close(FINISHED)
        assert not tracker._thread.is_alive()
    (warning,) = warnings_of(caplog)
    assert "secret" not in warning
    assert "refused" in warning


def test_server_that_never_answers_is_left_after_a_bounded_wait(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(recorder, "CLOSE_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = tracker_of(tmp_path / "run", uri=uri)
        tracker.close(FINISHED)
        assert tracker._thread.is_alive(), "it was waited for"
    assert (
        "is too slow: not all is recorded; the files of the run have all: `roll-sft sync"
        in caplog.text
    )


def test_a_server_that_was_away_is_sent_every_step_when_it_answers_again(
    outputs, caplog, monkeypatch
):
    from mlflow import MlflowClient

    log_batch, is_away = MlflowClient.log_batch, [True]

    def away(self, run_id, **what):
        if is_away[0]:
            raise ConnectionError("connection refused")
        return log_batch(self, run_id, **what)

    monkeypatch.setattr(MlflowClient, "log_batch", away)
    monkeypatch.setattr(recorder, "RETRY_PAUSES_S", (0.05,))
    folder = outputs / "run"
    write_steps(folder, range(1, 500))
    tracker = tracker_of(folder)
    wait_until(lambda: warnings_of(caplog), timeout_s=60, what="a warning")
    write_steps(folder, range(500, 1001))
    is_away[0] = False
    tracker.close(FINISHED)
    (run,) = runs_of(outputs)[0].values()
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(outputs, run, "train/loss")] == [*range(1, 1001)]
    assert len(warnings_of(caplog)) == 1


def test_artifacts_that_cannot_be_stored_do_not_keep_metrics_back(outputs, caplog, monkeypatch):
    from mlflow import MlflowClient

    class NoCredentialsError(Exception):
        """As those of an object store's client: of a class that no one else knows."""

    def no_credentials(*args):
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(MlflowClient, "log_artifact", no_credentials)
    folder = outputs / "run"
    write_steps(folder, [1])
    (folder / "config.yaml").touch()
    tracker_of(folder).close(FINISHED)
    (run,) = runs_of(outputs)[0].values()
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 1.0)
    (warning,) = warnings_of(caplog)
    assert "artifacts are not recorded: Unable to locate credentials" in warning
