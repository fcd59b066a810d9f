"""What follows where a phase runs out of time: slow ranks are waited for, a stuck one is named.

Loaded when a deadline has passed. A rank shows progress by the time of a file, see `Worker.beat`. A
rank without progress either waits for its peers in a collective, which its stack shows, or is
stuck. Promises: a rank is stuck only after a whole deadline without progress; ranks are waited for
while one that others wait for makes progress; where one is stuck, every late rank has its stacks
in its log, those that are stopped or on other nodes too.
"""

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from roll_sft.base.errors import WorkerError
from roll_sft.config.schema import RunConfig
from roll_sft.runtime import failures
from roll_sft.runtime.failures import Ranks
from roll_sft.runtime.worker import beat_path, log_path

LOG = logging.getLogger(__name__)
SPY_TIMEOUT_S = 5.0  # for one process
SPIES_TIMEOUT_S = 15.0  # for those of other nodes, where a process starts for it


def time_left(phase: str, references: Sequence[Any], *, deadline_s: float, ranks: Ranks) -> float:
    """Seconds until the ranks that still make progress could have missed the deadline.

    `references` has one call a rank. Raises `WorkerError` where a rank is stuck.
    """
    _ready, pending = ray.wait(list(references), num_returns=len(references), timeout=0)
    late = [rank for rank, reference in enumerate(references) if reference in pending]
    if not late:
        return 0.0  # they have answered by now
    idle_s = {rank: _idle_s(ranks.logs, rank) for rank in late}
    moving = [rank for rank in late if idle_s[rank] < deadline_s]
    still = [rank for rank in late if rank not in moving]
    stuck = [rank for rank in still if not failures.is_waiting(failures.stack_in(ranks.log(rank)))]
    if moving and not stuck:
        LOG.info("%s is slow, and goes on: rank %d makes progress", phase, moving[0])
        return min(deadline_s - idle_s[rank] for rank in moving)
    _keep_stacks(still, ranks)
    raise failures.missed_deadline(phase, still, deadline_s=deadline_s, ranks=ranks)


def _idle_s(logs: Path, rank: int) -> float:
    """Seconds since the last sign of progress of `rank`, by the clock of the file system."""
    now = logs / ".beat_now"
    try:
        now.touch()
        # Opened, because NFS asks the server for the times of a file when it is opened.
        with now.open("rb") as mine, beat_path(logs, rank).open("rb") as its:
            return os.fstat(mine.fileno()).st_mtime - os.fstat(its.fileno()).st_mtime
    except OSError:  # it has not come so far
        return float("inf")
    finally:
        with contextlib.suppress(OSError):
            now.unlink()


def _keep_stacks(late: Sequence[int], ranks: Ranks) -> None:
    """Write the stacks of ranks that could not do it themselves to their logs."""
    silent = [rank for rank in late if not failures.stack_in(ranks.log(rank))]
    if not ranks.addresses:  # nobody knows their processes
        return
    here = ray.get_runtime_context().get_node_id()
    waited: dict[Any, int] = {}
    for rank in silent:
        address = ranks.addresses[rank]
        if address.node_id == here:
            _append(ranks, rank, spied(address.pid))
            continue
        remote: Any = ray.remote(spied)
        place = NodeAffinitySchedulingStrategy(address.node_id, soft=False)
        options = remote.options(num_cpus=0, scheduling_strategy=place)
        waited[options.remote(address.pid)] = rank
    if waited:
        ready, _late = ray.wait([*waited], num_returns=len(waited), timeout=SPIES_TIMEOUT_S)
        for reference in ready:
            with contextlib.suppress(RayError):  # the node is gone
                _append(ranks, waited[reference], ray.get(reference))


def stuck_child(pid: int, config: RunConfig, *, log: Path) -> WorkerError:
    """The error of a preparation that shows no progress; stacks of its processes go to `log`."""
    processes = [psutil.Process(pid)]
    processes += processes[0].children(recursive=True)
    stacks = {process.pid: spied(process.pid) for process in processes}
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\n".join(f"process {pid}\n{text}" for pid, text in stacks.items()), "utf-8")
    # The main thread has the number of its process. The last process is the one that works.
    frames = [
        frame
        for pid, text in stacks.items()
        for frame in re.findall(rf"^Thread {pid}\b.*\n +(.+)", text, re.MULTILINE)
    ]
    is_in = f"it is in {frames[-1]}; " if frames else ""
    return WorkerError(
        f"preparing the data finished nothing within {config.cluster.prepare_timeout_s:g} s"
        f" (cluster.prepare_timeout_s): {is_in}the stacks are in {log}"
    )


def spied(pid: int) -> str:
    """The stacks of a process of this node by py-spy, which needs nothing of the process itself."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "py-spy is not installed"
    # Without --nonblocking it would stop the process, and wait for that.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SPY_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}"
    return done.stdout or done.stderr


def _append(ranks: Ranks, rank: int, stacks: str) -> None:
    with log_path(ranks.logs, rank).open("a", encoding="utf-8") as log:
        log.write(f"stacks by py-spy:\n{stacks}\n")
    LOG.error("stacks of %s by py-spy:\n%s", ranks.name(rank), stacks.strip())
