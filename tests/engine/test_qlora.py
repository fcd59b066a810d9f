"""Adapters beside a base in NF4: our engine against peft and bitsandbytes, step by step."""

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.convert.merge_lora import merge
from roll_sft.convert.to_hf import export
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.engine.test_parity import LAYOUTS
from tests.pool import RankPool

peft = pytest.importorskip("peft")
functional = pytest.importorskip("bitsandbytes").functional
lora = importlib.import_module("tests.lora")  # which imports peft

pytestmark = pytest.mark.slow

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 5e-5
ADAPTER_TOLERANCE, MERGED_TOLERANCE = 1e-5, 1e-5
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "alpha": 8},
    "some": {"rank": 4, "alpha": 2, "target_modules": ["v_proj", "q_proj", "up_proj"]},
}
# The kind of the model, the adapters, the layout to step 6 and that from there, what is recomputed.
ALL = [
    ("qwen2-wide", "some", "TP2+SP", "PP2", "full"),
    ("qwen2-wide", "all", "1", "1", "none"),
    ("llama-wide", "all", "CP2", "DP2", "full"),
    ("llama-wide", "some", "DP2", "TP2", "none"),
    ("llama-wide", "all", "TP2xPP2+SP", "CP2", "none"),
]
SUBSET = ALL[:1]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = ALL if metafunc.config.getoption("--all-layouts") else SUBSET
        metafunc.parametrize("case", cases, ids="-".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qlora")
    parity.write_rows(root / "rows.jsonl")
    return root


@cache
def adapter_of(home: Path, name: str) -> Path:
    options = dict(ADAPTERS[name])
    targets = options.pop("target_modules", "all-linear")
    rank, alpha = options.pop("rank"), options.pop("alpha")
    return lora.write_adapter(
        home / "model", home / name, r=rank, lora_alpha=alpha, target_modules=targets
    )


def quantized_config(home: Path, adapter: str, **sections: Any) -> RunConfig:
    values = {**ADAPTERS[adapter], "quantize_base": "nf4"}
    return lora.lora_config(home, adapter_of(home, adapter), lora=values, **sections)


@cache
def reference(
    home: Path, name: str
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], torch.Tensor]:
    job = prepare_job(quantized_config(home, name))
    return lora.reference_beside_nf4(job, adapter_of(home, name), device="cpu")


def test_a_run_goes_on_to_the_last_bit(folder: Path, pool: RankPool, tmp_path: Path) -> None:
    home = parity.home_of(folder, "qwen2-wide", num_layers=2)
    config = quantized_config(home, "some")
    staging = tmp_path / "checkpoints" / ".staging_00000002"
    staging.mkdir(parents=True)
    (whole,) = pool.run(parity.engine_run, layout_of(config.parallel), config, None, None, 4)
    pool.run(parity.engine_run, layout_of(config.parallel), config, staging, None, 2)
    step = parity.published(prepare_job(config), staging, 2)
    (rest,) = pool.run(parity.engine_run, layout_of(config.parallel), config, None, step, 4)
    assert rest == whole[2:]


def test_every_step_and_the_exported_adapter_equal_peft_and_bitsandbytes(
    case: tuple[str, str, str, str, str], folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    """With a resume on another layout, which quantises the base again."""
    kind, name, *layouts, recompute = case
    home = parity.home_of(folder, kind, num_layers=2)
    wanted, tensors, logits = reference(home, name)
    step, steps = None, []
    for last, layout in zip((6, 10), layouts, strict=True):
        train, parallel = {"recompute": recompute}, LAYOUTS[layout]
        config = quantized_config(home, name, parallel=parallel, train=train)
        staging = tmp_path / "checkpoints" / f".staging_{last:08d}"
        staging.mkdir(parents=True)
        ranks = layout_of(config.parallel)
        (found,) = filter(None, pool.run(parity.engine_run, ranks, config, staging, step, last))
        steps += found
        step = parity.published(prepare_job(config), staging, last)
    export(step, tmp_path / "adapter", dtype=None, replace=False)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert exported.keys() == tensors.keys()
    errors = {
        "loss": parity.worst(steps, wanted, "loss"),
        "grad_norm": parity.worst(steps, wanted, "grad_norm"),
        "adapter": max(float((exported[k] - v).abs().max()) for k, v in tensors.items()),
    }
    print(f"qlora {'-'.join(case)}", {name: f"{value:.1e}" for name, value in errors.items()})
    assert errors["loss"] < LOSS_TOLERANCE
    assert errors["grad_norm"] < NORM_TOLERANCE
    assert errors["adapter"] < ADAPTER_TOLERANCE
    # Merged by way of the step folder and of the adapter's: the weights that were computed with.
    merge(step, home / "model", tmp_path / "merged", dequantize=True)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    unmerged = (parity.model_logits(ours) - logits).abs().max() / logits.abs().max()
    assert unmerged < 2 * MERGED_TOLERANCE
    merge(tmp_path / "adapter", home / "model", tmp_path / "again", dequantize=True)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
