"""Packs of one length under pipeline parallelism: the same numbers, and no shape is exchanged."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from roll_sft.checkpoint.publish import publish_step, staging_folder
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.job.in_process import prepare_job
from roll_sft.parity.measurement import RankParity
from roll_sft.parity.oracle import read_facts
from roll_sft.parity.verdict import judge
from tests import parity
from tests.pool import RankPool

pytestmark = pytest.mark.slow

PP2 = {"num_workers": 2, "pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"num_workers": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "PP2": PP2,
    "PP2x2": VPP2,
    "CP2xPP2": {**PP2, "num_workers": 4, "context_parallel_size": 2},
    "TP2xPP2x2+SP": {**VPP2, **TP2},
}
RESUMED = ("PP2", "PP2x2")
ALWAYS, NEVER = 1e9, -1.0  # of the step's tokens, as padding
STEPS, HALF = 4, 2


def steps_of(
    config: RunConfig, most_filling: float, loads: Path | None, saves: Path | None
) -> tuple[list[Any], int, list[set[int]]]:
    """Metrics of the steps, how often shapes were exchanged, lengths of packs. In a pool."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from roll_sft.data.steps import packing
    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    exchange, num_exchanges = P2PCommunicator._communicate_shapes, 0

    def counted(*args: Any) -> Any:
        nonlocal num_exchanges
        num_exchanges += 1
        return exchange(*args)

    steps, lengths = [], []
    with (
        patch.object(packing, "_MAX_FILLING", most_filling),
        patch.object(P2PCommunicator, "_communicate_shapes", counted),
    ):
        engine = Engine(config, source=job.source, data=job.data, checkpoint=loads)
        for step in range(1 if loads is None else HALF + 1, job.total_steps + 1):
            work = job.planner.step(step).work_for(data_rank, learning_rate=job.schedule.at(step))
            batches = engine.build(job.data.train, work.micro_batches)
            lengths.append({batch.pack.tokens_T.shape[1] for batch in batches})
            metrics = engine.train_step(work)
            if metrics is not None:
                assert metrics.supervised_tokens == work.supervised_tokens
                steps.append((metrics.loss_sum, metrics.grad_norm, metrics.supervised_tokens))
            if saves is not None and step == HALF:
                engine.save(saves)
    return steps, num_exchanges, lengths


def measured(config: RunConfig, reference: Path) -> RankParity:
    """This rank's errors over step 1 in packs of one length. In a pool."""
    from roll_sft.data.steps import packing

    with patch.object(packing, "_MAX_FILLING", ALWAYS):
        return parity.measure(config, reference)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("even_packs")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=4)
    parity.write_rows(root / "rows.jsonl")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packs_of_one_length_give_the_same_numbers_without_an_exchange_of_shapes(
    layout: str, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    # A sample each: lengths far apart, and, where stages are interleaved, an empty one.
    config = parity.parity_config(
        folder,
        parallel=LAYOUTS[layout],
        data={"packing": False},
        train={"max_steps": STEPS if layout in RESUMED else 1},
    )

    def run(
        most_filling: float, loads: Path | None = None, saves: Path | None = None
    ) -> tuple[list[Any], list[int], list[list[set[int]]]]:
        ranks = pool.run(steps_of, layout_of(config.parallel), config, most_filling, loads, saves)
        (steps,) = [steps for steps, _, _ in ranks if steps]
        return steps, [count for _, count, _ in ranks], [lengths for _, _, lengths in ranks]

    wanted, exchanges, lengths = run(NEVER)
    assert min(exchanges) > 0
    assert all(len(step) > 1 for rank in lengths for step in rank)
    staging = staging_folder(tmp_path, HALF)
    found, exchanges, lengths = run(ALWAYS, saves=staging)
    assert max(exchanges) == 0
    assert all(len(step) == 1 for rank in lengths for step in rank)
    for (loss, norm, tokens), (wanted_loss, wanted_norm, wanted_tokens) in zip(
        found, wanted, strict=True
    ):
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
        assert tokens == wanted_tokens
    if layout not in RESUMED:
        return
    job = prepare_job(config)
    rest, _, _ = run(
        ALWAYS,
        loads=publish_step(
            job.state, job.planner.step(HALF), staging=staging, save_assets=job.save_assets
        ),
    )
    assert rest == found[HALF:]


def test_outputs_losses_and_gradients_of_filled_packs_equal_those_of_transformers(
    folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    options = {**LAYOUTS["CP2xPP2"], "use_distributed_optimizer": False}
    job = prepare_job(parity.parity_config(folder, parallel=options, data={"packing": False}))
    parity.write_reference_of(job, tmp_path / "reference")
    ranks = pool.run(measured, job.layout, job.config, tmp_path / "reference")
    verdict = judge(
        ranks, read_facts(tmp_path / "reference"), source=job.source, dtype=job.config.model.dtype
    )
    assert verdict.first_difference is None
