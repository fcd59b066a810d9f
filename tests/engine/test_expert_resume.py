"""Checkpoints of models with experts, saved at one layout and trained on at another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from roll_sft.config.schema import layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.engine.test_expert_parity import LAYOUTS, LOSS_TOLERANCE, NORM_TOLERANCE
from tests.pool import RankPool

pytestmark = pytest.mark.slow
NUM_STEPS = 8


class Case(NamedTuple):
    kind: str
    layouts: tuple[str, ...]  # each for an equal share of the steps


# Layers that differ, biases of scores, experts in one tensor; axes that come and go.
SUBSET = [Case("glm4moe", ("EP2", "PP2"))]
ALL = [
    *SUBSET,
    Case("glm4moe", ("TP2xEP2+SP", "1")),
    Case("gptoss", ("PP2", "EP2")),
    Case("gptoss", ("EP4", "TP2xEP2+SP")),
    Case("qwen3moe", ("TP2xPP2xEP2+SP", "EP4")),
    Case("qwen2moe", ("EP2", "EP2xPP2")),
    Case("qwen3moe", ("EP2", "EP2")),
    Case("deepseekv3", ("EP2", "PP2", "TP2xEP2+SP", "1")),
    Case("mixtral", ("1", "EP2xPP2", "TP2+SP", "CP2xEP2")),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = ALL if metafunc.config.getoption("--all-layouts") else SUBSET
        metafunc.parametrize("case", cases, ids=lambda case: "-".join((case.kind, *case.layouts)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    parity.write_rows(root / "rows.jsonl")
    return root


def test_a_run_goes_on_from_another_layout_as_transformers_would(
    case: Case, root: Path, pool: RankPool, tmp_path: Path
) -> None:
    home = parity.home_of(root, case.kind)

    def run(
        parallel: Mapping[str, Any], *, loads: Path | None = None, last: int | None = None
    ) -> list[dict[str, float]]:
        config = parity.parity_config(home, parallel=dict(parallel))
        staging = tmp_path / "checkpoints" / f".staging_{last or 8:08d}"
        staging.mkdir(parents=True)
        ranks = pool.run(
            parity.engine_run, layout_of(config.parallel), config, staging, loads, last
        )
        (steps,) = [rank for rank in ranks if rank is not None]
        return steps

    steps, folder, share = list[dict[str, float]](), None, NUM_STEPS // len(case.layouts)
    for part, layout in enumerate(case.layouts, start=1):
        last = part * share
        job = prepare_job(parity.parity_config(home, parallel=dict(LAYOUTS[layout])))
        steps += run(LAYOUTS[layout], loads=folder, last=last)
        folder = parity.published(job, tmp_path / "checkpoints" / f".staging_{last:08d}", last)
    wanted, _ = parity.reference_run(job, torch.float64)
    for key, tolerance in (
        ("loss", LOSS_TOLERANCE[parity.balance_coefficient(job) > 0]),
        ("grad_norm", NORM_TOLERANCE),
    ):
        assert parity.worst(steps, wanted, key) < tolerance
    if len(set(case.layouts)) == 1:
        assert folder is not None
        folder.rename(tmp_path / "resumed")
        assert steps == run(LAYOUTS[case.layouts[0]])
