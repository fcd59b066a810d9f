"""An update is Megatron's own: the norm, the clipping and the parameters after it."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.pool import RankPool

# Parameters that several ranks hold: norms under tensor parallelism, a tied head on two stages.
LAYOUTS = {
    "DP2": {"num_workers": 2},
    "TP2xPP2+SP": {
        "num_workers": 4,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}


def ours_and_megatrons(config: RunConfig) -> list[tuple[list[float], list[torch.Tensor]]]:
    """In a pool: the norms of two steps and this rank's parameters after them, by each `update`."""
    import torch.distributed as dist

    from roll_sft.engine import engine, optimizer

    def megatron_norm(chained: Any, _loss: Any = None) -> float:
        chained.prepare_grads()
        theirs = float(chained.get_grad_norm())
        assert gradient_norm(chained) == pytest.approx(theirs, rel=1e-6)
        return theirs

    def megatron_update(chained: Any, *, learning_rate: float, **_: Any) -> tuple[float, bool]:
        for group in chained.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
        _, norm, _ = chained.step()
        return float(norm), True

    gradient_norm, job, found = optimizer.gradient_norm, prepare_job(config), []
    for update in (optimizer.update, megatron_update):
        # Megatron's norm in both: a last bit of it would be one of every clipped gradient.
        with (
            patch.object(engine, "update", update),
            patch.object(optimizer, "gradient_norm", megatron_norm),
        ):
            trained = engine.Engine(config, source=job.source, data=job.data)
            data_rank, norms = job.layout.coordinate(dist.get_rank()).data_rank, []
            for step in (1, 2):
                work = job.planner.step(step).work_for(data_rank, learning_rate=1e-2)
                metrics = trained.train_step(work)
                norms += [] if metrics is None else [metrics.grad_norm]
        parameters = [each.detach() for chunk in trained.chunks for each in chunk.parameters()]
        found.append((norms, parameters))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05], ids=["free", "clipped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_is_megatrons_to_the_last_bit(
    layout: str, max_grad_norm: float, tmp_path: Path, pool: RankPool
) -> None:
    parity.write_model(tmp_path / "model", kind="qwen2-tied", num_layers=2)
    parity.write_rows(tmp_path / "rows.jsonl")
    config = parity.parity_config(
        tmp_path, parallel=LAYOUTS[layout], train={"max_grad_norm": max_grad_norm}
    )
    ranks = pool.run(ours_and_megatrons, layout_of(config.parallel), config)
    assert any(norms for (norms, _), _ in ranks)
    for (our_norms, ours), (their_norms, theirs) in ranks:
        assert our_norms == their_norms
        assert all(norm > 0.05 for norm in our_norms), "nothing was clipped"
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
