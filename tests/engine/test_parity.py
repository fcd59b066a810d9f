"""Our engine against transformers + AdamW, step by step, at every layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.config.schema import layout_of
from roll_sft.job.in_process import prepare_job
from roll_sft.parity.verdict import Verdict
from tests import parity
from tests.faults import FAULTS
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


@dataclass(frozen=True)
class Case:
    kind: str
    layout: str
    packing: bool
    capacity: int  # micro_batch_tokens in units of sequence_length
    compiled: bool = False
    switches: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        packing = "packed" if self.packing else "single"
        more = "".join(f"-{each}" for each in (*self.switches, *["compiled"] * self.compiled))
        return f"{self.kind}-{self.layout}-{packing}-{self.capacity}x{more}"

    def sections(self) -> dict[str, dict[str, Any]]:
        """What the case sets of a run."""
        sections: dict[str, dict[str, Any]] = {
            "parallel": LAYOUTS[self.layout],
            "model": {"compile": self.compiled},
            "data": {"packing": self.packing},
            "train": {"micro_batch_tokens": 200 * self.capacity},
        }
        for section, values in (SWITCHES[name] for name in self.switches):
            sections[section] = {**sections[section], **values}
        return sections


# What changes when numbers are exchanged or computed again, and no number.
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "overlap_grad_reduce": (
        "parallel",
        {"overlap_grad_reduce": True, "overlap_param_gather": False},
    ),
    "overlap_param_gather": ("parallel", {"overlap_param_gather": True}),
    "recompute": ("train", {"recompute": ["core_attn", "mlp", "layernorm"]}),
    "recompute_full": ("train", {"recompute": "full"}),
}


MAIN_KINDS = ("qwen2", "qwen2-tied")
OTHER_KINDS = ("qwen2-one_kv_head", "qwen3", "qwen3-tied", "llama", "llama3", "mistral", "olmo2")
KINDS = (*MAIN_KINDS, *OTHER_KINDS)


def in_turns(
    kinds: tuple[str, ...], layouts: Iterable[str], switches: tuple[str, ...] = ()
) -> list[Case]:
    """Every kind at every layout with `switches` on; packing and capacity take turns."""
    return [
        Case(
            kind,
            layout,
            packing=(row + column) % 3 != 0,
            capacity=1 if (row + column) % 2 else 4,
            switches=switches,
        )
        for row, layout in enumerate(layouts)
        for column, kind in enumerate(kinds)
    ]


ALL = [
    *(Case(k, n, p, c) for k in MAIN_KINDS for n in LAYOUTS for p in (True, False) for c in (1, 4)),
    *in_turns(OTHER_KINDS, LAYOUTS),
    *(
        Case(k, n, True, 1, compiled=True)
        for k, n in (("qwen3", "TP2xCP2+SP"), ("olmo2", "TP2+SP"))
    ),
    *(Case(k, n, True, 4, compiled=True) for k, n in (("olmo2", "TP2xPP2x2+SP"), ("qwen2", "DP2"))),
    *in_turns(MAIN_KINDS, LAYOUTS, ("overlap_param_gather",)),
    *in_turns(("qwen3", "qwen2-tied"), LAYOUTS, ("recompute",)),
    *in_turns(("llama",), LAYOUTS, ("overlap_grad_reduce",)),
    *in_turns(("qwen2-tied",), LAYOUTS, ("overlap_param_gather", "recompute")),
    *in_turns(("olmo2",), LAYOUTS, ("overlap_param_gather", "recompute_full")),
]
# Tied and untied by turns; the gradients of both are compared at every layout below.
SUBSET = [
    *(
        case
        for row, name in enumerate(LAYOUTS)
        for case in in_turns(MAIN_KINDS, LAYOUTS)
        if case.layout == name and case.kind == MAIN_KINDS[row % 2]
    ),
    *in_turns(OTHER_KINDS, ["TP2xPP2x2+SP"]),
    Case("qwen2", "PP2xDP2", False, 1, switches=("overlap_param_gather", "recompute")),
]
LAYOUTS_OF_OTHERS = ("TP2xCP2+SP",)


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
    return parity.reference_run(prepare_job(parity.parity_config(folder)))


@cache
def first_step(folder: Path) -> Path:
    """A folder with what the oracle makes of step 1."""
    parity.write_reference_of(prepare_job(parity.parity_config(folder)), folder / "reference")
    return folder / "reference"


def test_every_step_equals_transformers_and_so_does_the_exported_model(
    case: Case, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    home = folder / case.kind
    config = parity.parity_config(home, **case.sections())
    wanted, logits = reference(home)
    staging = tmp_path / "checkpoints" / ".staging_00000008"
    staging.mkdir(parents=True)
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, staging)
    (steps,) = [rank for rank in ranks if rank is not None]
    model = parity.export_run(prepare_job(config), staging, tmp_path / "hf")
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
        *((kind, layout) for kind in OTHER_KINDS for layout in LAYOUTS_OF_OTHERS),
    ],
)
def test_every_output_loss_and_gradient_equals_transformers(
    kind: str, layout: str, folder: Path, pool: RankPool
) -> None:
    verdict = compared(folder / kind, pool, layout)
    errors = {check.what: f"{check.measured:.1e}" for check in verdict.checks}
    print(f"parity of step 1, {layout} {kind}: {errors}")
    assert verdict.first_difference is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_and_named_by_the_tensor_where_it_begins(
    fault: str, folder: Path, pool: RankPool
) -> None:
    verdict = compared(folder / FAULTS[fault].kind, pool, "TP2", fault)
    assert verdict.first_difference is not None
    assert FAULTS[fault].named in verdict.first_difference


def compared(home: Path, pool: RankPool, layout: str, fault: str | None = None) -> Verdict:
    """Step 1 on all ranks of `layout`, beside the oracle."""
    # Without the distributed optimizer every rank holds whole gradients to compare.
    options = {**LAYOUTS[layout], "use_distributed_optimizer": False}
    job = prepare_job(parity.parity_config(home, parallel=options))
    return parity.compared(job, pool, first_step(home), fault)
