"""The logs of a folder that has some, or of a run that goes on: cut after the step it begins from.

Promises: a resumed run has no line of a later step than its checkpoint, and lines cut from a log
are set aside, not deleted.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from roll_sft.base.files import aside_name, set_aside, write_durably, writing
from roll_sft.report import STRAGGLERS
from roll_sft.training.run_folder import LOGS

LOG = logging.getLogger(__name__)


def cut_logs(folder: Path, *, step: int, origin: Path) -> None:
    """Replace the logs of `folder` by the lines up to `step` of the run in `origin`.

    `origin` is `folder` itself where a run resumes from its own checkpoint. Other lines of `folder`
    move to files `.set_aside_<name>`. Raises `ResourceError` where the disk is full.
    """
    for name in (*LOGS, STRAGGLERS):
        path = folder / name
        lines = list(_lines_until(origin / name, step)) if step else []
        with writing(path):
            _replace_lines(path, "".join(lines).encode())
        if name == "steps.jsonl" and [json.loads(line)["step"] for line in lines] != [
            *range(1, step + 1)
        ]:
            LOG.warning("%s: lines before step %d are missing", path, step + 1)


def _replace_lines(path: Path, kept: bytes) -> None:
    """Make `kept` the content of `path`; set aside the lines that it does not have."""
    there = path.read_bytes() if path.exists() else b""
    if there and not kept:
        set_aside(path)
    elif there != kept:
        if lost := there.removeprefix(kept):
            write_durably(aside_name(path), lost)
        write_durably(path, kept)


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """The complete lines of `path` up to `step`; a killed run may have left half a line."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    return
                yield line
    except FileNotFoundError:
        return
    except (ValueError, LookupError, TypeError) as error:
        LOG.warning("%s: cannot read a line (%s); leaving out the lines from there", path, error)
