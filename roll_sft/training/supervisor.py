"""Goes on with a run whose workers failed: new workers, from the newest whole checkpoint.

Loaded when a worker has failed, in the process and under the lock of the run. Promises:
- the run ends as an undisturbed one: logs are cut to the checkpoint, and what follows is the same;
- an error that new workers would meet again (a user's, a divergence, a fault of ours) is not tried
  again; a step that fails `MOST_FAILURES_OF_A_STEP` times ends the run, and so do more than
  `cluster.max_restarts` failures; the loss of a node counts apart, and without a limit;
- a restart never goes back to the checkpoint that `resume` names once the run has its own;
- the resources stay reserved where every node of the workers is there.
"""

import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from roll_sft.base.errors import PreemptedError, WorkerError
from roll_sft.checkpoint.resume import AUTO, Start, find_checkpoint, start_from
from roll_sft.config.schema import RunConfig
from roll_sft.job.job import Job
from roll_sft.job.prepared import read_prepared
from roll_sft.report import RESTARTS
from roll_sft.runtime import regroup
from roll_sft.runtime.cluster import reserved
from roll_sft.training import run_folder
from roll_sft.training.driver import Attempt
from roll_sft.training.run_folder import JsonLines

LOG = logging.getLogger(__name__)
MOST_FAILURES_OF_A_STEP = 3
PAUSE_S = 2.0  # before a step is tried again that has failed twice
TAIL_BYTES = 1 << 16  # of steps.jsonl: more than one line


def restarted(
    error: WorkerError, failed: Attempt, folder: Path, *, train: Callable[[Attempt], None]
) -> None:
    """Restart the workers, again and again, until the run of `failed` has ended.

    `train` runs one attempt. Raises the last error where no restart follows, and what `train`
    raises besides.
    """
    wanted, history = failed.job.config, _History()
    with contextlib.ExitStack() as placements:
        while True:
            if failed.stop.is_asked():
                raise PreemptedError(failed.stop.last_line()) from error
            began, found = time.monotonic(), time.time()
            is_node_lost = regroup.is_node_lost(failed.slots)
            step = _step_of(failed, folder)
            pause_s = history.pause_after(error, step, wanted, is_node_lost=is_node_lost)
            LOG.warning("step %d failed: %s; %s", step, error, history.told(wanted, pause_s))
            time.sleep(pause_s)
            attempt = _next_attempt(failed, folder, wanted, placements=placements)
            record = {
                "time": found,
                "step": step,
                "cause": str(error),
                "kind": "preemption" if is_node_lost else "failure",
                "rank": error.rank,
                "host": error.host,
                "from_step": attempt.start.step,
                "num_workers": attempt.job.layout.world_size,
            }
            attempt.begun = partial(_note, folder, record, began)
            try:
                train(attempt)
                return
            except WorkerError as again:
                if not attempt.is_begun:
                    _note(folder, record, began)
                error, failed = again, attempt


@dataclass(slots=True)
class _History:
    """The failures of this command, and what they allow."""

    failures: int = 0
    node_losses: int = 0
    of_step: Counter[int] = field(default_factory=Counter)

    def pause_after(
        self, error: WorkerError, step: int, config: RunConfig, *, is_node_lost: bool
    ) -> float:
        """Count a failure of `step`; returns the seconds to wait before the restart.

        Raises `error`, or what it means, where no restart follows.
        """
        most = config.cluster.max_restarts
        if most == 0 or not error.may_pass:
            raise error
        self.of_step[step] += 1
        if is_node_lost:
            self.node_losses += 1
        else:
            self.failures += 1
        times = self.of_step[step]
        if times >= MOST_FAILURES_OF_A_STEP:
            raise _last(error, f"step {step} failed {times} times, the last time so")
        if self.failures > most:
            reason = f"the workers were restarted {most} times (cluster.max_restarts), and failed"
            raise _last(error, reason)
        return PAUSE_S if times > 1 else 0.0

    def told(self, config: RunConfig, pause_s: float) -> str:
        """Which restart follows."""
        most = config.cluster.max_restarts
        which = f"restart {self.failures} of {most}" if self.failures else "restart"
        lost = f" ({self.node_losses} for lost nodes)" if self.node_losses else ""
        return f"{which}{lost}{f' in {pause_s:g} s' if pause_s else ''}"


def _last(error: WorkerError, reason: str) -> WorkerError:
    """How the last error reads where restarts are used up."""
    last = WorkerError(f"{reason}: {error}")
    last.rank, last.host = error.rank, error.host
    return last


def _step_of(failed: Attempt, folder: Path) -> int:
    """The step that had begun, or was to begin, when the workers failed."""
    if not failed.is_begun:
        return failed.start.step + 1
    try:
        with (folder / "steps.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            last = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        return min(int(json.loads(last)["step"]) + 1, failed.job.total_steps)
    except (OSError, ValueError, LookupError, TypeError):  # no step has ended yet
        return failed.start.step + 1


def _next_attempt(
    failed: Attempt, folder: Path, wanted: RunConfig, *, placements: contextlib.ExitStack
) -> Attempt:
    """New workers' beginning: the same resources, or those that are left, and the checkpoint."""
    job, slots = failed.job, failed.slots
    if regroup.is_node_lost(slots):
        regroup.release(slots)
        num_workers = regroup.num_workers_left(wanted)
        if num_workers != job.layout.world_size:
            job = _job_on(job, num_workers, folder)
        slots = placements.enter_context(reserved(job.config))
    return Attempt(job, _start(failed, job, folder), slots, lambda: None, failed.stop)


def _job_on(job: Job, num_workers: int, folder: Path) -> Job:
    """`job` on another number of data-parallel ranks."""
    LOG.warning(
        "%d workers in place of %d: losses and samples stay the same, a step takes longer",
        num_workers,
        job.layout.world_size,
    )
    parallel = replace(job.config.parallel, num_workers=num_workers)
    config = replace(job.config, parallel=parallel)
    smaller = Job.of(read_prepared(config, folder / run_folder.JOB))
    return replace(smaller, metric_fn=job.metric_fn)


def _start(failed: Attempt, job: Job, folder: Path) -> Start:
    """After the newest checkpoint of the run; where it has none yet, as before."""
    if not failed.is_begun:  # later checkpoints may lie there that this run was to set aside
        return failed.start
    config = replace(job.config, resume=AUTO)
    found = find_checkpoint(config, folder / run_folder.CHECKPOINTS)
    if found is None:
        return failed.start
    return start_from(found, job.state, allowed=config.checkpoint.allow_changes)


def _note(folder: Path, record: Mapping[str, Any], began: float) -> None:
    """Add `record` to the restarts of the run, with the seconds since the failure."""
    seconds = time.monotonic() - began
    lines = JsonLines(folder / RESTARTS)
    lines.write({**record, "seconds": seconds})
    lines.close()
    step = record["from_step"] + 1
    LOG.info("step %d begins, %.1f s after the failure of step %d", step, seconds, record["step"])
