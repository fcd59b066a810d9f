"""Ends a run whose validation loss improves no more.

The decision follows from the lines of `eval.jsonl` alone, so a run that resumes decides as one that
was not interrupted. As Keras and Lightning define it: an evaluation improves if its loss is below
the best so far by more than `min_delta`; after `patience` evaluations that do not, the run ends.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from roll_sft.checkpoint.resume import step_folders, step_of
from roll_sft.config.schema import RunConfig
from roll_sft.training import run_folder
from roll_sft.training.evaluations import losses_of

LOG = logging.getLogger(__name__)


def is_stopped(config: RunConfig, folder: Path, *, step: int) -> bool:
    """Whether the run in `folder` ends after `step`; logs why."""
    reason = why_stopped(config, folder, step=step)
    if reason is not None:
        LOG.info("%s", reason)
    return reason is not None


def why_stopped(config: RunConfig, folder: Path, *, step: int) -> str | None:
    """Why the run in `folder` ends after `step`; None if it goes on."""
    losses = losses_of(folder, config.train.early_stopping)
    known = {each: loss for each, loss in losses.items() if each <= step}
    patience, min_delta = (
        config.train.early_stopping_patience,
        config.train.early_stopping_min_delta,
    )
    best_step, waited = last_improvement(known, min_delta=min_delta)
    if waited < patience:
        return None
    return (
        f"early stopping after step {step}: {waited} evaluations without a loss of"
        f" {config.train.early_stopping} below {known[best_step]:.6g}, of step {best_step}, by more"
        f" than {min_delta:g}"
    )


def last_improvement(losses: Mapping[int, float], *, min_delta: float) -> tuple[int, int]:
    """The step of the last improvement in `losses` by step, and the evaluations since."""
    best, best_step, waited = math.inf, 0, 0
    for step in sorted(losses):
        if losses[step] < best - min_delta:
            best, best_step, waited = losses[step], step, 0
        else:
            waited += 1
    return best_step, waited


def checkpoint_to_export(config: RunConfig, folder: Path) -> Path | None:
    """The checkpoint of the lowest loss, if the run keeps it; None: the last one.

    That loss is of the set that `train.early_stopping` names.
    """
    name = config.train.early_stopping
    if name is None or config.checkpoint.keep_best != name:
        return None
    losses = losses_of(folder, name)
    folders = step_folders(folder / run_folder.CHECKPOINTS)
    known = [each for each in folders if step_of(each) in losses]
    return min(known, key=lambda each: (losses[step_of(each)], step_of(each)), default=None)
