"""A run whose workers fail goes on by itself, and ends as if they had not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from roll_sft import stages
from roll_sft.base.errors import WorkerError
from roll_sft.checkpoint.manifest import read_manifest
from roll_sft.checkpoint.resume import step_folders
from roll_sft.config.build import build_config
from roll_sft.runtime import group
from roll_sft.runtime.faults import happened
from roll_sft.training import supervisor
from tests import doors
from tests.exact import exact
from tests.leftovers import check_nothing_left
from tests.runtime.light import LightWorker
from tests.runtime.ray_cluster import two_nodes
from tests.training import test_driver

pytestmark = pytest.mark.slow
assets, door = test_driver.assets, test_driver.door
lines_of = test_driver.lines_of

Start = Callable[..., int]


@pytest.fixture(autouse=True)
def first_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S", 0.01)
    monkeypatch.setattr(stages, "preparing", doors.prepares_here)


@pytest.fixture
def start(assets: Path, door: Callable[[list[str]], int]) -> Iterator[Start]:
    """Starts a run with faults in `output`; checks that they happened and that nothing is left."""
    outputs: list[Path] = []

    def call(output: Path, *faults: str, **overrides: object) -> int:
        keys: dict[str, object] = {
            "cluster__address": two_nodes().address,
            "train__save_steps": 2,
            "train__max_steps": 6,
            "train__num_train_epochs": 3,
            "train__eval_steps": 3,
            "checkpoint__hf_export": "none",
            "tracking__backends": "[jsonl]",
        }
        if faults:
            keys["debug.faults"] = f"[{', '.join(f'{{{fault}}}' for fault in faults)}]"
        outputs.append(output)
        code = door(test_driver.arguments_of(assets, output, **{**keys, **overrides}))
        for index, fault in enumerate(faults):
            assert happened(output, index).exists(), f"{fault} did not happen"
        return code

    yield call
    for output in {*outputs}:
        check_nothing_left(output, build_config({"cluster": {"address": two_nodes().address}}))


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that compute nothing."""
    monkeypatch.setattr(group, "Worker", LightWorker)


def shards_of(output: Path) -> dict[str, Any]:
    files = read_manifest(step_folders(output / "checkpoints")[-1]).files
    return {name: found for name, found in files.items() if name.endswith(".distcp")}


@pytest.mark.long
def test_a_run_whose_workers_are_killed_ends_as_an_undisturbed_one(
    start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clean, killed = tmp_path / "runs" / "clean", tmp_path / "runs" / "killed"
    assert start(clean) == 0
    capfd.readouterr()
    faults = ("kind: kill, rank: 1, step: 4", "kind: kill, rank: 0, step: 6, where: checkpoint")
    assert start(killed, *faults) == 0
    steps = exact(lines_of(killed / "steps.jsonl"))
    assert steps == exact(lines_of(clean / "steps.jsonl"))
    assert lines_of(killed / "samples.jsonl") == lines_of(clean / "samples.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines_of(killed / "eval.jsonl")]
    assert losses == [(line["step"], line["loss"]) for line in lines_of(clean / "eval.jsonl")]
    assert shards_of(killed) == shards_of(clean)
    restarts = lines_of(killed / "restarts.jsonl")
    told = [(each["step"], each["rank"], each["from_step"], each["kind"]) for each in restarts]
    assert told == [(4, 1, 2, "failure"), (6, 0, 4, "failure")]
    assert all(each["seconds"] > 0 and "died during" in each["cause"] for each in restarts)
    warnings = [line for line in capfd.readouterr().err.splitlines() if " warning: " in line]
    assert [line.rpartition("; ")[2] for line in warnings] == [
        "restart 1 of 3",
        "restart 2 of 3",
    ]


@pytest.mark.long
def test_a_step_that_fails_three_times_ends_the_run(
    start: Start, light: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "loop"
    assert start(output, *["kind: kill, rank: 1, step: 3"] * 3, cluster__max_restarts=9) == 7
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("step 3 failed 3 times, the last time so: rank 1 on ")
    assert [line["step"] for line in lines_of(output / "restarts.jsonl")] == [3, 3]
    assert start(output) == 0, "the same command goes on"
    assert [line["step"] for line in lines_of(output / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_a_restart_goes_back_to_the_step_that_resume_names_before_it_has_begun_and_not_after(
    start: Start, light: None, tmp_path: Path
) -> None:
    output = tmp_path / "runs" / "back"
    assert start(output) == 0
    second = output / "checkpoints" / "step_00000002"
    faults = ("kind: kill, where: setup", "kind: kill, step: 5")
    assert start(output, *faults, resume=second) == 0
    restarts = lines_of(output / "restarts.jsonl")
    assert [(each["step"], each["from_step"]) for each in restarts] == [(3, 2), (5, 4)]
    assert [line["step"] for line in lines_of(output / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_ranks_that_are_stopped_are_found_and_the_run_goes_on(
    start: Start, light: None, tmp_path: Path
) -> None:
    output = tmp_path / "runs" / "stopped"
    faults = ("kind: stop, rank: 0, step: 3, where: evaluation", "kind: stop, rank: 1, step: 4")
    assert start(output, *faults, cluster__step_timeout_s=2) == 0
    evaluation, step = lines_of(output / "restarts.jsonl")
    assert evaluation["cause"].startswith(
        "evaluation of held_out did not finish within 2 s: rank 0"
    )
    assert step["cause"].startswith("step 4 did not finish within 2 s: rank 1 on ")
    assert (evaluation["rank"], step["rank"]) == (0, 1)
    assert "stacks by py-spy:" in (output / "logs" / "rank_01.log").read_text()
    assert [line["step"] for line in lines_of(output / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_without_a_checkpoint_a_restart_begins_anew(
    start: Start, light: None, tmp_path: Path
) -> None:
    output = tmp_path / "runs" / "new"
    # The evaluation after step 3 waits for that step: what a worker tells just before it dies may
    # be lost.
    assert start(output, "kind: kill, step: 4", train__save_steps="null") == 0
    (restart,) = lines_of(output / "restarts.jsonl")
    assert (restart["step"], restart["from_step"]) == (4, 0)
    assert [line["step"] for line in lines_of(output / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]


def a_death() -> WorkerError:
    error = WorkerError("rank 1 died")
    error.may_pass = True
    return error


def test_what_new_workers_would_meet_again_is_not_tried_again() -> None:
    config = build_config({"cluster": {"max_restarts": 2}})
    history = supervisor._History()
    fault = WorkerError("a fault of ours")
    with pytest.raises(WorkerError) as caught:
        history.pause_after(fault, 1, config, is_node_lost=False)
    assert caught.value is fault
    assert history.failures == 0


def test_failures_are_counted_apart_from_lost_nodes_and_end_the_run() -> None:
    config = build_config({"cluster": {"max_restarts": 2}})
    history = supervisor._History()
    death = a_death()
    for step in range(10):
        history.pause_after(death, step, config, is_node_lost=True)
    for step in (10, 11):
        history.pause_after(death, step, config, is_node_lost=False)
    with pytest.raises(WorkerError, match=r"restarted 2 times \(cluster\.max_restarts\).*died"):
        history.pause_after(death, 12, config, is_node_lost=False)


def test_a_step_that_fails_again_is_tried_after_a_pause_and_another_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S", 1.0)
    history, death = supervisor._History(), a_death()
    config = build_config({})
    pauses = [history.pause_after(death, step, config, is_node_lost=True) for step in (1, 1, 2)]
    assert pauses == [0.0, 1.0, 0.0]
