"""Ends a local Ray cluster that outlives its driver. A program of its own, of the standard library.

A driver that is killed takes the head and the raylet with it. Ray's agents stay for another minute:
they report the end of the raylet to the head, which is gone, with a timeout of 60 s
(`create_check_raylet_task` in ray/_private/process_watcher.py). This program reads a process id a
line until its input ends, which happens when the driver ends for any reason, and then kills those
processes that are still there.
"""

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Wait for the end of standard input, then kill the processes that it named."""
    watched = [(int(line), start_time(int(line))) for line in sys.stdin]
    for pid, started in watched:
        if started is not None and start_time(pid) == started:
            os.kill(pid, signal.SIGKILL)


def start_time(pid: int) -> str | None:
    """When the process started, in ticks of the kernel; None without such a process.

    The kernel may use a process id again. Id and start time together name one process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is a name in parentheses, which may hold anything; the 22nd is the time.
    return stat.rpartition(")")[2].split()[19]


if __name__ == "__main__":
    main()
