"""Families that are no plain decoders against transformers + AdamW, step by step."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.config.schema import layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.engine.test_parity import LAYOUTS, LOSS_TOLERANCE, NORM_TOLERANCE
from tests.families import FAMILIES
from tests.pool import RankPool

pytestmark = pytest.mark.slow

LOGIT_RATIO = 4.0  # of transformers' own distance from float64


@dataclass(frozen=True)
class Case:
    kind: str
    layout: str
    packing: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        compiled = "-compiled" if self.compiled else ""
        return f"{self.kind}-{self.layout}-{'packed' if self.packing else 'single'}{compiled}"


SUBSET_LAYOUTS = {
    "phi3_partial": "TP2+SP",
    "granite": "TP2+SP",
    "olmo3": "TP2xCP2+SP",
    "gemma2": "TP2xCP2+SP",
    "gemma3": "TP2xPP2+SP",
    "glm4": "TP2+SP",
}
ALL = [
    *(Case(k, n, p) for k in FAMILIES for n in LAYOUTS for p in (True, False)),
    Case("gemma2", "TP2+SP", packing=True, compiled=True),
    Case("glm4", "1", packing=True, compiled=True),
]
SUBSET = [Case(kind, layout, packing=True) for kind, layout in SUBSET_LAYOUTS.items()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = ALL if metafunc.config.getoption("--all-layouts") else SUBSET
        if "outputs" in metafunc.function.__name__ and cases is SUBSET:
            cases = [case for case in SUBSET if case.kind in ("gemma2", "gemma3")]
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@cache
def home_of(root: Path, kind: str) -> Path:
    """The model of a kind, and the rows."""
    home = root / kind
    home.mkdir()
    parity.write_model(home / "model", kind=kind)
    parity.write_rows(home / "rows.jsonl")
    return home


@cache
def reference(home: Path) -> tuple[list[dict[str, float]], torch.Tensor, torch.Tensor]:
    """Steps and logits of transformers in fp32, and its logits in float64."""
    job = prepare_job(parity.parity_config(home))
    steps, logits = parity.reference_run(job)
    _, exact = parity.reference_run(job, torch.float64)
    return steps, logits, exact


@cache
def first_step(home: Path) -> Path:
    """A folder with what the oracle makes of step 1."""
    parity.write_reference_of(prepare_job(parity.parity_config(home)), home / "reference")
    return home / "reference"


def test_every_step_equals_transformers_and_so_does_the_exported_model(
    case: Case, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    home = home_of(folder, case.kind)
    config = parity.parity_config(
        home,
        parallel=LAYOUTS[case.layout],
        model={"compile": case.compiled},
        data={"packing": case.packing},
        train={"micro_batch_tokens": 400},
    )
    wanted, logits, exact = reference(home)
    staging = tmp_path / "checkpoints" / ".staging_00000008"
    staging.mkdir(parents=True)
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, staging)
    (steps,) = [rank for rank in ranks if rank is not None]
    model = parity.export_run(prepare_job(config), staging, tmp_path / "hf")
    errors: dict[str, Any] = {
        key: max(abs(a[key] / b[key] - 1) for a, b in zip(steps, wanted, strict=True))
        for key in ("loss", "grad_norm")
    }
    theirs = float((logits - exact).abs().max())
    errors["logits"] = float((parity.model_logits(model) - exact).abs().max()) / theirs
    print(f"parity {case.name}", {name: f"{value:.1e}" for name, value in errors.items()})
    assert len(steps) == 8
    assert errors["loss"] < LOSS_TOLERANCE
    assert errors["grad_norm"] < NORM_TOLERANCE
    assert errors["logits"] < LOGIT_RATIO


def test_all_outputs_losses_and_gradients_equal_those_of_transformers(
    case: Case, folder: Path, pool: RankPool
) -> None:
    home = home_of(folder, case.kind)
    options = {**LAYOUTS[case.layout], "use_distributed_optimizer": False}
    job = prepare_job(parity.parity_config(home, parallel=options, data={"packing": case.packing}))
    verdict = parity.compared(job, pool, first_step(home))
    print({check.what: f"{check.measured:.1e}" for check in verdict.checks})
    assert verdict.first_difference is None
