"""Deletes the checkpoints that `checkpoint.keep_last` and `checkpoint.keep_best` do not keep."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.manifest import check_complete
from roll_sft.checkpoint.resume import step_folders, step_of
from roll_sft.config.schema import CheckpointConfig

LOG = logging.getLogger(__name__)


def retain(checkpoints: Path, config: CheckpointConfig, *, losses: Mapping[int, float]) -> None:
    """Delete the checkpoints that `keep_last` and `keep_best` do not keep.

    `losses` are those of the set that `keep_best` names, by step. Nothing is deleted unless the
    newest is whole; a folder that cannot be deleted is logged and left.
    """
    folders = step_folders(checkpoints)
    if config.keep_last is None or len(folders) <= config.keep_last:
        return
    try:
        check_complete(folders[-1])
    except CheckpointError as error:
        LOG.error("no checkpoint is deleted: %s", error)
        return
    steps = {step_of(path): path for path in folders}
    kept = set(folders[-config.keep_last :])
    known = [step for step in steps if step in losses]
    if config.keep_best is not None and known:
        kept.add(steps[min(known, key=lambda step: (losses[step], step))])
    for folder in folders:
        if folder not in kept:
            _delete(folder)


def _delete(folder: Path) -> None:
    # Renamed first: a half deleted folder must never have the name of a step.
    doomed = folder.with_name(f".deleted_{folder.name}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        LOG.warning("could not delete old checkpoint %s (%s); continuing", folder, error)
