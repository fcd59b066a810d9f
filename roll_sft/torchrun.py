"""A door without Ray: `torchrun --nproc-per-node N -m roll_sft.torchrun --config run.yaml`.

For debugging one rank at a time and for machines with GPUs and little else: needs torch,
megatron-core, transformers and safetensors. `run.yaml` is a whole configuration, as
`python -m roll_sft.run ... --cfg job --resolve` prints it; `parallel.num_workers` follows torchrun.
It trains and prints one line for each step; it writes no folder but the one of `--save`.
"""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import yaml

from roll_sft.base.errors import CheckpointError, ConfigError, DivergedError, report
from roll_sft.base.files import writing
from roll_sft.checkpoint.manifest import check_complete
from roll_sft.checkpoint.publish import publish_step, staging_folder
from roll_sft.checkpoint.resume import start_from
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.config.validate import check_config
from roll_sft.engine.environment import set_variables, silence_warnings
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job

if TYPE_CHECKING:
    from roll_sft.engine.engine import Engine


def main(arguments: list[str] | None = None) -> int:
    """The command line of one rank; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a whole configuration, YAML")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--load", type=Path, help="go on from this step folder")
    parser.add_argument("--save", type=Path, help="write a checkpoint into this folder at the end")
    options = parser.parse_args(arguments)
    silence_warnings()
    try:
        config = _config(options.config)
        check_config(config)
        set_variables(deterministic=config.deterministic)
        job = prepare_job(config)
        first, last = steps_to_make(job, steps=options.steps, loads=options.load)
        if options.save is not None:
            _check_free(options.save / f"step_{last:08d}")
        _run(job, range(first, last + 1), loads=options.load, saves=options.save)
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        return report(error)
    return 0


def _config(path: Path) -> RunConfig:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = build_config({key: value for key, value in values.items() if key != "hydra"})
    world_size = int(os.environ["WORLD_SIZE"])
    parallel = dataclasses.replace(config.parallel, num_workers=world_size)
    return dataclasses.replace(config, parallel=parallel)


def steps_to_make(job: Job, *, steps: int | None, loads: Path | None) -> tuple[int, int]:
    """The first step to make and the last, as `--steps` counts them: from the run's beginning.

    Raises `ConfigError` for a count that the checkpoint to load is past, or another run's.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps: {steps} must be at least 1")
    last = min(steps or job.total_steps, job.total_steps)
    if loads is None:
        return 1, last
    check_complete(loads)
    done = start_from(loads, job.state, allowed=job.config.checkpoint.allow_changes).step
    if last < done:
        raise ConfigError(
            f"--steps: {last} steps are fewer than the {done} of --load {loads}, and a step is not"
            f" taken back; give at least {done}, or an earlier checkpoint"
        )
    return done + 1, last


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise CheckpointError(f"--save: {folder} is there already; give another folder")


def _run(job: Job, steps: range, *, loads: Path | None, saves: Path | None) -> None:
    # These import Megatron-Core, which warns while it is imported.
    from roll_sft.engine.engine import Engine
    from roll_sft.engine.process_groups import Rendezvous, process_groups

    cluster, parallel = job.config.cluster, job.config.parallel
    store, rank, world_size = next(dist.rendezvous("env://"))
    rendezvous = Rendezvous(
        port=0,
        rank=rank,
        world_size=world_size,
        setup_timeout_s=cluster.setup_timeout_s,
        collective_timeout_s=max(cluster.step_timeout_s, cluster.checkpoint_timeout_s),
        local_device=int(os.environ["LOCAL_RANK"]),
    )
    torch.set_num_threads(parallel.cpus_per_worker)
    layout = layout_of(parallel)
    with process_groups(rendezvous, layout, device=parallel.device, store=store):
        if parallel.device == "cuda":
            from roll_sft.job.memory import warn_of_memory

            warn_of_memory(job.config, job.source.shape, torch.cuda.mem_get_info()[0] / 2**30)
        engine = Engine(job.config, source=job.source, data=job.data, checkpoint=loads)
        data_rank = layout.coordinate(rank).data_rank
        last = steps.stop - 1
        for step in steps:
            plan = job.planner.step(step)
            metrics = engine.train_step(
                plan.work_for(data_rank, learning_rate=job.schedule.at(step))
            )
            if metrics is not None:
                loss = metrics.loss_sum / metrics.supervised_tokens
                speed = plan.total_tokens / metrics.step_time_s / world_size
                sys.stdout.write(
                    f"step {step}/{last}  loss {loss:.6f}  grad {metrics.grad_norm:.6f}"
                    f"  {speed:,.0f} tok/s/device  {metrics.peak_memory_gib:.2f} GiB\n"
                )
                sys.stdout.flush()
                if not (math.isfinite(loss) and math.isfinite(metrics.grad_norm)):
                    raise DivergedError(
                        f"step {step}: loss and grad must be finite; lower the rate"
                    )
        if saves is not None:
            _save(job, engine, checkpoints=saves, step=last)


def _save(job: Job, engine: "Engine", *, checkpoints: Path, step: int) -> None:
    """Rank 0 makes and publishes the folder that all ranks write into."""
    staging = checkpoints / f".staging_{step:08d}"
    if dist.get_rank() == 0:
        with writing(checkpoints, CheckpointError):
            staging_folder(checkpoints, step)
    dist.barrier()
    engine.save(staging)
    dist.barrier()
    if dist.get_rank() == 0:
        with writing(checkpoints, CheckpointError):
            publish_step(
                job.state, job.planner.step(step), staging=staging, save_assets=job.save_assets
            )


if __name__ == "__main__":
    sys.exit(main())
