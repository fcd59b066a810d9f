"""Runs that are asked to end: what they finish, save and say, and that the same command goes on."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests import parity
from tests.exact import exact
from tests.local_run import Fault, Run
from tests.pool import RankPool

pytestmark = pytest.mark.slow

TERM = (signal.SIGTERM,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preempted")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=1)
    parity.write_rows(root / "rows.jsonl", num_rows=8)
    return root


@pytest.fixture(scope="module")
def undisturbed(folder: Path, pool: RankPool) -> Run:
    run = Run(folder, pool, folder / "undisturbed")
    assert run({**run.validation, "train.save_steps": 4, "train.eval_steps": 2})[0] == 0
    return run


@pytest.fixture
def run(folder: Path, pool: RankPool, tmp_path: Path) -> Run:
    return Run(folder, pool, tmp_path / "run")


def keys_of(run: Run) -> dict[str, Any]:
    return {**run.validation, "train.save_steps": 4, "train.eval_steps": 2}


@pytest.mark.parametrize(
    ("where", "is_async"),
    [
        ("step", True),
        ("evaluation", False),
        ("save", True),
    ],
)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    where: str, is_async: bool, run: Run, undisturbed: Run
) -> None:
    keys = {**keys_of(run), "checkpoint.async_save": is_async}
    step = 4 if where == "save" else 2
    fault = Fault(step, signals=(signal.SIGTERM, signal.SIGTERM), where=where)
    code, last = run(keys, fault=fault)
    assert code == 75
    kept = f"{run.output}/checkpoints/step_{step:08d}"
    assert last == f"ended by SIGTERM: {kept} is kept: the same command goes on from it"
    assert run.kept == [step]
    assert [line["step"] for line in run.lines("steps.jsonl")] == [*range(1, step + 1)]
    # Evaluations are left for the next command, which begins with them.
    assert [line["step"] for line in run.lines("eval.jsonl")] == ([2, 4] if step == 4 else [])
    assert (run.output / ".evaluation_due").exists() == (step == 2)
    assert run(keys)[0] == 0
    assert not (run.output / ".evaluation_due").exists()
    assert exact(run.lines("steps.jsonl")) == exact(undisturbed.lines("steps.jsonl"))
    losses = [(line["step"], line["loss"]) for line in run.lines("eval.jsonl")]
    assert losses == [(line["step"], line["loss"]) for line in undisturbed.lines("eval.jsonl")]


def test_a_run_that_is_stopped_in_its_last_step_evaluates_with_the_next_command(run: Run) -> None:
    keys = {**run.validation, "train.max_steps": 2, "checkpoint.hf_export": "final"}
    code, last = run(keys, fault=Fault(2, signals=(signal.SIGUSR1,)))
    assert (code, run.kept) == (75, [1, 2])
    assert last.startswith("ended by SIGUSR1: ")
    assert not (run.output / "hf").exists()
    assert run(keys)[0] == 0
    assert [line["step"] for line in run.lines("eval.jsonl")] == [2]
    assert (run.output / "hf" / "config.json").exists()
    assert "it is finished" not in run.errors
    assert run(keys)[0] == 0
    assert "it is finished" in run.errors


def test_a_grace_too_short_for_the_step_skips_the_save_and_says_so(run: Run) -> None:
    assert run({"train.max_steps": 2})[0] == 0
    keys = {"cluster.grace_s": 60, "checkpoint.allow_changes": "[schedule]"}
    code, last = run(keys, fault=Fault(4, signals=TERM, hangs=True))
    assert code == 75
    kept = f"{run.output}/checkpoints/step_00000003 is kept: the same command goes on from it"
    assert (
        last == f"ended by SIGTERM: cluster.grace_s=60 was too short for a step and a save; {kept}"
    )
    assert run.kept == [1, 2, 3]


def test_a_run_without_checkpoints_says_what_is_lost(run: Run) -> None:
    code, last = run({"checkpoint.save": False}, fault=Fault(3, signals=TERM))
    assert (code, run.kept) == (75, [])
    # The fourth was queued while the third ran.
    assert last.startswith("ended by SIGTERM: checkpoint.save=false, so the steps until 4 are lost")


def test_the_limit_of_time_saves_and_ends(run: Run) -> None:
    keys = {"train.max_duration": "10h", "train.save_steps": "null"}
    code, last = run(keys, fault=Fault(3, hours=10))
    assert (code, run.kept) == (75, [4])
    assert last.startswith(
        f"train.max_duration ends: {run.output}/checkpoints/step_00000004 is kept"
    )
    assert [line["step"] for line in run.lines("steps.jsonl")] == [1, 2, 3, 4]
