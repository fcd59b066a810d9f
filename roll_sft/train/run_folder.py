"""The folder of a run: who may write there, and its line-per-record files.

Promises: one run at a time holds a folder (a lock that the kernel drops when the process dies); a
run that begins at step 0 finds no checkpoints there; a line is complete or absent, and none is of a
step after the checkpoint that a run goes on from; what is cut from a log is set aside, not deleted;
JSON is JSON, so a number that is not finite is null.
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
from roll_sft.base.files import aside_name, json_lines, set_aside, write_durably, writing
from roll_sft.base.text import redacted_tree
from roll_sft.config.schema import RunConfig

LOG = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
# A line has the step that it is of.
LOGS = ("steps.jsonl", "eval.jsonl", "samples.jsonl", "bad_batches.jsonl")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


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
def claimed(folder: Path, *, resumes: bool = False) -> Iterator[Path]:
    """Hold `folder` for one run. Raises `ConfigError` if it is in use.

    Also if it has checkpoints, unless the run `resumes` where there are some. Raises
    `ResourceError` where the disk is full.
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
        with contextlib.suppress(OSError):  # the folder may be gone by now
            holder_file.unlink()
        lock.release()


class JsonLines:
    """A file of one JSON object per line, each written at once; goes on after what is there.

    Raises `ResourceError` where a line cannot be written; what is there of it is removed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def write(self, record: Any) -> None:
        """Append `record`, a mapping or a dataclass; a number that is not finite becomes null."""
        is_instance = dataclasses.is_dataclass(record) and not isinstance(record, type)
        values = dataclasses.asdict(record) if is_instance else record
        rest = memoryview((json.dumps(finite(values), allow_nan=False) + "\n").encode())
        with writing(self._path):
            found = os.fstat(self._file.fileno())
            # A file that was removed takes lines until the end, and nobody would read them.
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
    """`value` with null in place of every number that JSON does not know: NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_logs(folder: Path, *, step: int, origin: Path) -> None:
    """Leave in the logs of `folder` the lines up to `step`, taken from the run in `origin`.

    That is `folder` itself where a run goes on from its own checkpoint. Lines that are not kept go
    to a file `.set_aside_<name>`. Raises `ResourceError` where the disk takes no more.
    """
    for name in LOGS:
        path = folder / name
        lines = list(_lines_until(origin / name, step)) if step else []
        with writing(path):
            _replace_lines(path, "".join(lines).encode())
        if name == "steps.jsonl" and [json.loads(line)["step"] for line in lines] != [
            *range(1, step + 1)
        ]:
            LOG.warning("%s has not every line up to step %d: its beginning is lost", name, step)


def _replace_lines(path: Path, kept: bytes) -> None:
    """Make `kept` the content of `path`; none of what is there is lost."""
    there = path.read_bytes() if path.exists() else b""
    if there and not kept:
        set_aside(path)
    elif there != kept:
        if lost := there.removeprefix(kept):
            write_durably(aside_name(path), lost)
        write_durably(path, kept)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file of `JsonLines`; none where there is no file."""
    return list(json_lines(path))


def losses(folder: Path, name: str | None) -> dict[int, float]:
    """The loss of validation set `name` by step, from `eval.jsonl`."""
    records = lines_of(folder / "eval.jsonl")
    return {each["step"]: each["loss"] for each in records if each["name"] == name}


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` so that a reader sees the old file or the new one, never a part."""
    with writing(path):
        content = finite(redacted_tree(value))
        write_durably(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, of text."""
    with writing(path):
        write_durably(path, text)


def _holder(folder: Path) -> str:
    try:
        return f" ({(folder / '.lock_holder').read_text()})"
    except OSError:
        return ""


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """The whole lines of `path` up to `step`; a killed run may have torn the last."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    return
                yield line
    except FileNotFoundError:
        return
    except (ValueError, LookupError, TypeError) as error:
        LOG.warning("%s: a line cannot be read (%s); it and those after it are lost", path, error)


def _refuse_checkpoints(folder: Path) -> None:
    steps = sorted(folder.glob(f"{CHECKPOINTS}/step_*"))
    if steps:
        raise ConfigError(
            f"output_dir: {str(folder)!r} already holds checkpoints up to {steps[-1].name};"
            " resume=auto goes on from there; or choose another output_dir or run_name, or move the"
            " folder away"
        )
