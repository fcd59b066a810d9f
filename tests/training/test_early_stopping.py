"""When a run whose validation loss improves no more ends, and which checkpoint it exports."""

import json
from pathlib import Path
from typing import Any

import pytest

from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.training.early_stopping import checkpoint_to_export, last_improvement, why_stopped


def config_of(**train: Any) -> RunConfig:
    return build_config(
        {
            "train": {"early_stopping": "held_out", "early_stopping_patience": 2, **train},
            "checkpoint": {"keep_best": "held_out"},
        }
    )


def write_losses(folder: Path, losses: dict[int, float]) -> None:
    lines = [
        {"step": step, "name": name, "loss": loss if name == "held_out" else 9.0}
        for step, loss in losses.items()
        for name in ("held_out", "other")
    ]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("losses", "min_delta", "expected"),
    [
        ([3.0, 2.0, 1.0], 0.0, (3, 0)),
        ([3.0, 3.0, 3.0], 0.0, (1, 2)),
        ([3.0, 2.95, 2.9], 0.1, (1, 2)),
        ([3.0, 2.95, 2.85], 0.1, (3, 0)),
        ([1.0, 2.0, 0.5, 0.6], 0.0, (3, 1)),
        ([], 0.0, (0, 0)),
    ],
)
def test_an_improvement_is_more_than_min_delta_below_the_best(
    losses: list[float], min_delta: float, expected: tuple[int, int]
) -> None:
    by_step = dict(enumerate(losses, start=1))
    assert last_improvement(by_step, min_delta=min_delta) == expected


def test_a_run_ends_after_patience_and_a_resumed_one_decides_alike(tmp_path: Path) -> None:
    write_losses(tmp_path, {2: 3.0, 4: 2.5, 6: 2.6, 8: 2.7, 10: 2.0})
    config = config_of()
    assert why_stopped(config, tmp_path, step=6) is None
    reason = why_stopped(config, tmp_path, step=8)
    assert reason is not None
    assert "2 evaluations without a loss of held_out below 2.5, of step 4" in reason
    assert why_stopped(config_of(early_stopping_patience=3), tmp_path, step=8) is None


def test_the_export_is_of_the_lowest_loss_that_is_kept(tmp_path: Path) -> None:
    write_losses(tmp_path, {2: 2.0, 4: 2.5, 6: 2.6, 8: 2.4})
    for step in (4, 6, 8):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    found = checkpoint_to_export(config_of(), tmp_path)
    assert found is not None
    assert found.name == "step_00000008"
    others = build_config({"train": {"early_stopping": "held_out"}})
    assert checkpoint_to_export(others, tmp_path) is None
