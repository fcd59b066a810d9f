"""Ends a local Ray cluster that outlives its driver. A program of its own, of the standard library.

A driver that is killed takes the head and the raylet with it, but Ray's agents stay for another
minute: they report the end of the raylet to the head, which is gone, with a timeout of 60 s
(`create_check_raylet_task` in ray/_private/process_watcher.py). So this program reads lines of
`pid start_time` until its input ends, which it does when the driver ends in whatever way, and then
kills the processes of them that are still there.
"""

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Wait for the end of standard input, then kill what it named."""
    watched = [line.split() for line in sys.stdin]
    for pid, started in watched:
        if start_time(int(pid)) == started:
            os.kill(int(pid), signal.SIGKILL)


def start_time(pid: int) -> str | None:
    """When the process started, in the kernel's ticks; with `pid` it names a process for ever."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is a name in parentheses, which may hold anything; the 22nd is the time.
    return stat.rpartition(")")[2].split()[19]


if __name__ == "__main__":
    main()
