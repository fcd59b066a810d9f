"""Whether a run runs, from its files alone, so that it can be told from any machine that sees them.

A command that trains writes `starts.jsonl` when it begins and when it ends, and `.lock_holder`
while it holds the folder. A process that was killed leaves no end, and one that hangs writes no
lines.
"""

import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from roll_sft.base.metrics import format_seconds
from roll_sft.report.run_files import EVALS, GENERATIONS, STEPS, RunFiles, age_s
from roll_sft.report.tail import number

Kind = Literal["starting", "running", "quiet", "finished", "stopped", "failed", "unknown"]
SIGNALLED = 128  # codes above are of signals, as a shell says them
PREEMPTED = 75
_LAST_STEPS = 50  # whose time says how long a step takes
QUIET_S = 300.0  # without a line, at least: evaluations and saves take their time
QUIET_STEPS = 20  # without a line for as long as so many steps took


@dataclass(frozen=True, slots=True)
class State:
    """How a run stands: `kind`, a sentence about it, and the exit code if it has ended."""

    kind: Kind
    text: str
    exit_code: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether no process trains."""
        return self.kind in ("finished", "stopped", "failed", "unknown")


def current_state(run: RunFiles) -> State:
    """How `run` stands now."""
    times = run.column("step_time_s")[-_LAST_STEPS:].tolist()
    return state_of(run.folder, run.starts, times, now=time.time())


def state_of(
    folder: Path, starts: Iterable[dict[str, Any]], step_times: Iterable[float], *, now: float
) -> State:
    """How the run in `folder` stands at the time `now`; `step_times` are its last ones, in s."""
    last: dict[str, Any] = next(reversed([*starts]), {})
    if last.get("event") == "end":
        return _ended(last)
    holder = _holder(folder)
    ages = [age_s(folder / name, now) for name in (STEPS, EVALS, GENERATIONS)]
    known = [age for age in ages if age is not None]
    if holder is None:
        if known or last:
            return State("unknown", "no process holds the folder, and none has said how it ended")
        return State("unknown", "no step was made yet")
    if _is_gone(holder):
        return State("failed", f"its process ({holder}) is gone and has not said why")
    if not known:
        return State("starting", f"{holder}: no step yet")
    usual = [seconds for seconds in step_times if math.isfinite(seconds)]
    typical, age = float(np.median(usual)) if usual else 0.0, min(known)
    since = f"last line {format_seconds(age)} ago"
    if age > max(QUIET_S, QUIET_STEPS * typical):
        return State(
            "quiet",
            f"{holder}: {since}, and a step takes {typical:.2f} s: it hangs, or evaluates or saves"
            " for long",
        )
    return State("running", f"{holder}: {since}")


def _ended(line: dict[str, Any]) -> State:
    code = number(line.get("exit_code"))
    cause = str(line.get("cause") or "")
    if code == 0:
        return State("finished", "reached its end", 0)
    if not math.isfinite(code):
        return State("failed", cause)
    if code == PREEMPTED or code > SIGNALLED:
        return State("stopped", cause, int(code))
    return State("failed", cause, int(code))


def _holder(folder: Path) -> str | None:
    """`host pid N` of the process that holds the folder, or was killed while it did."""
    try:
        return (folder / ".lock_holder").read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        return None


def _is_gone(holder: str) -> bool:
    """Whether the process lived on this machine and lives no more."""
    found = re.fullmatch(r"(\S+) pid (\d{1,9})", holder)
    return (
        found is not None
        and found[1] == os.uname().nodename
        and not psutil.pid_exists(int(found[2]))
    )
