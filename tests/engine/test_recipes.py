"""Loss terms, weights, noise and groups of parameters against transformers, at every layout."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity, recipes
from tests.engine.test_parity import LAYOUTS
from tests.pool import RankPool

pytestmark = pytest.mark.slow

LOSS_TOLERANCE, NORM_TOLERANCE, LOGIT_TOLERANCE = 1e-6, 5e-5, 2e-5
STEPS = 5
GROUPS = {
    "learning_rate_factors": {"embeddings": 0.25, "layers.[12].mlp": 3.0},
    "weight_decay_exclude": ["self_attn", "embed_tokens"],
}
# What these mean of transformers' names, written down by hand.
OF_GROUPS = {
    r"embed_tokens|lm_head": {"factor": 0.25},
    r"layers\.[12]\.mlp": {"factor": 3.0},
    r"self_attn|embed_tokens": {"weight_decay": 0.0},
}
RECIPES: dict[str, dict[str, Any]] = {
    "weights": {},
    "sample_mean": {"loss": "sample_mean"},
    "sum": {"loss_reduction": "sum", "max_grad_norm": 0.0},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss_coef": 1e-3},
    "noise": {"neftune_noise_alpha": 5.0},
    "groups": GROUPS,
    "all": {
        "loss": "sample_mean",
        "label_smoothing": 0.1,
        "z_loss_coef": 1e-3,
        "neftune_noise_alpha": 5.0,
        **GROUPS,
    },
    "all_frozen": {
        "label_smoothing": 0.1,
        "neftune_noise_alpha": 5.0,
        "num_layers_unfrozen": 2,
        "learning_rate_factors": {"layers.2": 0.5},
    },
}
FROZEN = {"all_frozen": r"layers\.[01]\.|embed_tokens"}
MEANS = {"groups": OF_GROUPS, "all": OF_GROUPS, "all_frozen": {r"layers\.2\.": {"factor": 0.5}}}


@dataclass(frozen=True)
class Case:
    kind: str
    recipe: str
    layout: str
    packing: bool = field(default=True, kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.recipe}-{self.layout}-{'packed' if self.packing else 'single'}"


SUBSET = [Case("qwen2-tied", "all_frozen", "PP2x2"), Case("qwen2", "all", "TP2xCP2+SP")]
ALL = [
    Case(("qwen2", "qwen2-tied")[(row + column) % 2], recipe, layout, packing=row % 2 == 0)
    for row, layout in enumerate(LAYOUTS)
    for column, recipe in enumerate(RECIPES)
    if recipe == "all" or (row + column) % 2 == 0
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        is_full = metafunc.config.getoption("--all-layouts")
        cases = [*SUBSET, *ALL] if is_full else SUBSET
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    recipes.write_weighted_rows(root / "rows.jsonl")
    return root


def config_of(home: Path, recipe: str, **sections: dict[str, Any]) -> RunConfig:
    return parity.parity_config(home, train={"max_steps": STEPS, **RECIPES[recipe]}, **sections)


@cache
def reference(home: Path, recipe: str) -> tuple[recipes.Steps, torch.Tensor]:
    steps, model = recipes.reference_run(
        prepare_job(config_of(home, recipe)), frozen=FROZEN.get(recipe), groups=MEANS.get(recipe)
    )
    return steps, parity.model_logits(model.eval())


def test_every_step_and_the_export_equal_transformers(
    case: Case, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    home = parity.home_of(folder, case.kind)
    layout = {"parallel": LAYOUTS[case.layout], "data": {"packing": case.packing}}
    config = config_of(home, case.recipe, **layout)
    wanted, logits = reference(home, case.recipe)
    staging = tmp_path / "checkpoints" / f".staging_{STEPS:08d}"
    staging.mkdir(parents=True)
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, staging)
    (steps,) = [rank for rank in ranks if rank is not None]
    model = parity.export_run(prepare_job(config), staging, tmp_path / "hf")
    errors = {key: parity.worst(steps, wanted, key) for key in ("loss", "objective", "grad_norm")}
    found = parity.model_logits(model)
    errors["logits"] = float((found - logits).abs().max() / logits.abs().max())
    print(f"recipe {case.name}", {name: f"{value:.1e}" for name, value in errors.items()})
    assert errors["loss"] < LOSS_TOLERANCE
    assert errors["objective"] < LOSS_TOLERANCE
    assert errors["grad_norm"] < NORM_TOLERANCE
    assert errors["logits"] < LOGIT_TOLERANCE


def test_noise_is_uniform_and_of_transformers_size() -> None:
    numbers = np.concatenate(
        [recipes.uniform_numbers(42, step, 3, 30, 64).ravel() for step in (1, 2, 3)]
    )
    assert -1 <= numbers.min() < -0.999
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean()) < 0.02
    assert numbers.var() == pytest.approx(1 / 3, rel=0.02)
