"""Ends a cluster of our own that is still starting. Loaded where a run ends that early.

`ray.init` cannot be stopped, so what it has started is killed.
"""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

import psutil

from roll_sft.runtime.joining import mute_ray

KILL_TIMEOUT_S = 2.0


def kill_start(started: "Future[None]", others: Sequence[psutil.Process]) -> None:
    """Kill the children of this process but `others`, until the start has ended."""
    mute_ray()
    ends = time.monotonic() + KILL_TIMEOUT_S
    while not started.done() and time.monotonic() < ends:
        for process in psutil.Process().children(recursive=True):
            if process not in others:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        wait([started], timeout=0.1)
