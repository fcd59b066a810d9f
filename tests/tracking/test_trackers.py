"""MLflow, TensorBoard and W&B together: each holds what the files of the run hold."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from roll_sft import cli
from roll_sft.base.errors import ConfigError
from roll_sft.base.files import json_lines
from roll_sft.checkpoint.resume import Start
from roll_sft.config.build import build_config
from roll_sft.tracking import recorder, trackers
from roll_sft.tracking.journal import DOCUMENTED_NAMES, STEP_NAMES
from roll_sft.tracking.run_facts import DataInput, RunFacts
from roll_sft.tracking.run_record import read_note
from tests import doors
from tests.runtime.ray_cluster import wait_until
from tests.tracking.event_files import (
    tensorboard,
    tensorboard_history,
    wandb_exits,
    wandb_history,
)

assets, arguments = doors.assets, doors.arguments

ALL = ["mlflow", "tensorboard", "wandb"]
FACTS = RunFacts(
    params={"train.learning_rate": "0.1"},
    tags={"layout": "TP 2"},
    inputs=(DataInput("rows", "d" * 16, "rows.jsonl", "train", {"rows": 7}),),
)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What the doors set, and W&B without a server."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(recorder, "SEND_EVERY_S", 0.05)
    monkeypatch.setattr(recorder, "CLOSE_TIMEOUT_S", 100.0)
    monkeypatch.setattr(recorder, "CLOSE_TIMEOUT_AFTER_FAILURE_S", 30.0)
    monkeypatch.setattr(trackers, "facts_of", lambda job: FACTS)


@pytest.fixture
def folder(tmp_path, empty_database):
    """The empty folder of a run, beside a database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def step_line(step):
    values = {key: step + number / 7 for number, key in enumerate(STEP_NAMES)}
    return {"step": step, **values, "mfu": None, "sample_ids_sha256": "0" * 64}


def write(folder, steps):
    """Lines of `steps`, with evaluations and samples after each fourth."""
    for step in steps:
        append(folder / "steps.jsonl", step_line(step))
        if step % 4 == 0:
            line = {"step": step, "name": "held out", "loss": 1 / step, "perplexity": 2.0}
            append(folder / "eval.jsonl", {**line, "metrics": {"rouge_l": 0.5}, "time_s": 1.0})
            for index in range(2):
                sample = {"step": step, "index": index, "prompt": "a | b\n<b>", "output": "x" * 9}
                sample |= {"reference": None, "metrics": {"exact_match": index / 3}}
                append(folder / "generations.jsonl", sample)


def append(path, record):
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def recorded(folder, *, start=0, backends=ALL, steps=(), config=None, end=None):
    """Record the run of `folder`, to which `steps` are written meanwhile."""
    values = {"tracking": {"backends": backends, **(config or {})}}
    job = SimpleNamespace(config=build_config(values), total_steps=1000)
    with trackers.tracked(job, folder, start=Start(start, None)) as opened:
        for each in opened:
            each.start(device="8 x H100")
        write(folder, steps)
        if end is not None:
            raise end
    return opened


def mlflow_client(folder):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")


def mlflow_runs(folder):
    client = mlflow_client(folder)
    found = client.get_experiment_by_name("roll_sft")
    return client.search_runs([found.experiment_id])


def mlflow_history(folder):
    (run,) = mlflow_runs(folder)
    client = mlflow_client(folder)
    names = [name for name in run.data.metrics if not name.startswith("system/")]
    points = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: [(each.step, each.value) for each in found] for name, found in points.items()}


def expected(folder):
    """Metric -> (step, value), from the files of the run."""
    found = {}
    for line in map(json.loads, (folder / "steps.jsonl").read_text().splitlines()):
        for key, name in [*STEP_NAMES.items(), *((name, name) for name in DOCUMENTED_NAMES)]:
            if line[key] is not None:
                found.setdefault(name, []).append((line["step"], line[key]))
    for line in map(json.loads, (folder / "eval.jsonl").read_text().splitlines()):
        for key, value in (
            ("loss", line["loss"]), ("perplexity", 2.0), ("metrics/rouge_l", 0.5)
        ):  # fmt: skip
            found.setdefault(f"eval/held out/{key}", []).append((line["step"], value))
    return found


def as_float32(history):
    return {
        name: [(step, float(np.float32(v))) for step, v in each] for name, each in history.items()
    }


