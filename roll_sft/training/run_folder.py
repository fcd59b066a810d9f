"""The folder of a run: its lock, and its files of one JSON record per line.

Promises: one run at a time holds a folder, with a lock that the kernel releases when the process
dies; a run without `resume` finds no checkpoints there; a line is complete or absent; a number that
is not finite is written as null. `cut_logs.py` cuts the files where a run goes on.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from roll_sft.base.errors import ConfigError, ResourceError
from roll_sft.base.files import write_durably, writing
from roll_sft.base.text import redacted_tree
from roll_sft.config.schema import RunConfig

LOG = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
MODEL, ADAPTER = "hf", "adapter"  # what is exported
JOB = "job"  # what joins the stages
# Each line of these has a `step`.
LOGS = ("steps.jsonl", "eval.jsonl", "samples.jsonl", "generations.jsonl", "bad_batches.jsonl")
EVALUATION_DUE = ".evaluation_due"  # the step after which a run was stopped before it evaluated
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def output_folder(config: RunConfig, *, in_job: bool = False) -> Path:
    """The folder of a run, `outputs/<run_name>` by default.

    Raises `ConfigError` for a relative path under a Ray job, or `in_job`, which will be one.
    """
    folder = Path(config.output_dir or f"outputs/{config.run_name}")
    if (in_job or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ) and not folder.is_absolute():
        raise ConfigError(
            f"output_dir: {str(folder)!r} is relative, and under a Ray job it would lie in a"
            " temporary package folder; give an absolute path that all nodes share"
        )
    return folder


@contextlib.contextmanager
def claimed(folder: Path, *, resumes: bool = False) -> Iterator[Path]:
    """Lock `folder` for one run; yields its absolute path.

    Raises `ConfigError` if another run holds it or, unless the run `resumes`, if it has
    checkpoints; `ResourceError` where the disk is full.
    """
    holder_file = folder / ".lock_holder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(blocking=False)
        holder_file.write_text(f"{os.uname().nodename} pid {os.getpid()}")
    except Timeout as error:
        holder = _holder(folder)
        raise ConfigError(
            f"output_dir: {str(folder)!r} is in use by another run{holder}; wait for it, or choose"
            " another output_dir or run_name"
        ) from error
    except OSError as error:
        kind = ResourceError if error.errno in NO_ROOM else ConfigError
        raise kind(
            f"output_dir: cannot write to {str(folder)!r} ({error.strerror}); choose another"
        ) from error
    try:
        if not resumes:
            _refuse_checkpoints(folder)
        yield folder.resolve()
    finally:
        with contextlib.suppress(OSError):  # somebody may have removed the folder
            holder_file.unlink()
        lock.release()


class JsonLines:
    """Appends JSON objects to a file, one per line, without a buffer.

    Raises `ResourceError` where a line cannot be written; a part of it is removed again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def write(self, record: Any) -> None:
        """Append `record`, a mapping or a dataclass; a number that is not finite becomes null."""
        values = record
        if dataclasses.is_dataclass(record):  # a flat one: asdict would copy every value
            names = (field.name for field in dataclasses.fields(record))
            values = {name: getattr(record, name) for name in names}
        rest = memoryview((json.dumps(finite(values), allow_nan=False) + "\n").encode())
        with writing(self._path):
            found = os.fstat(self._file.fileno())
            # A removed file still accepts lines, which would be lost.
            if not os.path.samestat(found, self._path.stat()):
                raise FileNotFoundError(errno.ENOENT, "another file has taken its place")
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(found.st_size)
                raise

    def sync(self) -> None:
        """Bring all lines to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by `value` as JSON, without credentials."""
    with writing(path):
        content = finite(redacted_tree(value))
        write_durably(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_config(folder: Path, text: str) -> None:
    """Replace config.yaml atomically by `text`.

    It is for its owner alone where it names an address or the environment: credentials of a kind
    that is not known may be in it.
    """
    path, is_private = folder / "config.yaml", "://" in text or "${oc." in text
    with writing(path):
        write_durably(path, text, mode=0o600 if is_private else None)


def _holder(folder: Path) -> str:
    try:
        return f" ({(folder / '.lock_holder').read_text()})"
    except OSError:
        return ""


def _refuse_checkpoints(folder: Path) -> None:
    steps = sorted(folder.glob(f"{CHECKPOINTS}/step_*"))
    if steps:
        raise ConfigError(
            f"output_dir: {str(folder)!r} already holds checkpoints up to {steps[-1].name};"
            " use resume=auto, another output_dir or run_name, or move the folder away"
        )
