"""The folder of a run: who may write there, and its line-per-record files.

Promises: one run at a time holds a folder (a lock that the kernel drops when the process dies); a
folder with checkpoints is never written over; a line is complete or absent.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from roll_sft.config import RunConfig
from roll_sft.errors import ConfigError

CHECKPOINTS = "checkpoints"


def output_folder(config: RunConfig) -> Path:
    """Where the run writes; `outputs/<run_name>` unless told. Raises `ConfigError` in a Ray job."""
    folder = Path(config.output_dir or f"outputs/{config.run_name}")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not folder.is_absolute():
        raise ConfigError(
            f"output_dir: {str(folder)!r} is relative, and under a Ray job it would lie in a"
            " temporary package folder; give an absolute path that all nodes share"
        )
    return folder


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Hold `folder` for one run. Raises `ConfigError` if it is in use or has checkpoints."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(blocking=False)
    except Timeout as error:
        holder = _holder(folder)
        raise ConfigError(
            f"output_dir: {str(folder)!r} is in use by another run{holder}; wait for it, or choose"
            " another output_dir or run_name"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"output_dir: cannot write to {str(folder)!r} ({error.strerror}); choose another"
        ) from error
    try:
        _refuse_checkpoints(folder)
        (folder / ".lock_holder").write_text(f"{os.uname().nodename} pid {os.getpid()}")
        yield folder.resolve()
    finally:
        (folder / ".lock_holder").unlink(missing_ok=True)
        lock.release()


class JsonLines:
    """A file of one JSON object per line, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8")

    def write(self, record: Any) -> None:
        """Append `record`, a mapping or a dataclass."""
        is_instance = dataclasses.is_dataclass(record) and not isinstance(record, type)
        values = dataclasses.asdict(record) if is_instance else record
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` so that a reader sees the old file or the new one, never a part."""
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    staging.replace(path)


def _holder(folder: Path) -> str:
    try:
        return f" ({(folder / '.lock_holder').read_text()})"
    except OSError:
        return ""


def _refuse_checkpoints(folder: Path) -> None:
    steps = sorted(folder.glob(f"{CHECKPOINTS}/step_*"))
    if steps:
        raise ConfigError(
            f"output_dir: {str(folder)!r} already holds checkpoints up to {steps[-1].name}, and to"
            " resume is not available in this version; choose another output_dir or run_name, or"
            " move the folder away"
        )
