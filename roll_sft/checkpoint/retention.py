"""Deletes old checkpoints, and checks that the disk has room for new ones."""

import logging
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from roll_sft.base.errors import CheckpointError, ResourceError
from roll_sft.checkpoint.manifest import check_complete
from roll_sft.checkpoint.resume import LEFT_OVER, step_folders, step_of
from roll_sft.config.schema import CheckpointConfig, RunConfig
from roll_sft.models.shape import ModelShape

LOG = logging.getLogger(__name__)
GIB = 2**30


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


def check_room(
    config: RunConfig, shape: ModelShape, checkpoints: Path, *, first_step: int, total_steps: int
) -> None:
    """Raise `ResourceError` where the checkpoints of the rest of a run would not fit on the disk.

    Older ones in `checkpoints` make room when they are deleted, which is after the next one is
    whole. What `train.save_minutes` adds is looked at when it is due.
    """
    checkpoint, train = config.checkpoint, config.train
    if not checkpoint.save:
        return
    every = train.save_steps or total_steps
    coming = -(-total_steps // every) - first_step // every
    folder, size = checkpoints.parent, checkpoint_bytes(config, shape)
    there = [_bytes_in(each) for each in step_folders(checkpoints) if step_of(each) <= first_step]
    left_over = [each for pattern in LEFT_OVER for each in checkpoints.glob(pattern)]
    needed = _most_added(size, coming=coming, there=there, config=checkpoint)
    free = free_bytes(folder) + sum(map(_bytes_in, left_over))
    if needed > free:
        raise ResourceError(
            f"output_dir: {-(-needed // size)} more checkpoints of {size / GIB:.3g} GiB need"
            f" {needed / GIB:.3g} GiB at once, and {str(folder)!r} has {free / GIB:.3g} GiB free;"
            " make room, lower checkpoint.keep_last, raise train.save_steps, or choose another"
            " output_dir"
        )


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Size of a checkpoint's tensors: weights, and two fp32 moments; masters where not fp32."""
    weight, master = (2, 4) if config.model.dtype == "bf16" else (4, 0)
    optimizer = 8 + master if config.checkpoint.save_optimizer else 0
    return shape.num_parameters * (weight + optimizer)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where `folder` lies."""
    return shutil.disk_usage(folder).free


def _most_added(size: int, *, coming: int, there: list[int], config: CheckpointConfig) -> int:
    """The most bytes that `coming` checkpoints of `size` bytes add at any time.

    `there` are the sizes of those that lie there, oldest first.
    """
    if config.keep_last is None:
        return coming * size
    kept = config.keep_last + (1 if config.keep_best is not None else 0)
    queue, added, most = deque(there), 0, 0
    for _ in range(min(coming, len(there) + kept + 1)):  # from then on it repeats itself
        queue.append(size)
        added += size
        most = max(most, added)
        while len(queue) > kept:
            added -= queue.popleft()
    return most


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _delete(folder: Path) -> None:
    # Renamed first: a half deleted folder must never have the name of a step.
    doomed = folder.with_name(f".deleted_{folder.name}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        LOG.warning("could not delete old checkpoint %s (%s); continuing", folder, error)