def numbers(history):
    return {name: each for name, each in history.items() if not name.startswith("generations")}


def check_all(folder):
    """That the three hold exactly what the files hold."""
    known = expected(folder)
    assert mlflow_history(folder) == known
    assert tensorboard_history(folder) == as_float32(known)
    assert numbers(wandb_history(folder)) == known


def warnings_of(caplog):
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_three_trackers_hold_the_numbers_of_the_run_and_its_samples(folder, caplog):
    write(folder, range(1, 50))
    recorded(folder, steps=range(50, 69))
    assert warnings_of(caplog) == []
    check_all(folder)

    (run,) = mlflow_runs(folder)
    assert run.info.status == "FINISHED"
    assert run.data.tags["device"] == "8 x H100"
    client = mlflow_client(folder)
    (listed, *_) = client.list_artifacts(run.info.run_id, "generations")
    assert listed.path == "generations/step_00000004.json"
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [each["path"] for each in shown][:2] == [
        "generations/step_00000004.json",
        "generations/step_00000008.json",
    ]
    text = (folder / "mlflow" / "generations" / "step_00000068.json").read_text()
    head = ["step", "index", "prompt", "output", "reference", "exact_match"]
    rows = [
        ["68", "0", "a | b\n<b>", "x" * 9, "", "0"],
        ["68", "1", "a | b\n<b>", "x" * 9, "", "0.333333"],
    ]
    assert json.loads(text) == {"columns": head, "data": rows}

    view = tensorboard(folder)
    (*_, last) = view.Tensors("generations")
    assert last.step == 68
    assert [each.decode() for each in last.tensor_proto.string_val] == [*head, *rows[0], *rows[1]]
    (parameters,) = view.Tensors("parameters")
    assert b"train.learning_rate" in parameters.tensor_proto.string_val

    (*_, (step, place)) = wandb_history(folder)["generations/path"]
    assert step == 68
    (files,) = folder.glob("wandb/offline-run-*/files")
    assert json.loads((files / place).read_text()) == {"columns": head, "data": rows}
    assert wandb_exits(folder) == [0]
    for name in ("tensorboard", "wandb"):
        note = read_note(folder / f".{name}_run")
        assert (note.step, note.is_finished) == (68, True)


