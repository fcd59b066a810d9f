"""`roll-sft rehearse`: faults in tiny runs on the layout of a configuration, on this machine.

The table says what a user wants to know beforehand: how soon a fault is found, when the run is back
at work, how many steps are computed again, and whether the losses are the same to the last bit.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from roll_sft.base.console import stdout_console
from roll_sft.base.errors import WorkerError
from roll_sft.config.schema import ParallelConfig, RunConfig
from roll_sft.job.layouts import DEGREES
from roll_sft.models.files.model_folder import local_model
from roll_sft.rehearsal import tiny
from roll_sft.rehearsal.faults import (
    EVAL_STEPS,
    SAVE_STEPS,
    STEPS,
    Outcome,
    RehearsalError,
    Runs,
    faults_for,
)

LOG = logging.getLogger(__name__)
BATCH = 4  # samples of a step
DEADLINE_S = 20.0  # of a step and of a save, so that a rank that is stopped is found soon
COLUMNS = ("fault", "detected after", "back at work after", "steps lost", "same losses")


def run(config: RunConfig) -> None:
    """Rehearse all faults and print the table. Raises `WorkerError` where a row does not hold."""
    device = tiny.device_here(config)
    most = tiny.most_ranks(device)
    parallel = tiny.layout_for(config.parallel, most=most, device=device)
    if parallel.num_workers > most:
        LOG.info("%d ranks on a machine for %d", parallel.num_workers, most)
    folder = Path(tempfile.mkdtemp(prefix="rehearsal_"))
    try:
        outcomes = _rehearse(config, folder, parallel)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _show(outcomes, title=_title(config.parallel, parallel))
    wrong = [f"{title}: {each.problem}" for title, each in outcomes.items() if each.problem]
    if wrong:
        raise WorkerError(f"rehearsal: {wrong[0]}; {len(wrong)} rows failed, logs are in {folder}")
    shutil.rmtree(folder, ignore_errors=True)


def _rehearse(config: RunConfig, folder: Path, parallel: ParallelConfig) -> dict[str, Outcome]:
    # A cluster of its own for each run, and no tracker of the user's.
    os.environ.pop("RAY_ADDRESS", None)
    assert config.model.path is not None, "check_config refuses a missing model.path"
    path, _ = local_model(config.model.path, with_weights=False)
    overrides = [*tiny.write_model(folder, Path(path), parallel), *_keys(config, parallel)]
    runs = Runs(folder, [f"data.cache_dir={folder / 'cache'}", *overrides])
    outcomes: dict[str, Outcome] = {}
    LOG.info("rehearsing on %d ranks, beginning with a run without a fault", parallel.num_workers)
    try:
        runs.undisturbed()
    except RehearsalError as error:
        raise WorkerError(f"rehearsal: the run without a fault fails: {error}") from None
    faults = [*faults_for(parallel.num_workers - 1)]
    for number, fault in enumerate(faults, 1):
        LOG.info("%d of %d: %s", number, len(faults), fault.title)
        outcomes[fault.title] = runs.rehearsed(f"fault_{number}", fault)
    return outcomes


def _keys(config: RunConfig, parallel: ParallelConfig) -> list[str]:
    """Overrides: the layout, and what of the configuration decides how a run is kept."""
    names = (*DEGREES, "use_distributed_optimizer")
    layout = [f"parallel.{name}={_written(getattr(parallel, name))}" for name in names]
    return [
        *layout,
        f"model.dtype={config.model.dtype}",
        f"deterministic={_written(parallel.device == 'cuda')}",
        f"checkpoint.async_save={_written(config.checkpoint.async_save)}",
        f"checkpoint.verify={_written(config.checkpoint.verify)}",
        "checkpoint.hf_export=none",
        "tracking.backends=[jsonl]",
        f"train.global_batch_size={BATCH}",
        f"train.max_steps={STEPS}",
        f"train.save_steps={SAVE_STEPS}",
        f"train.eval_steps={EVAL_STEPS}",
        "train.learning_rate=1e-3",
        f"cluster.step_timeout_s={DEADLINE_S}",
        f"cluster.checkpoint_timeout_s={DEADLINE_S}",
    ]


def _written(value: object) -> str:
    return "null" if value is None else str(value).lower()


def _title(wanted: ParallelConfig, parallel: ParallelConfig) -> str:
    def degrees(each: ParallelConfig) -> str:
        return (
            f"TP{each.tensor_model_parallel_size} PP{each.pipeline_model_parallel_size}"
            f" CP{each.context_parallel_size} EP{each.expert_model_parallel_size}"
        )

    ranks = f"{parallel.num_workers} ranks on {parallel.device}, {degrees(parallel)}"
    smaller = "" if degrees(wanted) == degrees(parallel) else f", in place of {degrees(wanted)}"
    return f"Rehearsal: {ranks}{smaller}"


def _show(outcomes: Mapping[str, Outcome], *, title: str) -> None:
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column)
    for fault, outcome in outcomes.items():
        if outcome.problem:
            table.add_row(fault, "-", "-", "-", f"FAILED: {outcome.problem}")
            continue
        seconds = [f"{each:.1f} s" for each in (outcome.detected_s, outcome.back_s)]
        table.add_row(fault, *seconds, str(outcome.steps_lost), "yes")
    stdout_console().print(table)
