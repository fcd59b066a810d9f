"""Whether the Megatron-Core that wrote a checkpoint is one that the installed one can follow."""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from roll_sft.base.errors import CheckpointError

_PACKAGE = "megatron-core"


def check_megatron(folder: Path, versions: Mapping[str, str]) -> None:
    """Raise `CheckpointError` if the checkpoint in `folder` is of a newer minor version.

    Older ones are read: Megatron-Core keeps to that, and not to the reverse. A checkpoint, or a
    machine, without Megatron-Core has nothing to compare.
    """
    written = versions.get(_PACKAGE)
    try:
        installed = version(_PACKAGE)
    except PackageNotFoundError:
        return
    if written is not None and _minor(written) > _minor(installed):
        major, minor = _minor(written)
        raise CheckpointError(
            f"{folder}: written with {_PACKAGE} {written}, which is newer than the installed"
            f" {installed}; install {_PACKAGE}>={major}.{minor}"
        )


def _minor(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
