"""What the parity runs do not reach: uneven stages, idle ranks, evaluation, bf16."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.demo.demo import make_assets
from roll_sft.job.in_process import prepare_job
from roll_sft.run import compose
from tests import parity
from tests.pool import RankPool

ONE = {"num_workers": 1, "tensor_model_parallel_size": 1, "sequence_parallel": "false"}
PP2 = {"num_workers": 2, "pipeline_model_parallel_size": 2}
PP3 = {"num_workers": 3, "pipeline_model_parallel_size": 3}
DP2 = {"num_workers": 2}
TP2_PP2 = {**PP2, "num_workers": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    parity.write_model(root / "model", kind="qwen2-tied", num_layers=5)
    parity.write_rows(root / "rows.jsonl")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "global_batch_size"),
    [
        pytest.param(PP2, 7, id="five layers on two stages"),
        pytest.param(PP3, 7, id="five layers on three stages"),
        pytest.param(DP2, 1, id="a data rank without samples"),
        pytest.param({**PP2, "num_workers": 4}, 1, id="a pipeline without samples"),
        pytest.param({**DP2, "num_workers": 3}, 4, id="micro-batch counts differ"),
    ],
)
def test_gradients_equal_transformers_where_the_work_is_uneven(
    layout: dict[str, Any], global_batch_size: int, folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    config = parity.parity_config(
        folder,
        parallel={**layout, "use_distributed_optimizer": False},
        train={"global_batch_size": global_batch_size, "micro_batch_tokens": 200},
        data={"packing": False},
    )
    job = prepare_job(config)
    parity.write_reference_of(job, tmp_path / "reference")
    assert parity.compared(job, pool, tmp_path / "reference").first_difference is None


def evaluation_between_steps(config: RunConfig) -> tuple[Any, list[Any]]:
    """Metrics of an evaluation, and of step 2 with and without an evaluation before it."""
    import torch.distributed as dist

    from roll_sft.engine.engine import Engine

    job = prepare_job(config)
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    results, evaluation = [], None
    for evaluates in (False, True):
        engine = Engine(config, source=job.source, data=job.data)
        for step in (1, 2):
            if step == 2 and evaluates:
                (chunk,) = job.validation["held_out"].evaluation()
                evaluation = engine.evaluate("held_out", chunk.ranks[data_rank])
            work = job.planner.step(step).work_for(data_rank, learning_rate=1e-3)
            metrics = engine.train_step(work)
        if metrics is not None:
            results.append((metrics.loss_sum, metrics.grad_norm))
    return evaluation, results


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DP2, TP2_PP2], ids=["DP2", "TP2xPP2+SP"])
def test_an_evaluation_is_weighted_by_tokens_and_changes_nothing(
    layout: dict[str, Any], folder: Path, pool: RankPool, tmp_path: Path
) -> None:
    held_out = {"path": str(folder / "rows.jsonl"), "name": "held_out"}
    config = parity.parity_config(
        folder,
        parallel=layout,
        data={"validation": [held_out]},
        train={"global_batch_size": 24},
    )
    ranks = pool.run(evaluation_between_steps, layout_of(config.parallel), config)
    ((evaluation, (without, with_evaluation)),) = [rank for rank in ranks if rank[0] is not None]
    assert with_evaluation == without
    job = prepare_job(config)
    assert evaluation.supervised_tokens == int(job.data.train.supervised.sum())
    # Step 1's samples are all rows here, so its loss is that of the untrained model on them; the
    # evaluation comes one step later and must lie below it.
    before = parity.write_reference_of(job, tmp_path / "reference").loss
    assert evaluation.loss_sum / evaluation.supervised_tokens < before


def losses_in(dtype: str, config: RunConfig, pool: RankPool) -> list[float]:
    config = replace(config, model=replace(config.model, dtype=dtype))
    ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, None)
    (steps,) = [rank for rank in ranks if rank is not None]
    return [step["loss"] for step in steps]


def check_within_one_percent(config: RunConfig, pool: RankPool, *, steps: int) -> None:
    full, half = (losses_in(dtype, config, pool) for dtype in ("fp32", "bf16"))
    assert len(full) == len(half) == steps
    assert full != half
    worst = max(abs(b / a - 1) for a, b in zip(full, half, strict=True))
    assert worst < 0.01


@pytest.mark.slow
@pytest.mark.long
def test_bf16_stays_within_one_percent_of_fp32_over_twenty_steps_of_the_demo(
    pool: RankPool, tmp_path: Path
) -> None:
    make_assets(tmp_path)
    paths = [f"data.{kind}=[{{path: {tmp_path}/{kind}.jsonl}}]" for kind in ("train", "validation")]
    overrides = [f"model.path={tmp_path}/model", f"data.cache_dir={tmp_path}/cache"]
    for key, value in ONE.items():
        overrides.append(f"parallel.{key}={value}")
    composed = compose(["--config-name", "demo", *overrides, *paths, "train.max_steps=20"])
    assert composed is not None
    check_within_one_percent(composed[0], pool, steps=20)


@pytest.mark.slow
def test_bf16_stays_within_one_percent_of_fp32_on_a_larger_layout(
    folder: Path, pool: RankPool
) -> None:
    config = parity.parity_config(folder, parallel=TP2_PP2, train={"max_steps": 8})
    check_within_one_percent(config, pool, steps=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"num_workers": 2, "context_parallel_size": 2}, TP2_PP2],
    ids=["CP2", "TP2xPP2+SP"],
)
def test_recompute_and_deterministic_change_nothing_to_the_last_bit(
    layout: dict[str, Any], folder: Path, pool: RankPool
) -> None:
    def steps(recompute: str | list[str], deterministic: bool) -> list[dict[str, float]]:
        config = parity.parity_config(
            folder,
            parallel=layout,
            train={"recompute": recompute, "max_steps": 3},
            deterministic=deterministic,
        )
        ranks = pool.run(parity.engine_run, layout_of(config.parallel), config, None)
        (reported,) = [rank for rank in ranks if rank is not None]
        return reported

    plain = steps("none", False)
    assert steps("selective", False) == plain
    assert steps("full", True) == plain
    assert steps(["core_attn", "mlp"], False) == plain
    # Op by op a norm reads what enters it twice; the two gradients and the residual's are then
    # added in another order.
    for found, wanted in zip(steps(["mlp", "layernorm"], False), plain, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)


def test_norms_that_stand_behind_a_part_are_not_recomputed_in_silence(tmp_path: Path) -> None:
    parity.write_model(tmp_path / "model", kind="olmo2", num_layers=1)
    parity.write_rows(tmp_path / "rows.jsonl")
    config = parity.parity_config(tmp_path, train={"recompute": ["mlp", "layernorm"]})
    with pytest.raises(ConfigError, match=r"train\.recompute: layernorm "):
        prepare_job(config)


def test_stages_hold_every_layer_once_and_spare_the_ends() -> None:
    from roll_sft.engine.build import uneven_stages

    assert uneven_stages(8, 4) is None
    for num_layers, size in ((5, 2), (7, 3), (29, 4), (3, 2)):
        stages = uneven_stages(num_layers, size)
        assert stages is not None
        counts = [stage.count("decoder") for stage in stages]
        assert sum(counts) == num_layers
        assert max(counts) - min(counts) == 1
        assert counts[-1] == min(counts)  # the head is the heaviest end
        assert stages[0][0] == "embedding"
        assert stages[-1][-1] == "loss"
