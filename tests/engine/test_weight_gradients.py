"""Gradients that products add to the buffer are those that a second pass adds."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.pool import RankPool

TP2 = {"num_workers": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}


def steps_of(config: RunConfig, in_products: bool) -> tuple[list[tuple[float, float]], int]:
    """Loss and gradient norm of three steps, and how many products added a gradient. In a pool."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import layers

    from roll_sft.engine import engine, fused

    def choose(transformer: Any, *, device: torch.device) -> None:
        if in_products:
            fused.use_added_products(transformer)

    job, found, added = prepare_job(config), [], []
    product = fused.add_product

    def counted(*arguments: Any) -> None:
        added.append(arguments[0].dtype)
        product(*arguments)

    with (
        patch.object(engine, "add_in_products", choose),
        patch.object(fused, "add_product", counted),
        patch.object(layers, "_grad_accum_fusion_available", False),
    ):
        ours = engine.Engine(config, source=job.source, data=job.data)
        data_rank = job.layout.coordinate(dist.get_rank()).data_rank
        for step in (1, 2, 3):
            work = job.planner.step(step).work_for(data_rank, learning_rate=1e-3)
            metrics = ours.train_step(work)
            if metrics is not None:
                found.append((metrics.loss_sum, metrics.grad_norm))
    assert all(dtype == torch.float32 for dtype in added)
    return found, len(added)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-4)])
def test_a_run_is_the_same_whichever_adds(
    dtype: str, tolerance: float, tmp_path: Path, pool: RankPool
) -> None:
    parity.write_model(tmp_path / "model", kind="qwen2-tied", num_layers=2)
    parity.write_rows(tmp_path / "rows.jsonl")
    config = parity.parity_config(tmp_path, parallel=TP2, model={"dtype": dtype})
    plain = pool.run(steps_of, layout_of(config.parallel), config, False)
    fused = pool.run(steps_of, layout_of(config.parallel), config, True)
    assert all(count == 0 for _, count in plain)
    # Four linear layers a block, two blocks, three steps, at least one pack a step.
    assert all(count >= 24 for _, count in fused)
    (wanted,), (found,) = ([steps for steps, _ in ranks if steps] for ranks in (plain, fused))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
