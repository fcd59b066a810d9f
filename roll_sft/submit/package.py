"""The folder that a job runs in: the caller's files and this package, so that nodes need neither.

Promises: hidden files, virtual environments, caches, weights and what git ignores stay here, and so
does a folder that is larger than `MOST_BYTES`, which is known before a file is read.
"""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from roll_sft.base.errors import ConfigError

MOST_BYTES = 100 << 20  # Ray keeps packages in the memory of the head
LEFT_OUT = (
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    "mlflow.db",
    "mlruns",
    "node_modules",
    "outputs",
    "site-packages",
    "venv",
    "wandb",
    "*.distcp",
    "*.pem",
    "*.pt",
    "*.pth",
    "*.safetensors",
)
PACKAGE = Path(__file__).resolve().parents[1]


def stage(folder: Path, into: Path) -> None:
    """Copy what a job needs of `folder`, and this package, into the empty folder `into`.

    A `folder` that is a checkout of this project brings its own package. Raises `ConfigError` where
    it is too large.
    """
    for path in files_to_send(folder):
        target = into / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    own, name = into / PACKAGE.name, PACKAGE.name
    if not (own / "run.py").exists():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, own, ignore=ignored, dirs_exist_ok=True)
        if not (own / "conf").exists():  # a checkout has its configurations beside the package
            shutil.copytree(PACKAGE.parent / "conf", own / "conf", ignore=ignored)
    assert (own / "run.py").exists(), f"{name} was copied"


def files_to_send(folder: Path) -> list[Path]:
    """The files of `folder` that a job gets. Raises `ConfigError` where they are too large."""
    tracked = _known_to_git(folder)
    chosen, total, by_place = list[Path](), 0, Counter[str]()
    for path in _walk(folder) if tracked is None else tracked:
        size = path.stat().st_size
        chosen.append(path)
        total += size
        by_place[path.relative_to(folder).parts[0]] += size
        if total > MOST_BYTES:
            largest = ", ".join(f"{name} ({n >> 20} MiB)" for name, n in by_place.most_common(3))
            raise ConfigError(
                f"--working-dir: {str(folder)!r} has more than {MOST_BYTES >> 20} MiB to send,"
                f" most of it in {largest}; give a smaller folder, or put data on storage that all"
                " nodes share"
            )
    return sorted(chosen)


def _known_to_git(folder: Path) -> Iterator[Path] | None:
    """Files that git tracks or would add; None where `folder` is in no work tree."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others"]
    try:
        listed = subprocess.run([*command, "--exclude-standard"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    names = [Path(name) for name in listed.stdout.decode().split("\0") if name]
    kept = (name for name in names if not any(map(_is_left_out, name.parts)))
    return (folder / name for name in kept if _is_file(folder / name))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if _is_left_out(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            if not (path / "pyvenv.cfg").exists():
                yield from _walk(path)
        elif _is_file(path):
            yield path


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