@pytest.mark.parametrize(
    ("backends", "interval_s"), [(["tensorboard"], 0.0005), (["jsonl"], 0.005)]
)
def test_a_tracker_holds_the_interpreter_for_a_moment_alone(folder, backends, interval_s):
    job = SimpleNamespace(config=build_config({"tracking": {"backends": backends}}), total_steps=9)
    with trackers.tracked(job, folder, start=Start(0, None)):
        assert sys.getswitchinterval() == pytest.approx(interval_s)
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_a_run_that_goes_on_is_one_record_in_each_without_a_double_step(folder, caplog):
    with pytest.raises(OSError, match="a crash"):
        recorded(folder, steps=range(1, 11), end=OSError("a crash"))
    assert wandb_exits(folder) == [1]
    for name in ("steps", "eval", "generations"):  # cut to the checkpoint of step 7
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= 7))
    # TensorBoard reads files by name, which has the second, and in it a count whose 10 is before 9.
    time.sleep(1.0 - time.time() % 1.0)
    recorded(folder, start=7, steps=range(8, 21))
    assert warnings_of(caplog) == []
    check_all(folder)
    # offline-run-TIME-ID, with a number behind it for a second start within the same second
    ids = {path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")}
    assert len(ids) == 1, "two W&B runs"
    assert wandb_exits(folder) == [1, 0]


def test_a_run_that_begins_anew_sets_event_files_aside_and_gets_a_wandb_run_of_its_own(folder):
    backends = ["tensorboard", "wandb"]
    recorded(folder, steps=range(1, 3), backends=backends)
    first = read_note(folder / ".wandb_run")
    (folder / "steps.jsonl").unlink()
    recorded(folder, steps=range(1, 2), backends=backends)
    assert read_note(folder / ".wandb_run").run_id != first.run_id
    assert [step for step, _ in tensorboard_history(folder)["train_loss"]] == [1]
    assert (folder / ".set_aside_tensorboard").is_dir()


def test_a_finished_run_that_a_tracker_lacks_is_sent_by_the_same_command(folder):
    write(folder, range(1, 5))
    job = SimpleNamespace(
        config=build_config({"tracking": {"backends": ["tensorboard"]}}), total_steps=4
    )
    for is_first in (True, False):
        with trackers.tracked(job, folder, start=Start(4, None)) as (opened,):
            pass
        assert (opened._thread.ident is not None) == is_first
    assert tensorboard_history(folder) == as_float32(expected(folder))


# Trackers that fail


def write_config(folder, **tracking):
    lines = [f"  {key}: {value}\n" for key, value in tracking.items()]
    (folder / "config.yaml").write_text("tracking:\n" + "".join(lines))


@pytest.fixture
def dead():
    """An address that refuses connections."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_sync_fills_mlflow_after_a_run_whose_server_was_dead(
    folder, dead, caplog, capsys, monkeypatch
):
    """As the run saw the server; the same name then leads to one that lives."""
    monkeypatch.setenv("SERVER", dead)
    recorded(folder, backends=["mlflow"], config={"mlflow_uri": dead}, steps=range(1, 70))
    (warning, *_) = warnings_of(caplog)
    assert "refused" in warning
    assert not (folder / ".mlflow_run").exists()
    write_config(folder, backends="[mlflow]", mlflow_uri="${oc.env:SERVER}")
    capsys.readouterr()
    assert cli.main(["sync", str(folder)]) == 4
    (*_, last) = capsys.readouterr().err.splitlines()
    # The value of a variable is shown as the reference to it.
    assert last.startswith("tracking.backends: MLflow at ${oc.env:SERVER}: ")
    assert last.endswith("make it answer and run the same command again")

    monkeypatch.setenv("SERVER", f"sqlite:///{folder.parent / 'mlflow.db'}")
    for _ in range(2):  # the second finds nothing that is missing
        assert cli.main(["sync", str(folder)]) == 0
        assert mlflow_history(folder) == expected(folder)
    (run,) = mlflow_runs(folder)
    assert run.info.status == "FINISHED"
    assert run.data.params == FACTS.params
    assert run.data.tags["layout"] == "TP 2"


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        (None, 2, "has no config.yaml, so it is no run; give an output_dir"),
        ("tracking: {backends: [jsonl]}\n", 0, "names no tracker besides jsonl; nothing to send"),
        ("tracking: [\n", 2, "config.yaml: cannot be read: "),
    ],
)
def test_sync_says_why_there_is_nothing_to_send(config, code, message, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert cli.main(["sync", str(tmp_path)]) == code
    assert message in "".join(capsys.readouterr())


def test_sync_refuses_a_damaged_record(tmp_path, capsys):
    write_config(tmp_path, backends="[tensorboard]")
    (tmp_path / ".tracking.json").write_text('{"facts": 1}')
    assert cli.main(["sync", str(tmp_path)]) == 2
    assert ".tracking.json: cannot be read: 'logging_steps'; delete it" in capsys.readouterr().err


DEAD_WANDB = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from roll_sft.checkpoint.resume import Start
from roll_sft.config.build import build_config
from roll_sft.tracking import recorder, trackers, wandb_run
from roll_sft.tracking.run_facts import RunFacts
wandb_run.OPEN_TIMEOUT_S = recorder.CLOSE_TIMEOUT_AFTER_FAILURE_S = 2.0
recorder.RETRY_PAUSES_S = (0.5,)
trackers.facts_of = lambda job: RunFacts({}, {}, ())
config = build_config({"tracking": {"backends": ["wandb"]}})
trackers.check_trackers(config)
job = SimpleNamespace(config=config, total_steps=9)
with trackers.tracked(job, Path(sys.argv[1]), start=Start(0, None)) as (opened,):
    opened.start()
    while not opened.warned:
        time.sleep(0.1)
print("closed", flush=True)
"""


SIGNALLED_WANDB = """
import signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import psutil
from roll_sft.base.errors import report
from roll_sft.checkpoint.resume import Start
from roll_sft.config.build import build_config
from roll_sft.signals import stoppable
from roll_sft.tracking import trackers
from roll_sft.tracking.run_facts import RunFacts
trackers.facts_of = lambda job: RunFacts({}, {}, ())
config = build_config({"tracking": {"backends": ["wandb"]}})
job, folder = SimpleNamespace(config=config, total_steps=9), Path(sys.argv[1])
try:
    with stoppable(config), trackers.tracked(job, folder, start=Start(0, None)) as (opened,):
        opened.start()
        while not (folder / ".wandb_run").exists():
            time.sleep(0.1)
        for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
            process.send_signal(signal.SIGTERM)
        time.sleep(60)
except BaseException as error:
    (folder / "catboost.py").touch()  # W&B would tell its service of the import
    sys.path.insert(0, str(folder))
    import catboost
    sys.exit(report(error))
"""


@pytest.mark.long
def test_a_signal_to_all_processes_leaves_the_last_line_to_us(folder):
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED_WANDB, str(folder)],
        env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    # W&B's service may still write its files when the signal ends it.
    *lost, last = done.stderr.splitlines()
    assert (done.returncode, last.split(":")[0]) == (75, "ended by SIGTERM")
    assert len(lost) <= 1
    assert all(line.startswith("Weights & Biases: ") for line in lost)
    assert all(f"`roll-sft sync {folder}` sends it" in line for line in lost)


