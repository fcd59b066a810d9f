"""Within a step nothing of ours asks the device for a value; its end reads loss and norm."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity, waits
from tests.pool import RankPool

ALONE = {"num_workers": 1}
FOUR = {"num_workers": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
LAYOUTS = {
    "1": ALONE,
    "TP2xCP2+SP": {**FOUR, "context_parallel_size": 2},
    "PP2": {"num_workers": 2, "pipeline_model_parallel_size": 2},
    "TP2xPP2x2+SP": {**FOUR, **PIPELINE},
}


def waits_of_step_2(config: RunConfig, is_curious: bool) -> list[waits.Wait]:
    """What would wait for a device, in a step whose batches are there. In a pool."""
    import torch.distributed as dist

    from roll_sft.engine import loss
    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    plan, following = job.planner.step(1), job.planner.step(2)
    engine.train_step(plan.work_for(data_rank, learning_rate=1e-4, following=following))
    second = following.work_for(data_rank, learning_rate=1e-4)
    head = _curious(loss.cross_entropy_of_rows) if is_curious else loss.cross_entropy_of_rows
    with patch.object(loss, "cross_entropy_of_rows", head), waits.recorded("cpu") as found:
        engine.train_step(second)
    return found


def _curious(original: Any) -> Any:
    """The head, which looks at its labels, and at its gradient when that comes."""

    def looks(hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
        if (labels < 0).any():
            raise AssertionError("a label below 0")
        hidden.register_hook(keeps_finite)
        return original(hidden, weight, labels, **options)

    def keeps_finite(gradient: Any) -> Any:
        return gradient[gradient.isfinite()].view_as(gradient)

    return looks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("waits")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=4)
    parity.write_rows(root / "rows.jsonl")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_within_a_step_nothing_of_ours_waits(layout: str, folder: Path, pool: RankPool) -> None:
    config = parity.parity_config(folder, parallel=LAYOUTS[layout])
    ranks = pool.run(waits_of_step_2, layout_of(config.parallel), config, False)
    for rank in ranks:
        ours = [wait for wait in rank if wait.is_ours]
        assert [str(wait) for wait in ours if not wait.is_end_of_step] == []
        assert any(wait.function == "read" for wait in ours)
        # Megatron waits for the whole device where packs of unequal length send their shapes ahead,
        # and at no other exchange.
        whole = {wait.function for wait in rank if wait.what == "synchronize"}
        assert whole <= {"_communicate_shapes"}


@pytest.mark.slow
def test_a_wait_is_seen_in_the_forward_and_in_the_backward(folder: Path, pool: RankPool) -> None:
    config = parity.parity_config(folder, parallel=ALONE)
    (found,) = pool.run(waits_of_step_2, layout_of(config.parallel), config, True)
    ours = {(wait.what, wait.function) for wait in found if wait.is_ours}
    assert ("__bool__", "looks") in ours
    assert ("index", "keeps_finite") in ours
    # Once each: is there a label (Megatron's; not asked from 0.19 on), and the norm.
    reads = [wait.function for wait in found if wait.what == "_local_scalar_dense"]
    assert reads.count("finalize_model_grads") <= 1
    assert reads.count("gradient_norm") == 1
    assert "local_multi_tensor_l2_norm" not in reads
