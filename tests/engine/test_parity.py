"""Our engine against transformers + AdamW, step by step, at every layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.config import layout_of
from roll_sft.preflight import prepare
from tests import parity
from tests.pool import RankPool

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {"num_workers": 1},
    "TP2": {"num_workers": 2, "tensor_model_parallel_size": 2},
    "TP2+SP": {"num_workers": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"num_workers": 2, "pipeline_model_parallel_size": 2},
    "CP2": {"num_workers": 2, "context_parallel_size": 2},
    "DP2": {"num_workers": 2},
    "TP2xPP2+SP": {
        "num_workers": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
    "TP2xCP2+SP": {
        "num_workers": 4,
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 2,
        "sequence_parallel": True,
    },
    "PP2xDP2": {"num_workers": 4, "pipeline_model_parallel_size": 2},
    "PP2x2": {
        "num_workers": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "TP2xPP2x2+SP": {
        "num_workers": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}
LOSS_TOLERANCE, NORM_TOLERANCE, LOGIT_TOLERANCE = 1e-6, 5e-5, 2e-5
GRADIENT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    kind: str
    layout: str
    packing: bool
    capacity: int  # micro_batch_tokens in units of sequence_length

    @property
    def name(self) -> str:
        packing = "packed" if self.packing else "single"
        return f"{self.kind}-{self.layout}-{packing}-{self.capacity}x"


MAIN_KINDS = ("qwen2", "qwen2-tied")
OTHER_KINDS = ("qwen2-one_kv_head", "qwen3", "qwen3-tied", "llama", "llama3", "mistral", "olmo2")
KINDS = (*MAIN_KINDS, *OTHER_KINDS)


def in_turns(kinds: tuple[str, ...], layouts: Iterable[str]) -> list[Case]:
    """Every kind at every layout; packing and capacity take turns."""
    return [
        Case(kind, layout, packing=(row + column) % 3 != 0, capacity=1 if (row + column) % 2 else 4)
        for row, layout in enumerate(layouts)
        for column, kind in enumerate(kinds)
    ]


ALL = [
    *(Case(k, n, p, c) for k in MAIN_KINDS for n in LAYOUTS for p in (True, False) for c in (1, 4)),
    *in_turns(OTHER_KINDS, LAYOUTS),
]
SUBSET = [*in_turns(MAIN_KINDS, LAYOUTS), *in_turns(OTHER_KINDS, ["TP2xPP2x2+SP"])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = ALL if metafunc.config.getoption("--all-layouts") else SUBSET
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model of each kind, and the rows."""
    root = tmp_path_factory.mktemp("parity")
    for kind in KINDS:
        (root / kind).mkdir()
        parity.write_model(root / kind / "model", kind=kind)
        parity.write_rows(root / kind / "rows.jsonl")
    return root


@cache
def reference(folder: Path) -> tuple[list[dict[str, float]], torch.Tensor]:
    return parity.reference_run(prepare(parity.parity_config(folder)))


@cache
def gradient_reference(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    return parity.reference_gradients(prepare(parity.parity_config(folder)))


def test_every_step_equals_transformers_and_so_does_the_exported_model(
    case: Case, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    home = folder / case.kind
    config = parity.parity_config(
        home,
        parallel=LAYOUTS[case.layout],
        data={"packing": case.packing},
        train={"micro_batch_tokens": 200 * case.capacity},
    )
    wanted, logits = reference(home)
    staging = tmp_path / "checkpoints" / ".staging_00000008"
    staging.mkdir(parents=True)
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, staging)
    (steps,) = [rank for rank in ranks if rank is not None]
    model = parity.export_run(prepare(config), staging, tmp_path / "hf")
    errors = {
        "loss": max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(steps, wanted, strict=True)),
        "grad_norm": max(
            abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(steps, wanted, strict=True)
        ),
        "logits": float((parity.model_logits(model) - logits).abs().max() / logits.abs().max()),
    }
    print(f"parity {case.name}", {name: f"{value:.1e}" for name, value in errors.items()})
    assert len(steps) == 8
    assert errors["loss"] < LOSS_TOLERANCE
    assert errors["grad_norm"] < NORM_TOLERANCE
    assert errors["logits"] < LOGIT_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, layout) for kind in MAIN_KINDS for layout in LAYOUTS),
        *((kind, layout) for kind in OTHER_KINDS for layout in ("TP2", "TP2xPP2+SP", "TP2xCP2+SP")),
    ],
)
def test_the_gradient_of_every_parameter_equals_transformers(
    kind: str, layout: str, folder: Path, pool: RankPool
) -> None:
    loss, errors = _gradient_errors(folder / kind, pool, layout)
    worst = max(errors, key=lambda name: errors[name])
    print(f"gradients {layout} {kind}: loss {loss:.1e}, worst {worst} {errors[worst]:.1e}")
    assert loss < LOSS_TOLERANCE
    assert errors[worst] < GRADIENT_TOLERANCE, worst


def test_a_gradient_that_is_not_reduced_is_seen_although_the_loss_is_right(
    folder: Path, pool: RankPool
) -> None:
    mistake = "hidden gradient not reduced over the tensor group"
    loss, errors = _gradient_errors(folder / "qwen2", pool, "TP2", mistake)
    assert loss < LOSS_TOLERANCE
    assert max(errors.values()) > 0.1


def test_a_padded_vocabulary_in_the_softmax_is_seen(folder: Path, pool: RankPool) -> None:
    mistake = "padded vocabulary in the softmax"
    loss, _ = _gradient_errors(folder / "qwen2", pool, "TP2", mistake)
    assert loss > 10 * LOSS_TOLERANCE


def _gradient_errors(
    home: Path, pool: RankPool, layout: str, mistake: str | None = None
) -> tuple[float, dict[str, float]]:
    """Relative error of the loss, and each parameter's worst over the ranks."""
    # Without the distributed optimizer every rank holds whole gradients to compare.
    options = {**LAYOUTS[layout], "use_distributed_optimizer": False}
    config = parity.parity_config(home, parallel=options)
    wanted, gradients = gradient_reference(home)
    ranks = pool.run(
        parity.engine_gradient_errors, layout_of(config.parallel), config, gradients, mistake
    )
    losses = [abs(loss / wanted - 1) for loss, _ in ranks if loss is not None]
    names = {name for _, errors in ranks for name in errors}
    worst = {name: max(errors.get(name, 0.0) for _, errors in ranks) for name in names}
    return max(losses), worst
