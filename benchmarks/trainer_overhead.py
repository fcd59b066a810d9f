"""What our step costs over a bare Megatron-Core loop on the same micro-batches.

    python benchmarks/trainer_overhead.py

One rank. The bare loop calls Megatron's schedule and optimizer on packed tensors that were built
beforehand, and nothing else: no batch is built, no metric is made, no loss is reduced. Ours is
`Engine.train_step`, from the plan's indices to the step's metrics. Both run the same model, the
same optimizer and the same packs of the demo's data, so what differs is what we add. CPU time;
blocks of steps are interleaved, `ratio` is the median of the pairs, `low` and `high` the extremes.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared import measures

from roll_sft.demo.demo import make_assets
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job
from roll_sft.run import compose

PAIRS, STEPS = measures.pairs(7), measures.size(12, quick=4)
GOAL = 1.01


def main() -> None:
    """Measures and prints one JSON line."""
    with tempfile.TemporaryDirectory() as folder, _engine(Path(folder)) as (engine, job):
        ours, bare = our_steps(engine, job, STEPS), bare_steps(engine, job, STEPS)
        ours()
        bare()
        ratios = []
        for pair in range(PAIRS):
            # Each is first in turn, so that what warms up or drifts meets both.
            first, second = (ours, bare) if pair % 2 else (bare, ours)
            seconds = {first: _cpu_seconds(first), second: _cpu_seconds(second)}
            ratios.append(seconds[ours] / seconds[bare])
        bare_step_s = seconds[bare] / STEPS
    measures.show(
        "trainer_overhead",
        ratios,
        goal=f"<= {GOAL}",
        denominator="Megatron's schedule and optimizer on the same packs, built beforehand",
        packages=("torch", "megatron-core"),
        bare_step_ms=round(1e3 * bare_step_s, 1),
    )


def our_steps(engine: Any, job: Job, num_steps: int) -> Callable[[], None]:
    """A function that makes the first steps of the run."""
    plans = [job.planner.step(step) for step in range(1, num_steps + 1)]
    works = [
        plan.work_for(0, learning_rate=1e-4, following=following)
        for plan, following in zip(plans, [*plans[1:], plans[0]], strict=True)
    ]

    def run() -> None:
        for work in works:
            engine.train_step(work)

    return run


def bare_steps(engine: Any, job: Job, num_steps: int) -> Callable[[], None]:
    """A function that makes the same steps by Megatron's schedule and optimizer alone."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from roll_sft.engine.optimizer import update

    forward_backward = get_forward_backward_func()
    batches = [_tensors(engine, job, step) for step in range(1, num_steps + 1)]

    def forward_step(iterator: Iterator[Any], model: Any) -> Any:
        inputs, options, count = next(iterator)
        with torch._C.DisableTorchFunction():  # as ours; see `Engine._forward_step`
            rows = model(*inputs, **options)

        def loss(rows: torch.Tensor) -> Any:
            total = rows.sum()
            return total, count, total.detach()

        return rows, loss

    def run() -> None:
        for packs in batches:
            for chunk in engine._wrapped:
                chunk.zero_grad_buffer()
            engine.optimizer.zero_grad()
            forward_backward(
                forward_step_func=forward_step,
                data_iterator=[iter(packs)],
                model=engine._wrapped,
                num_microbatches=len(packs),
                seq_length=1,
                micro_batch_size=1,
                forward_only=False,
            )
            update(engine.optimizer, learning_rate=1e-4)

    return run


def _tensors(engine: Any, job: Job, step: int) -> list[Any]:
    """The packs of a step as the model takes them: inputs, options, number of labels."""
    from roll_sft.engine.attention import describe_pack
    from roll_sft.engine.loss import loss_arguments

    packs = []
    for batch in engine.build(job.data.train, job.planner.step(step).ranks[0]):
        pack = batch.pack
        packed = describe_pack(batch.segments, pack.positions_T, frequencies=engine.frequencies)
        options = {"packed_seq_params": packed, **loss_arguments(batch.rows)}
        if engine._experts is not None:
            options |= engine._experts.arguments(batch, engine.chunks[0])
        count = torch.tensor(pack.num_supervised, dtype=torch.int)
        packs.append(((pack.tokens_T, pack.positions_T, None), options, count))
    return packs


def _cpu_seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


@contextmanager
def _engine(folder: Path) -> Iterator[tuple[Any, Job]]:
    """The engine of the demo's run on one rank."""
    make_assets(folder)
    composed = compose(
        [
            "--config-name=demo",
            f"model.path={folder}/model",
            f"data.train=[{{path: {folder}/train.jsonl}}]",
            "data.validation=[]",
            f"data.cache_dir={folder}/cache",
            "parallel.num_workers=1",
            "parallel.tensor_model_parallel_size=1",
            "parallel.sequence_parallel=false",
        ]
    )
    assert composed is not None
    job = prepare_job(composed[0])
    from roll_sft.engine.engine import Engine
    from roll_sft.engine.process_groups import Rendezvous, process_groups

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 1)
    rendezvous = Rendezvous(0, 0, 1, 60.0, 60.0)
    with process_groups(rendezvous, job.layout, device="cpu", store=store):
        yield Engine(job.config, source=job.source, data=job.data), job


if __name__ == "__main__":
    main()
