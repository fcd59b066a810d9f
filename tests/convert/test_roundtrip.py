"""HuggingFace -> our shards -> checkpoint -> HuggingFace, to the last bit, for every family.

And the logits of the last two are the same, by the converters' own comparison."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.convert.verify import verify
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.families import FAMILIES
from tests.pool import RankPool

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "1": {"num_workers": 1},
    "TP2": {"num_workers": 2, "tensor_model_parallel_size": 2},
    "PP2": {"num_workers": 2, "pipeline_model_parallel_size": 2},
    "PP2x2 virtual": {
        "num_workers": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "TP2xPP2": {
        "num_workers": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    },
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"num_workers": 2, "expert_model_parallel_size": 2},
    "TP2xEP2": {
        "num_workers": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
    },
    "TP2": {"num_workers": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "EP2xPP2": {
        "num_workers": 4,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
    },
}
# As published, with a layer for multi-token prediction, where the family has one.
WITH_PREDICTION = ("deepseekv3", "glm4moe")
EXPERT_KINDS = tuple(
    kind + "-mtp" * (kind in WITH_PREDICTION)
    for kind in (*parity.EXPERTS, "deepseekv3-plain", "mixtral-fused", "glm4moe-fused")
)
KINDS = ("qwen2", "qwen2-tied", "qwen2-one_kv_head", "qwen3", "llama3", "mistral", "olmo2")


def families_at(layout: str, *, every: bool) -> list[str]:
    """The families that are no plain decoders, at two layouts, by turns unless `every`."""
    turns = {"TP2": 0, "PP2": 1}
    if layout not in turns:
        return []
    return list(FAMILIES) if every else list(FAMILIES)[turns[layout] :: 2]


def save_untrained(config: RunConfig, folders: dict[str, Path]) -> None:
    """Build the engine of each model folder and save it as it was loaded. In a pool."""
    import dataclasses

    from roll_sft.engine.engine import Engine

    for kind, staging in folders.items():
        home = staging.parents[2] / kind
        model = dataclasses.replace(config.model, path=str(home / "model"))
        job = prepare_job(dataclasses.replace(config, model=model))
        Engine(job.config, source=job.source, data=job.data).save(staging)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_comes_back_as_it_was(
    layout: str, pool: RankPool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kinds = [*KINDS, *families_at(layout, every=request.config.getoption("--all-layouts"))]
    check_roundtrip(kinds, LAYOUTS[layout], pool, tmp_path)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_every_tensor_of_a_model_with_experts_comes_back_as_it_was(
    layout: str, pool: RankPool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kinds = list(EXPERT_KINDS)
    if not request.config.getoption("--all-layouts"):  # one layout, which cuts all there is
        kinds = ["deepseekv3-mtp", "mixtral-fused"] if layout == "TP2xEP2" else []
    if kinds:
        check_roundtrip(kinds, EXPERT_LAYOUTS[layout], pool, tmp_path)


def check_roundtrip(
    kinds: list[str], layout: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    """Each of `kinds`, saved by an engine of `layout` as it was loaded, and exported."""
    for kind in kinds:
        parity.write_model(tmp_path / kind / "model", kind=kind)
    parity.write_rows(tmp_path / "rows.jsonl")
    config = parity.parity_config(
        tmp_path,
        parallel=layout,
        model={"path": str(tmp_path / kinds[0] / "model")},
        checkpoint={"save_optimizer": False},
    )
    folders = {kind: tmp_path / "out" / kind / ".staging_00000008" for kind in kinds}
    for staging in folders.values():
        staging.mkdir(parents=True)
    pool.run(save_untrained, layout_of(config.parallel), config, folders)
    for kind, staging in folders.items():
        own = parity.parity_config(tmp_path, model={"path": str(tmp_path / kind / "model")})
        parity.export_run(prepare_job(own), staging, tmp_path / "out" / kind / "hf")
        source = load_file(tmp_path / kind / "model" / "model.safetensors")
        exported = load_file(tmp_path / "out" / kind / "hf" / "model.safetensors")
        assert exported.keys() == source.keys(), kind
        for name, tensor in source.items():
            assert torch.equal(exported[name], tensor), f"{kind} {name}"
        (checkpoint,) = staging.parent.glob("step_*")
        verify(tmp_path / "out" / kind / "hf", checkpoint, dtype=None)
