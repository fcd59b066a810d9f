"""What a report needs and no other file of a run holds: starts and ends, and one step's packs.

`starts.jsonl` gets a line when a command begins to train in the folder, and one when it ends.
`job/packs.json` holds the packs of the first step by rank, and the histogram of sample lengths.
The report itself is made by a process of its own. Promise: nothing here fails a run.
"""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from roll_sft.base import errors
from roll_sft.base.files import json_lines
from roll_sft.base.text import redacted
from roll_sft.job.job import Job, micro_batch_tokens
from roll_sft.report import PACKS, REPORT, STARTS
from roll_sft.training.run_folder import JsonLines, write_json

LOG = logging.getLogger(__name__)
PACKAGES = ("roll_sft", "torch", "megatron-core", "ray", "transformers")
REPORT_TIMEOUT_S = 60.0
INTERRUPTED = 130  # as a shell says it of Ctrl-C
_MOST_SAMPLES = 1 << 20  # that the histogram counts: evenly spaced ones of a larger set
_MOST_PACKED = 20_000  # samples of a step whose packs are kept
_NUM_BINS = 40


@contextlib.contextmanager
def reported(job: Job, folder: Path, *, first_step: int | None) -> Iterator[None]:
    """Record that a run begins with `first_step`, and how the block ends; then make its report.

    `first_step` is None for a run that has all its steps.
    """
    if first_step is None and (folder / REPORT).exists() and _has_ended_well(folder):
        yield
        return
    begun = {"event": "start", "step": first_step, "host": os.uname().nodename, "pid": os.getpid()}
    about: dict[str, Any] = {"python": sys.version.split()[0], "device": job.config.parallel.device}
    about["total_steps"] = job.total_steps
    with _never_fails():
        write_json(folder / PACKS, packs_of(job, first_step or job.total_steps))
        _add(folder, begun | about | {"versions": _versions()})
    code, cause = 0, None
    try:
        yield
    except BaseException as error:
        code, cause = outcome_of(error)
        raise
    finally:
        with _never_fails():
            _add(folder, {"event": "end", "exit_code": code, "cause": cause})
            if code < errors.PreemptedError.exit_code:  # else there is no time
                make_report(folder)


def packs_of(job: Job, step: int) -> dict[str, Any]:
    """The packs of `step` as lengths of samples by data rank, and the histogram of all lengths."""
    plan, tokens = job.planner.step(step), job.data.train
    lengths, supervised = tokens.lengths, tokens.supervised
    stride = -(-lengths.size // _MOST_SAMPLES)
    edges = np.histogram_bin_edges(lengths[::stride], bins=_NUM_BINS)
    is_small = len(plan.sample_ids) <= _MOST_PACKED
    return {
        "step": step,
        "capacity": micro_batch_tokens(job.config, job.layout),
        "ranks": [[lengths[list(pack)].tolist() for pack in rank] for rank in plan.ranks]
        if is_small
        else [],
        "num_samples": lengths.size,
        "edges": edges.tolist(),
        "tokens": np.histogram(lengths[::stride], edges)[0].tolist(),
        "supervised": np.histogram(supervised[::stride], edges)[0].tolist(),
    }


def outcome_of(error: BaseException) -> tuple[int, str]:
    """The exit code that the command ends with for `error`, and the cause in one text."""
    error = errors.of_user(error)
    if isinstance(error, errors.RollSftError):
        return error.exit_code, redacted(str(error))
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else errors.FAULT
        return code, f"ended by signal {code - 128}" if code > 128 else f"ended with code {code}"
    return errors.FAULT, redacted(f"{type(error).__name__}: {error}")


def make_report(folder: Path) -> None:
    """Make `loss.png` and `report.html` of the run in `folder`, in a process of its own."""
    command = [sys.executable, "-m", "roll_sft.report.command", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=REPORT_TIMEOUT_S
    )
    if done.returncode:
        why = errors.why_ended(done.returncode, done.stderr)
        LOG.warning("no report of %s: %s; `roll-sft report` tries again", folder, why)


@contextlib.contextmanager
def _never_fails() -> Iterator[None]:
    try:
        yield
    except (OSError, errors.ResourceError, subprocess.SubprocessError) as error:
        LOG.warning("a part of the report is missing: %s", error)


def _add(folder: Path, line: dict[str, Any]) -> None:
    lines = JsonLines(folder / STARTS)
    lines.write({**line, "time": time.time()})
    lines.close()


def _has_ended_well(folder: Path) -> bool:
    last = deque(json_lines(folder / STARTS), maxlen=1)
    return any(line.get("event") == "end" and line.get("exit_code") == 0 for line in last)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # a checkout that is not installed
            found[package] = version(package)
    return found
