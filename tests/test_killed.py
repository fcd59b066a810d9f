"""The main job, killed and started again by the same command, on a real cluster."""

import itertools
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from roll_sft.checkpoint.manifest import read_manifest
from roll_sft.checkpoint.resume import step_folders
from roll_sft.config.schema import layout_of
from tests import parity
from tests.pool import RankPool
from tests.runtime.ray_cluster import Program, two_nodes

pytestmark = pytest.mark.slow

STEPS, SAVE_STEPS = 12, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"num_workers": 2},
    "TP2": {"num_workers": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2xVPP2": {
        "num_workers": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "CP2xDP2": {"num_workers": 4, "context_parallel_size": 2},
}
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "EP2": {"num_workers": 2, "expert_model_parallel_size": 2},
    "TP2xEP2": {**LAYOUTS["TP2"], "expert_model_parallel_size": 2},
    "PP2": {"num_workers": 2, "pipeline_model_parallel_size": 2},
}


def sections(root: Path, layout: str, **checkpoint: Any) -> dict[str, dict[str, Any]]:
    is_lora = (root / "lora").exists()
    return {
        "lora": {"rank": 4, "dropout": 0.1} if is_lora else {},
        "parallel": (LAYOUTS | OF_EXPERTS)[layout],
        "train": {"max_steps": STEPS, "save_steps": SAVE_STEPS, "eval_steps": 3},
        "data": {"validation": [{"path": str(root / "rows.jsonl"), "name": "held_out"}]},
        "checkpoint": {"keep_last": 3, "keep_best": "held_out", "hf_export": "none", **checkpoint},
        "tracking": {"backends": ["jsonl"]},
    }


def command(root: Path, layout: str, **checkpoint: Any) -> list[str]:
    cluster = two_nodes()
    config = parity.parity_config(root, **sections(root, layout, **checkpoint))
    keys = {"output_dir": str(root / "runs" / "killed"), "cluster.address": cluster.address}
    for name in ("model", "data", "train", "lora", "checkpoint", "tracking", "parallel"):
        section = getattr(config, name)
        for key in type(section).__slots__:
            value = getattr(section, key)
            if value != getattr(type(section)(), key):
                keys[f"{name}.{key}"] = value
    rows = {"path": str(root / "rows.jsonl")}
    keys["data.train"] = json.dumps([rows]).replace('"', "")
    keys["data.validation"] = json.dumps([{**rows, "name": "held_out"}]).replace('"', "")
    return [f"{key}={_text(value)}" for key, value in keys.items()]


def _text(value: Any) -> str:
    return json.dumps(value).replace('"', "") if isinstance(value, list) else str(value)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trained" in metafunc.fixturenames:
        is_full = metafunc.config.getoption("--all-layouts")
        more = [pytest.param(each, marks=pytest.mark.long) for each in ("model", "experts")]
        metafunc.parametrize("trained", ["adapters", *more] if is_full else more)


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    trained: str, pool: RankPool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With --all-layouts three kills, most go on on another layout, of adapters too; else one."""
    if trained == "adapters":
        (tmp_path / "lora").touch()
    kind = "qwen3moe" if trained == "experts" else "qwen2-tied"
    parity.write_model(tmp_path / "model", kind=kind)
    parity.write_rows(tmp_path / "rows.jsonl")
    layouts = _layouts(trained, is_full=request.config.getoption("--all-layouts"))
    config = parity.parity_config(tmp_path, **sections(tmp_path, layouts[0]))
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, None)
    (wanted,) = [rank for rank in ranks if rank is not None]
    output, chance = tmp_path / "runs" / "killed", random.Random(5)
    token = {"RAY_AUTH_TOKEN": two_nodes().token, "RAY_AUTH_MODE": "token"}
    first_elsewhere, done = 0, 0
    for layout, following in itertools.pairwise(layouts):
        arguments = command(tmp_path, layout, async_save=True)
        program = Program("-m", "roll_sft.run", *arguments, folder=tmp_path, environment=token)
        # At least one more checkpoint, and then some steps that are lost.
        aim = min(STEPS - 2, done + SAVE_STEPS + chance.randrange(SAVE_STEPS + 1))

        def is_there(aim: int = aim, done: int = done) -> bool:
            folders = step_folders(output / "checkpoints")
            newest = int(folders[-1].name.removeprefix("step_")) if folders else 0
            steps = output / "steps.jsonl"
            return newest > done and steps.read_text().count("\n") >= aim

        try:
            program.wait_until(is_there, timeout_s=120, what="a checkpoint")
            program.signal(signal.SIGKILL)
            assert program.wait(timeout_s=10) == -signal.SIGKILL, "the fault did not happen"
        finally:
            program.close()
        done = int(step_folders(output / "checkpoints")[-1].name.removeprefix("step_"))
        if following != layouts[0]:
            first_elsewhere = first_elsewhere or done + 1
    arguments = command(tmp_path, layouts[-1], async_save=True)
    program = Program("-m", "roll_sft.run", *arguments, folder=tmp_path, environment=token)
    try:
        assert program.wait(timeout_s=120) == 0, program.errors
    finally:
        program.close()
    assert f"goes on from {output}/checkpoints/step_{done:08d}" in program.errors
    steps = lines_of(output / "steps.jsonl")
    assert [line["step"] for line in steps] == [*range(1, STEPS + 1)]
    for line, expected in zip(steps, wanted, strict=True):
        if line["step"] < first_elsewhere:
            assert (line["train_loss"], line["grad_norm"]) == (
                expected["loss"],
                expected["grad_norm"],
            )
        assert line["train_loss"] == pytest.approx(
            expected["loss"], rel=2e-6 if trained == "experts" else 1e-6
        )
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-5)
    samples = lines_of(output / "samples.jsonl")
    assert [line["step"] for line in samples] == [*range(1, STEPS + 1)]
    evaluated = [line["step"] for line in lines_of(output / "eval.jsonl")]
    assert evaluated == [2, 3, 4, 6, 8, 9, 10, 12]
    _check_what_is_kept(output)


def _layouts(trained: str, *, is_full: bool) -> list[str]:
    """Of the first start, and of each after a kill."""
    if trained == "experts":
        return ["EP2", "EP2", "TP2xEP2", "PP2"]
    return [*LAYOUTS] if is_full else ["DP2", "PP2xVPP2"]


def _check_what_is_kept(output: Path) -> None:
    losses = {line["step"]: line["loss"] for line in lines_of(output / "eval.jsonl")}
    folders = step_folders(output / "checkpoints")
    kept = [int(folder.name.removeprefix("step_")) for folder in folders]
    best = min((step for step in losses if step % SAVE_STEPS == 0), key=lambda step: losses[step])
    assert kept == sorted({8, 10, 12, best})
    assert read_manifest(folders[-1]).state.optimizer_step == STEPS
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        "latest",
        *(folder.name for folder in folders),
    }
