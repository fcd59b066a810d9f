"""Ranks that are slower than the others are named; noise names nobody."""

import json
import random
from pathlib import Path

import pytest

from roll_sft.training.stragglers import WINDOW, slow_ones
from tests.parity import write_model, write_rows
from tests.runtime.ray_cluster import Program

FACTOR = 1.5


def noisy(ranks: int, *, seed: int, base_s: float = 1.0) -> list[list[float]]:
    """Steps of ranks with a tenth of noise, and a pause of five seconds here and there."""
    chance = random.Random(seed)
    return [
        [
            base_s * chance.uniform(0.9, 1.1) + 5.0 * base_s * (chance.random() < 0.1)
            for _ in range(WINDOW)
        ]
        for _ in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_that_is_slow_in_most_steps_is_found(ranks: int) -> None:
    seconds = noisy(ranks, seed=ranks)
    seconds[1] = [1.8 * each for each in seconds[1]]
    ((rank, (ratio, lag_s)),) = slow_ones(seconds, factor=FACTOR).items()
    assert rank == 1
    assert ratio == pytest.approx(1.8, rel=0.2)
    assert lag_s == pytest.approx(0.8, rel=0.4)


def test_noise_and_pauses_name_nobody() -> None:
    for seed in range(200):
        assert slow_ones(noisy(2 + seed % 7, seed=seed), factor=FACTOR) == {}


def test_steps_of_milliseconds_name_nobody() -> None:
    assert slow_ones([[0.002] * WINDOW, [0.006] * WINDOW], factor=FACTOR) == {}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("module", ["tests.slow_rank", "roll_sft.run"])
def test_a_run_names_its_slow_rank_and_no_other(module: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", kind="qwen2-tied", num_layers=2)
    write_rows(tmp_path / "rows.jsonl", num_rows=40)
    keys = {
        "output_dir": tmp_path / "run",
        "model.path": tmp_path / "model",
        "data.train": f"[{{path: {tmp_path / 'rows.jsonl'}}}]",
        "data.sequence_length": 200,
        "train.global_batch_size": 4,
        "train.max_steps": 3 * WINDOW,
        "checkpoint.hf_export": "none",
        "parallel.num_workers": 2,
        "parallel.device": "cpu",
        "tracking.backends": "[jsonl]",
    }
    program = Program(
        "-m", module, *(f"{key}={value}" for key, value in keys.items()), folder=tmp_path
    )
    try:
        assert program.wait(timeout_s=300) == 0, program.errors
    finally:
        program.close()
    path = tmp_path / "run" / "stragglers.jsonl"
    if module == "roll_sft.run":
        assert not path.exists(), path.read_text()
        assert "slow:" not in program.errors
        return
    (line,) = [json.loads(each) for each in path.read_text().splitlines()]
    assert (line["rank"], line["ranks"], line["device"]) == (1, [1], "CPU")
    assert line["host"]
    assert line["times_as_long"] > FACTOR
    assert "warning: slow: rank 1 on " in program.errors
