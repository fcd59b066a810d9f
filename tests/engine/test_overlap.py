"""Exchanges that overlap with computation change no number: training, evaluation, checkpoints."""

import operator
from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.config.schema import ParallelConfig, RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.engine.test_parity import LAYOUTS
from tests.pool import RankPool

BOTH = {"overlap_grad_reduce": True, "overlap_param_gather": True}
PP2X2_DP2 = {
    "num_workers": 4,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
}
REPLICATED: dict[str, dict[str, Any]] = {
    **{name: LAYOUTS[name] for name in ("DP2", "CP2", "PP2xDP2", "TP2xCP2+SP")},
    "PP2x2xDP2": PP2X2_DP2,
}


def run(config: RunConfig, checkpoint: Path) -> dict[str, Any]:
    """Three steps, with an evaluation behind the second and what is saved at the end. In a pool."""
    import torch.distributed as dist

    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    with parity.small_buckets():
        engine = Engine(config, source=job.source, data=job.data)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    numbers, evaluated = [], []
    for step in (1, 2, 3):
        work = job.planner.step(step).work_for(data_rank, learning_rate=1e-3)
        metrics = engine.train_step(work)
        if metrics is not None:
            numbers.append((metrics.loss_sum, metrics.grad_norm))
        if step == 2:
            engine.forward(engine.build(job.data.train, work.micro_batches))
            evaluated = [rows.clone() for rows in engine.row_losses]
    engine.save(checkpoint)
    return {
        "numbers": numbers,
        "evaluated": evaluated,
        "saved": [
            (each.key, each.shape, each.offset, each.tensor.numpy().copy())
            for each in engine._state()[0].written()
        ],
        "buckets": [len(chunk.bucket_groups) for chunk in engine._wrapped],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlap")
    for kind in ("qwen2", "qwen2-tied"):
        (root / kind).mkdir()
        parity.write_model(root / kind / "model", kind=kind)
        parity.write_rows(root / kind / "rows.jsonl")
    return root


def test_exchanges_overlap_by_default_where_gpus_hold_replicas() -> None:
    from roll_sft.engine.build import overlaps

    two = {"num_workers": 2, "device": "cuda"}
    assert overlaps(ParallelConfig(**two)) == (True, True)
    assert overlaps(ParallelConfig(**two, context_parallel_size=2)) == (True, True)
    assert overlaps(ParallelConfig(**two, tensor_model_parallel_size=2)) == (False, False)
    assert overlaps(ParallelConfig(**two, use_distributed_optimizer=False)) == (True, False)
    assert overlaps(ParallelConfig(**two, overlap_grad_reduce=False)) == (False, False)
    assert overlaps(ParallelConfig(num_workers=2, device="cpu")) == (False, False)
    assert overlaps(ParallelConfig(device="cpu", overlap_param_gather=True)) == (True, True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", REPLICATED)
@pytest.mark.parametrize("kind", ["qwen2", "qwen2-tied"])
def test_a_run_is_the_same_where_exchanges_overlap(
    kind: str, layout: str, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    def ranks(**options: bool) -> list[dict[str, Any]]:
        parallel = {**REPLICATED[layout], **options}
        config = parity.parity_config(folder / kind, parallel=parallel)
        checkpoint = tmp_path / str(options)
        checkpoint.mkdir()
        return pool.run(run, layout_of(config.parallel), config, checkpoint)

    plain, ours = ranks(), ranks(**BOTH)
    assert max(ours[0]["buckets"]) > 2  # of the first stage
    for found, wanted in zip(ours, plain, strict=True):
        for mine, theirs in zip(found["numbers"], wanted["numbers"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)
        for mine, theirs in zip(found["evaluated"], wanted["evaluated"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    saved, expected = (whole(each) for each in (ours, plain))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        # Buckets cut the norm's sum elsewhere, which moves its last bits, and Adam's with them.
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def whole(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The tensors of the state, put together of what each rank saves."""
    found: dict[str, torch.Tensor] = {}
    for key, shape, offset, part in (piece for rank in ranks for piece in rank["saved"]):
        tensor = found.setdefault(key, torch.full(shape, torch.nan))
        target = tensor[tuple(map(slice, offset, map(operator.add, offset, part.shape)))]
        target.copy_(torch.from_numpy(part[tuple(map(slice, target.shape))]))  # without padding
    return found
