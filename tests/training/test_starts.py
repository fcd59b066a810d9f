"""Starts that fail, in each way that they can: the folder is as it was. Without Ray."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from roll_sft.base.errors import CheckpointError, ResourceError, RollSftError
from roll_sft.runtime import cluster
from roll_sft.training import driver
from tests import doors
from tests.doors import Door, contents, write_rows

door, assets, arguments = doors.door, doors.assets, doors.arguments


def write_logs(folder: Path) -> dict[str, bytes]:
    """What a finished run of three steps without checkpoints left, and a killed save."""
    folder.mkdir()
    rows = [{"step": step, "train_loss": 1.0} for step in (1, 2, 3)]
    for name in ("steps.jsonl", "samples.jsonl", "eval.jsonl"):
        write_rows(folder / name, rows)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "data_report.json").write_text("{}\n")
    (folder / "checkpoints" / ".staging_00000004").mkdir(parents=True)
    (folder / "checkpoints" / ".staging_00000004" / "__0_0.distcp").write_text("half")
    return contents(folder)


def cannot_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_in(monkeypatch, "reserved", ResourceError("the cluster holds no such layout"))


def broken_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "reserved", lambda *_: contextlib.nullcontext())
    fails_in(monkeypatch, "workers", CheckpointError("the weights are broken"))


def fails_in(monkeypatch: pytest.MonkeyPatch, name: str, error: RollSftError) -> None:
    @contextlib.contextmanager
    def failing(*_: object, **__: object) -> Iterator[None]:
        raise error
        yield

    without_ray(monkeypatch, "connected")
    monkeypatch.setattr(driver, name, failing)


# Files of the start itself; another one writes them anew.
OF_A_START = ("logs/", "job/", "starts.jsonl", "report.html", "loss.png")


def without_ray(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have the driver skip `names`, and no cluster start while data is prepared."""
    monkeypatch.setattr(cluster, "starting", doors.starts_nothing)
    for name in names:
        monkeypatch.setattr(driver, name, lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (cannot_be_placed, 4),
        (broken_weights, 6),
        ("cluster.address=127.0.0.1:9", 4),
        ("data.train=[{path: bad.jsonl}]", 3),
        ("train.learning_rate=-1", 2),
        ("resume=outputs/nowhere/step_00000001", 2),
    ],
    ids=["placement", "weights", "address", "data", "config", "resume"],
)
def test_a_start_that_fails_leaves_logs_and_checkpoints_as_they_were(
    cause: Callable[[pytest.MonkeyPatch], None] | str,
    code: int,
    door: Door,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tmp_path = Path.cwd()  # the door's
    extra = [cause] if isinstance(cause, str) else []
    if not isinstance(cause, str):
        cause(monkeypatch)
    write_rows(tmp_path / "bad.jsonl", [{"neither": "nor"}])
    before = write_logs(tmp_path / "run")
    outcome = door(*arguments, f"output_dir={tmp_path / 'run'}", "checkpoint.save=false", *extra)
    assert outcome.code == code, outcome.stderr
    after = contents(tmp_path / "run")
    after.pop(".lock", None)
    own = OF_A_START
    assert {name: text for name, text in after.items() if not name.startswith(own)} == before


def test_a_damaged_token_cache_is_found_before_step_1_and_mended_by_the_same_command(
    door: Door, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_logs(tmp_path / "run")
    given = [*arguments, f"output_dir={tmp_path / 'run'}", "checkpoint.save=false"]
    assert door(*arguments, "prepare_only=true", "output_dir=prepared").code == 0
    (tokens,) = tmp_path.glob("cache/*/tokens.bin")
    intact = tokens.read_bytes()
    tokens.write_bytes(bytes([intact[0] ^ 1]) + intact[1:])
    without_ray(monkeypatch, "connected", "reserved", "workers")
    outcome = door(*given)
    doors.refused(outcome, 3, "tokens.bin: its bytes are not those", "run the same command again")
    after = contents(tmp_path / "run")
    after.pop(".lock", None)
    kept = {name: text for name, text in after.items() if not name.startswith(OF_A_START)}
    assert kept == before
    fails_in(monkeypatch, "workers", CheckpointError("far enough"))
    doors.refused(door(*given), 6, "far enough")
    assert tokens.read_bytes() == intact
