"""Which checkpoint a run goes on from, and whether it may.

Imports no Megatron and starts nothing. Promises: a folder whose files are not those of its manifest
is never chosen; one that is damaged is named and passed over, never deleted; a run with checkpoints
begins at step 0 only in another folder.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from roll_sft.base.files import set_aside, write_durably, writing
from roll_sft.checkpoint.manifest import RunState, read_manifest
from roll_sft.checkpoint.publish import LATEST
from roll_sft.config.schema import RunConfig

LOG = logging.getLogger(__name__)
AUTO, NONE = "auto", "none"
ORIGIN = "origin"  # a file that names the other run's step folder from which this run began
LEFT_OVER = (".staging_*", ".deleted_*")  # half written and half deleted folders of a killed run
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: after `step`, from `checkpoint`; step 0 and None for a new one."""

    step: int
    checkpoint: Path | None


def find_checkpoint(config: RunConfig, checkpoints: Path) -> Path | None:
    """The step folder from which a run resumes; None for a new run.

    `checkpoints` holds the run's own step folders. Raises `CheckpointError` if the folder that
    `resume` names is damaged, or all of the run's own are; `ConfigError` if that folder is no
    checkpoint, or the run's own checkpoints did not begin from it.
    """
    folders = step_folders(checkpoints)
    if config.resume == NONE or (config.resume == AUTO and not folders):
        return None
    from roll_sft.checkpoint.choice import chosen

    return chosen(config, checkpoints, folders)


def start_from(checkpoint: Path | None, run: RunState, *, allowed: Sequence[str]) -> Start:
    """Where the run begins that goes on from `checkpoint`.

    `run` is its state before its first step. Raises `ConfigError` where another run wrote
    `checkpoint`, but for the changes `allowed` by name.
    """
    if checkpoint is None:
        return Start(0, None)
    from roll_sft.checkpoint.fingerprint import check_same_run

    state = read_manifest(checkpoint).state
    check_same_run(run, state, checkpoint=checkpoint, allowed=allowed)
    return Start(state.step, checkpoint)


def step_folders(checkpoints: Path) -> list[Path]:
    """The step folders in `checkpoints`, oldest first; anything of another name is left alone."""
    found = []
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def step_of(folder: Path) -> int:
    """The step in the name of a step folder."""
    return int(folder.name.removeprefix("step_"))


def origin_of(checkpoints: Path) -> Path | None:
    """The step folder of another run that the run of `checkpoints` began from, if it did."""
    origin = checkpoints / ORIGIN
    return Path(origin.read_text(encoding="utf-8").strip()) if origin.is_file() else None


def make_way(checkpoints: Path, start: Start) -> None:
    """Delete the unfinished folders of a killed run, and set aside step folders after `start`.

    A later folder is damaged, or `resume` names an earlier one.
    """
    for pattern in LEFT_OVER:
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in step_folders(checkpoints):
        if step_of(path) > start.step:
            aside = set_aside(path)
            LOG.warning("%s lies after the checkpoint of this run; renamed to %s", path, aside.name)
    if start.checkpoint is None:
        (checkpoints / ORIGIN).unlink(missing_ok=True)
    elif start.checkpoint.parent == checkpoints:
        with writing(checkpoints / LATEST):
            write_durably(checkpoints / LATEST, start.checkpoint.name + "\n")
    else:
        checkpoints.mkdir(exist_ok=True)
        write_durably(checkpoints / ORIGIN, f"{start.checkpoint}\n")
