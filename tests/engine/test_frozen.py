"""Frozen weights on our engine against requires_grad=False in transformers, at every layout."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from roll_sft.checkpoint.manifest import read_manifest
from roll_sft.checkpoint.reader import Reader
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.convert.to_hf import export
from roll_sft.job.in_process import prepare_job
from tests import parity, recipes
from tests.engine.test_parity import LAYOUTS
from tests.pool import RankPool

pytestmark = pytest.mark.slow

LOSS_TOLERANCE, NORM_TOLERANCE, LOGIT_TOLERANCE = 1e-6, 5e-5, 2e-5
STEPS = 6
# Name -> our keys, and what they freeze of transformers' names, written down by hand.
FROZEN: dict[str, tuple[dict[str, Any], str]] = {
    "bottom": ({"num_layers_unfrozen": 2}, r"layers\.[01]\.|embed_tokens"),
    "all_but_norm": ({"num_layers_unfrozen": 0}, r"layers\.|embed_tokens|lm_head"),
    "mlps_and_ends": ({"freeze": ["mlp", "embed_tokens"]}, r"mlp|embed_tokens"),
    "inner": ({"freeze": ["layers.[12]", "layers.0.self_attn", "norm"]},
              r"layers\.[12]\.|layers\.0\.self_attn|model\.norm"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    kind: str
    frozen: str
    layout: str
    packing: bool = field(default=True, kw_only=True)
    recompute: str = field(default="none", kw_only=True)

    @property
    def name(self) -> str:
        packing = "packed" if self.packing else "single"
        return f"{self.kind}-{self.frozen}-{self.layout}-{packing}-{self.recompute}"


SUBSET = [
    Case("qwen2-tied", "bottom", "PP2"),  # the first stage trains nothing
    Case("qwen3", "inner", "TP2xPP2x2+SP", recompute="full"),
]
ALL = [
    Case(kind, name, layout, packing=(row + column) % 2 == 0)
    for row, layout in enumerate(LAYOUTS)
    for column, (kind, name) in enumerate(
        (kind, name) for kind in ("qwen2", "qwen2-tied", "olmo2") for name in FROZEN
    )
    if (row + column) % 3 == 0 and (kind, name) != ("qwen2-tied", "inner")
]
MORE = [
    Case("qwen2", name, "TP2+SP", recompute=recompute)
    for name in FROZEN
    for recompute in ("full", "core_attn+mlp+layernorm")
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        is_full = metafunc.config.getoption("--all-layouts")
        cases = [*SUBSET, *MORE, *ALL] if is_full else SUBSET
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frozen")
    parity.write_rows(root / "rows.jsonl")
    return root


def config_of(home: Path, frozen: str, **sections: dict[str, Any]) -> RunConfig:
    keys = FROZEN[frozen][0]
    train = {"max_steps": STEPS, **keys, **sections.pop("train", {})}
    return parity.parity_config(home, train=train, **sections)


@cache
def reference(home: Path, name: str) -> tuple[list[dict[str, float]], torch.nn.Module]:
    return recipes.reference_run(prepare_job(config_of(home, name)), frozen=FROZEN[name][1])


def test_every_step_equals_transformers_and_the_export_has_all_weights(
    case: Case, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    home, modules = parity.home_of(folder, case.kind), case.recompute.split("+")
    config = config_of(
        home,
        case.frozen,
        parallel=LAYOUTS[case.layout],
        data={"packing": case.packing},
        train={"recompute": modules if len(modules) > 1 else case.recompute},
    )
    wanted, theirs = reference(home, case.frozen)
    weights = dict(theirs.named_parameters())
    staging = tmp_path / "checkpoints" / f".staging_{STEPS:08d}"
    staging.mkdir(parents=True)
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, staging)
    (steps,) = [rank for rank in ranks if rank is not None]
    job = prepare_job(config)
    export(parity.published(job, staging, STEPS), tmp_path / "hf", dtype=None, replace=False)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    base = load_file(home / "model" / "model.safetensors")
    assert exported.keys() == base.keys() == weights.keys()
    unchanged = {name for name, value in exported.items() if torch.equal(value, base[name])}
    assert unchanged == {name for name, value in weights.items() if torch.equal(value, base[name])}
    assert 0 < len(unchanged) < len(base)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    logits = parity.model_logits(theirs)
    errors = {
        "loss": parity.worst(steps, wanted, "loss"),
        "grad_norm": parity.worst(steps, wanted, "grad_norm"),
        "logits": float((parity.model_logits(ours) - logits).abs().max() / logits.abs().max()),
    }
    print(f"frozen {case.name}", {name: f"{value:.1e}" for name, value in errors.items()})
    assert errors["loss"] < LOSS_TOLERANCE
    assert errors["grad_norm"] < NORM_TOLERANCE
    assert errors["logits"] < LOGIT_TOLERANCE


def test_a_run_goes_on_on_another_layout_from_what_was_trained(
    folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    """Rank 0 of the second layout trains nothing, so others say how many updates there were."""
    home, steps, checkpoint = parity.home_of(folder, "qwen2-tied"), [], None
    wanted, _ = reference(home, "bottom")
    for last, layout in ((2, "TP2+SP"), (4, "PP2"), (STEPS, "DP2")):
        config = config_of(home, "bottom", parallel=LAYOUTS[layout])
        staging = tmp_path / layout / f".staging_{last:08d}"
        staging.mkdir(parents=True)
        ranks = pool.run(
            parity.engine_run, layout_of(config.parallel), config, staging, checkpoint, last
        )
        steps += next(filter(None, ranks))
        checkpoint = parity.published(prepare_job(config), staging, last)
        assert read_manifest(checkpoint).state.optimizer_step == last
    assert parity.worst(steps, wanted, "loss") < LOSS_TOLERANCE
    assert parity.worst(steps, wanted, "grad_norm") < NORM_TOLERANCE
    assert checkpoint is not None
    reader = Reader(checkpoint)
    assert reader.has("decoder.layers.2.mlp.linear_fc1.weight")
    assert reader.has("decoder.layers.3.input_layernorm.weight")
    assert not reader.has("decoder.layers.1.mlp.linear_fc1.weight")
    assert not reader.has("embedding.word_embeddings.weight")