@pytest.mark.long
def test_wandb_holds_a_real_run_whole_and_the_same_command_again_is_silent(arguments, tmp_path):
    """Its service starts beside Ray, and outlives it."""
    folder = tmp_path / "run"
    command = [*arguments, "tracking.backends=[wandb]", f"output_dir={folder}"]
    command += ["train.max_steps=2", "train.global_batch_size=4", "checkpoint.hf_export=none"]
    for _ in range(2):
        outcome = doors.process(
            tmp_path, *command, WANDB_MODE="offline", RAY_TMPDIR=f"/tmp/r{os.getpid()}"
        )
        assert outcome.code == 0, outcome.stderr
        assert not [word for word in ("Traceback", "Weights") if word in outcome.stderr]
    assert read_note(folder / ".wandb_run").is_finished
    losses = [line["train_loss"] for line in json_lines(folder / "steps.jsonl")]
    assert [value for _, value in wandb_history(folder)["train/loss"]] == losses


@pytest.mark.slow
def test_a_dead_wandb_server_ends_neither_late_nor_loud(folder, dead):
    environment = {"WANDB_MODE": "online", "WANDB_BASE_URL": dead, "WANDB_API_KEY": "a" * 40}
    done = subprocess.run(
        [sys.executable, "-c", DEAD_WANDB, str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr
    first, *rest = done.stderr.splitlines()
    assert first.startswith("Weights & Biases: ")
    assert all("roll-sft sync" in line for line in rest)
    assert "a" * 40 not in done.stderr


def test_event_files_that_cannot_be_written_cost_one_warning(folder, caplog, monkeypatch):
    monkeypatch.setattr(recorder, "RETRY_PAUSES_S", (0.05,))
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard").chmod(0o500)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    from roll_sft.tracking.tensorboard_run import TensorboardRun

    append_events = TensorboardRun._append
    monkeypatch.setattr(TensorboardRun, "_append", no_space)
    job = SimpleNamespace(
        config=build_config({"tracking": {"backends": ["tensorboard"]}}), total_steps=9
    )
    with trackers.tracked(job, folder, start=Start(0, None)) as (opened,):
        opened.start()
        write(folder, range(1, 10))
        wait_until(lambda: caplog.records, timeout_s=60, what="a warning")
        monkeypatch.setattr(TensorboardRun, "_append", append_events)
    (warning,) = warnings_of(caplog)
    assert "No space left" in warning
    assert tensorboard_history(folder) == as_float32(expected(folder))


def test_a_missing_package_is_said_before_training(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = build_config({"tracking": {"backends": ["tensorboard"]}})
    with pytest.raises(ConfigError, match=r"tensorboard.*pip install 'roll_sft\[tensorboard\]'"):
        trackers.check_trackers(config)


def test_wandb_without_a_key_is_said_before_training(folder):
    """In a process of its own: W&B reads its settings once."""
    program = (
        "from roll_sft.config.build import build_config\n"
        "from roll_sft.tracking.trackers import check_trackers\n"
        "check_trackers(build_config({'tracking': {'backends': ['wandb']}}))"
    )
    hidden = {"HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_MODE": "online"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **hidden, "WANDB_BASE_URL": "https://wandb.example.com"},
        capture_output=True,
        text=True,
        check=False,
    )
    (*_, last) = done.stderr.splitlines()
    assert "wandb has no key for wandb.example.com; run `wandb login`" in last
