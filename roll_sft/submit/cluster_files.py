"""`roll-sft cluster-files FOLDER`: copies of the files that make a cluster, to be changed."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from roll_sft.base.errors import ConfigError, report
from roll_sft.submit.package import PACKAGE

NAMES = ("Dockerfile", "Dockerfile.cpu", "launcher.yaml", "node.py", "rayjob.yaml", "slurm.sh")


def main(arguments: Sequence[str]) -> int:
    """Copy the files into the folder that `arguments` name; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="roll-sft cluster-files",
        description="Copies of the files that make a cluster: SLURM, Kubernetes, Ray's launcher,"
        " images, and machines without any of these.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="to copy them to")
    try:
        copy(parser.parse_args(arguments).folder)
    except ConfigError as error:
        return report(error)
    return 0


def copy(folder: Path) -> None:
    """Copy the files into `folder`. Raises `ConfigError` where one is there or not writable."""
    there = [name for name in NAMES if (folder / name).exists()]
    if there:
        raise ConfigError(f"{folder}: has {', '.join(there)} already; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            shutil.copy(shipped() / name, folder / name)
            sys.stdout.write(f"{folder / name}\n")
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); give another folder"
        ) from error


def shipped() -> Path:
    """The folder of the files: inside the package once installed, beside it in a checkout."""
    own = PACKAGE / "cluster"
    return own if own.is_dir() else PACKAGE.parent / "cluster"
