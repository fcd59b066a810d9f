"""The step folder that a run goes on from, chosen among those that are whole."""

import logging
from pathlib import Path

from roll_sft.base.errors import CheckpointError, ConfigError
from roll_sft.checkpoint.manifest import (
    NewerCheckpointError,
    check_complete,
    read_manifest,
    verify_hashes,
)
from roll_sft.checkpoint.resume import AUTO, origin_of, step_folders
from roll_sft.config.schema import RunConfig

LOG = logging.getLogger(__name__)


def chosen(config: RunConfig, checkpoints: Path, folders: list[Path]) -> Path:
    """What `find_checkpoint` returns, and raises; `folders` are the run's own step folders."""
    resume, verify = config.resume, config.checkpoint.verify
    if resume != AUTO:
        named = _named(resume)
        if not folders or named.parent == checkpoints.resolve():
            _check_whole(named, verify=verify)
            return named
        _check_origin(checkpoints, named=named)
        LOG.info("resuming from this run's own checkpoints, which began from %s", named)
    return _newest_whole(folders, verify=verify)


def _named(resume: str) -> Path:
    """The step folder that the key `resume` names."""
    named, advice = Path(resume).resolve(), "give a step folder, auto or none"
    if not named.is_dir():
        found = "is a file" if named.exists() else "does not exist"
        raise ConfigError(f"resume: {resume!r} {found}; {advice}")
    inside = [*step_folders(named), *step_folders(named / "checkpoints")]
    if inside:
        raise ConfigError(
            f"resume: {resume!r} holds checkpoints and is none; its newest is resume={inside[-1]}"
        )
    if not any(named.iterdir()):
        raise ConfigError(f"resume: {resume!r} is an empty folder; {advice}")
    read_manifest(named)
    return named


def _check_origin(checkpoints: Path, *, named: Path) -> None:
    """Refuse a step folder of another run, unless the run of `checkpoints` began from it."""
    found = origin_of(checkpoints) or "its own step 1"
    if found != named:
        raise ConfigError(
            f"resume: {str(named)!r} is of another run, and the checkpoints in"
            f" {str(checkpoints)!r} began from {found}; choose another output_dir or run_name, or"
            " resume=auto to go on from the newest of these"
        )


def _check_whole(folder: Path, *, verify: bool) -> None:
    manifest = check_complete(folder)
    if verify:
        verify_hashes(folder, manifest.files)


def _newest_whole(folders: list[Path], *, verify: bool) -> Path:
    for folder in reversed(folders):
        try:
            _check_whole(folder, verify=verify)
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            LOG.error("NOT resuming from %s: %s", folder.name, error)
            continue
        return folder
    raise CheckpointError(
        f"{folders[-1].parent}: none of its {len(folders)} checkpoints is whole; restore one, or"
        " choose another output_dir to start from the beginning"
    )
