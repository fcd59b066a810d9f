"""The table that ends a run: its numbers are those of the run's own files."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from roll_sft.config.schema import RunConfig, TrackingConfig
from roll_sft.training.summary import show_summary
from tests.doors import cells
from tests.training.test_terminal import record


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of four steps in `outputs/demo` of the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "demo"
    (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000004" / "data").write_bytes(bytes(2_500_000))
    losses, speeds = (4.0, 2.0, 1.5, 1.75), (500.0, 250.0, 500.0, 500.0)
    steps = [
        dataclasses.replace(
            record(number),
            train_loss=loss,
            per_device_tps=speed,
            total_tokens=2000,
            step_time_s=1000 / speed,
            peak_memory_gib=number / 8,
        )
        for number, (loss, speed) in enumerate(zip(losses, speeds, strict=True), start=1)
    ]
    lines = [json.dumps(dataclasses.asdict(step)) for step in steps]
    (folder / "steps.jsonl").write_text("\n".join(lines) + "\n")
    evaluations = [
        {"step": step, "name": name, "loss": loss}
        for step, name, loss in (
            (2, "a", 3.0),
            (2, "b [x]", 2.5),
            (4, "a", 3.5),
            (4, "b [x]", 2.25),
        )
    ]
    (folder / "eval.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in evaluations))
    (folder / ".lock").touch()
    return folder


def shown(folder: Path, capsys: pytest.CaptureFixture[str], **keys: object) -> str:
    show_summary(RunConfig(run_name="demo", **keys), folder, elapsed_s=133.0)
    return capsys.readouterr().out


def test_the_summary_adds_up_what_the_steps_say(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(folder, capsys)
    table = {
        "duration": "0:02:13",
        "steps": "4 in 0:00:10",
        "tokens": "8,000, of which 4,000 supervised",
        "mean speed": "800 tokens/s, 400 tokens/s/device",  # 8,000 / 10 s, on two devices
        "train loss": "1.7500 at step 4; best 1.5000 at step 3",
        "eval/a loss": "3.5000 at step 4; best 3.0000 at step 2",
        "eval/b [x] loss": "2.2500 at step 4; best 2.2500 at step 4",
        "peak memory": "0.50 GiB per worker",
        "newest checkpoint": "outputs/demo/checkpoints/step_00000004 (2.5 MB)",
        "all files": "outputs/demo: checkpoints/, eval.jsonl, steps.jsonl",
    }
    for what, value in table.items():
        assert cells(text, what)[1] == value


def test_the_next_commands_are_those_that_this_run_has_a_use_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(folder, capsys)
    assert "mlflow ui" not in text, "MLflow has no run, as where it is not installed"
    assert "  roll-sft convert outputs/demo/checkpoints/step_00000004 --output my_model\n" in text
    (folder / "hf").mkdir()
    for name in ("tensorboard", "wandb/offline-run-1-a"):
        (folder / name).mkdir(parents=True)
    recorded = shown(folder, capsys, tracking=TrackingConfig(backends=["tensorboard", "wandb"]))
    assert "  tensorboard --logdir outputs\n" in recorded
    assert "  wandb sync outputs/demo/wandb/offline-run-1-a\n" in recorded
    shutil.rmtree(folder / "tensorboard")
    shutil.rmtree(folder / "wandb")
    silent = shown(folder, capsys, tracking=TrackingConfig(backends=["jsonl"]))
    assert "Next" not in silent
    assert cells(silent, "model")[1].startswith("outputs/demo/hf (0.0 MB)")
    server = TrackingConfig(mlflow_uri="https://me:secret@host/mlflow")
    remote = shown(folder, capsys, tracking=server)
    assert "  curves: https://***@host/mlflow, experiment roll_sft\n" in remote
    assert "secret" not in remote
    (folder / ".mlflow_run").write_text("abc 3 FINISHED\n")
    page = "/#/experiments/3/runs/abc?workflowType=machine_learning\n"
    local = shown(folder, capsys)
    assert "  mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db\n" in local
    assert f"  curves: http://127.0.0.1:5000{page}" in local
    assert f"  curves: https://***@host/mlflow{page}" in shown(folder, capsys, tracking=server)


def test_a_run_without_a_step_has_no_summary(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "steps.jsonl").write_text("")
    assert shown(folder, capsys) == ""
