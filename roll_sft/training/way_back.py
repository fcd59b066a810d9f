"""What to do after a divergence. Loaded by a run that diverged."""

from pathlib import Path

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.manifest import read_manifest
from roll_sft.checkpoint.resume import origin_of, step_folders, step_of
from roll_sft.config.schema import RunConfig


def way_back(config: RunConfig, checkpoints: Path, sound_step: int) -> str:
    """How to go on, where the state after `sound_step` is the last that is known to be sound."""
    good = newest_until(checkpoints, sound_step)
    lower = "lower train.learning_rate or train.max_grad_norm"
    if good is None:
        elsewhere = " with another output_dir or run_name" if step_folders(checkpoints) else ""
        return f"no checkpoint before it is known to be good: {lower} and start anew{elsewhere}"
    names = ",".join(dict.fromkeys([*config.checkpoint.allow_changes, "schedule", "optimizer"]))
    return (
        f"the last good checkpoint is {good.name}: {lower} and go back to it with resume={good}"
        f" 'checkpoint.allow_changes=[{names}]'"
    )


def newest_until(checkpoints: Path, step: int) -> Path | None:
    """The newest checkpoint up to `step`; for a run without any, the one that it began from."""
    own, origin = step_folders(checkpoints), origin_of(checkpoints)
    if own or origin is None:
        return next((folder for folder in reversed(own) if step_of(folder) <= step), None)
    try:
        return origin if read_manifest(origin).state.step <= step else None
    except CheckpointError:  # it was deleted or damaged since
        return None
