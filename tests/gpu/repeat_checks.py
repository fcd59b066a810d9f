"""What `check.py` says of runs that must repeat themselves: the same run twice, and one resumed."""

from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from roll_sft.checkpoint.publish import publish_step
from roll_sft.config.schema import RunConfig
from roll_sft.engine.engine import Engine
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job
from tests import parity

BREAK = 4  # the step of the checkpoint


def check_repeats(
    device: str, folder: Path, *, backends: list[str]
) -> Iterator[tuple[str, float, float]]:
    """Steps that differ in loss or norm with `deterministic`, in bf16, with each kernel.

    `folder` holds what `check.write_inputs` writes.
    """
    for name in backends:
        config = parity.parity_config(
            folder,
            deterministic=True,
            model={"dtype": "bf16", "attention_backend": name},
            parallel={"device": device},
        )
        first, second = (parity.engine_run(config, None) or [] for _ in range(2))
        yield f"steps that a second run changes, {name}", _different(first, second), 0
        resumed = _interrupted(config, folder / f"resumed_{name}")
        yield f"steps that a resume changes, {name}", _different(first, resumed), 0


def _different(first: list[dict[str, float]], second: list[dict[str, float]]) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


def _interrupted(config: RunConfig, checkpoints: Path) -> list[dict[str, float]]:
    """The metrics of a run that is saved after step `BREAK` and goes on in another engine."""
    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    steps = [_step(engine, job, step) for step in range(1, BREAK + 1)]
    staging = checkpoints / f".staging_{BREAK:08d}"
    staging.mkdir(parents=True)
    engine.save(staging)
    checkpoint = publish_step(
        job.state, job.planner.step(BREAK), staging=staging, save_assets=job.save_assets
    )
    engine = Engine(config, source=job.source, data=job.data, checkpoint=checkpoint)
    return steps + [_step(engine, job, step) for step in range(BREAK + 1, job.total_steps + 1)]


def _step(engine: Engine, job: Job, step: int) -> dict[str, float]:
    data_rank = job.layout.coordinate(dist.get_rank()).data_rank
    work = job.planner.step(step).work_for(data_rank, learning_rate=job.schedule.at(step))
    metrics = engine.train_step(work)
    assert metrics is not None, "one rank reports"
    loss = metrics.loss_sum / metrics.supervised_tokens
    return {"loss": loss, "grad_norm": metrics.grad_norm}
