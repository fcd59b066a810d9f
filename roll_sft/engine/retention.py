"""Which checkpoints are kept, and whether there is room for them."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from roll_sft.config import CheckpointConfig
from roll_sft.engine.preflight import Plan
from roll_sft.engine.publish import check_complete
from roll_sft.engine.resume import step_folders
from roll_sft.errors import CheckpointError, ResourceError

LOG = logging.getLogger(__name__)
GIB = 2**30


def retain(checkpoints: Path, config: CheckpointConfig, *, losses: Mapping[int, float]) -> None:
    """Delete what `keep_last` and `keep_best` do not keep.

    `losses` are those of the set that `keep_best` names, by step. Nothing is deleted unless the
    newest is whole; a folder that cannot be deleted is named and costs nothing but its room.
    """
    folders = step_folders(checkpoints)
    if config.keep_last is None or len(folders) <= config.keep_last:
        return
    try:
        check_complete(folders[-1])
    except CheckpointError as error:
        LOG.error("no checkpoint is deleted: %s", error)
        return
    steps = {int(path.name.removeprefix("step_")): path for path in folders}
    kept = set(folders[-config.keep_last :])
    known = [step for step in steps if step in losses]
    if config.keep_best is not None and known:
        kept.add(steps[min(known, key=lambda step: (losses[step], step))])
    for folder in folders:
        if folder not in kept:
            _delete(folder)


def check_room(plan: Plan, folder: Path, *, first_step: int) -> None:
    """Raise `ResourceError` where the checkpoints of the rest of a run would not fit on the disk.

    One more than are kept exists while a new one is written.
    """
    checkpoint, train = plan.config.checkpoint, plan.config.train
    if not checkpoint.save:
        return
    every = train.save_steps or plan.total_steps
    coming = -(-plan.total_steps // every) - first_step // every
    number = coming if checkpoint.keep_last is None else min(coming, checkpoint.keep_last + 1)
    size, free = checkpoint_bytes(plan), shutil.disk_usage(folder).free
    if number * size > free:
        raise ResourceError(
            f"output_dir: {number} checkpoints of {size / GIB:.3g} GiB need"
            f" {number * size / GIB:.3g} GiB, and {str(folder)!r} has {free / GIB:.3g} GiB free;"
            " make room, set checkpoint.keep_last, raise train.save_steps, or choose another"
            " output_dir"
        )


def checkpoint_bytes(plan: Plan) -> int:
    """Size of a checkpoint's tensors: weights, and two fp32 moments; masters where not fp32."""
    weight, master = (2, 4) if plan.config.model.dtype == "bf16" else (4, 0)
    optimizer = 8 + master if plan.config.checkpoint.save_optimizer else 0
    return plan.shape.num_parameters * (weight + optimizer)


def _delete(folder: Path) -> None:
    # Renamed first, so that what is half deleted never has a step's name.
    doomed = folder.with_name(f".deleted_{folder.name}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        LOG.warning("%s cannot be deleted (%s); it is in nobody's way", folder, error)
