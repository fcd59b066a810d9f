"""The wheel of the tree, unpacked where an installation would put it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def unpacked_wheel(folder: Path) -> Path:
    """Build the wheel in the empty `folder`; returns the folder to put on the path."""
    site = folder / "site"
    with zipfile.ZipFile(built_wheel(folder)) as archive:
        archive.extractall(site)
    return site


def built_wheel(folder: Path) -> Path:
    """Build the wheel in the empty `folder`, of a copy of the tree; returns its file."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("roll_sft", "conf", "cluster", "constraints"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "-qq", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(tree)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel
