"""Ends a local Ray cluster with its driver. A program of its own, of the standard library.

A driver that is killed takes the head and the raylet with it. Ray's agents stay for another minute:
they report the end of the raylet to the head, which is gone, with a timeout of 60 s
(`create_check_raylet_task` in ray/_private/process_watcher.py). This program reads a process id a
line until its input ends, which happens when the driver ends for any reason, and then kills those
processes that are still there, and all in the sessions that they lead: a raylet leads that of its
workers, of which a stopped one ends by nothing else. Then it removes the folder of Ray's sockets
and logs, which Ray leaves there for ever.

What runs no file of the folder of Ray, which is the argument, is left alone: the service of a
tracker, or a process of a program that trains, may have been started beside Ray.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

FOLDER = ("--session-dir", "--session_dir")  # options of Ray's processes
MOST_TRIES, PAUSE_S = 20, 0.05  # to remove a folder in which a process that dies still writes


def main() -> None:
    """Wait for the end of standard input, then kill the processes that it named."""
    watched, folders = dict[int, str | None](), set[str]()
    for pid in map(int, sys.stdin):
        if any(sys.argv[1] in word for word in _command(pid)):
            watched[pid] = start_time(pid)
            folders |= session_folders(pid)
    # Whoever has one of these ids now is another process than the one that was named.
    strangers = {pid for pid, started in watched.items() if start_time(pid) not in (None, started)}
    for path in Path("/proc").glob("[0-9]*"):
        pid, session = int(path.name), (_fields(int(path.name)) or [""] * 4)[3]
        named = {pid, int(session)} if session else {pid}
        if (named & watched.keys()) - strangers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    remove(folders)


def session_folders(pid: int) -> set[str]:
    """The folder of Ray's cluster that the process belongs to, by its command line."""
    options = (word.partition("=") for word in _command(pid))
    return {folder for name, _, folder in options if name in FOLDER}


def remove(folders: Iterable[str]) -> None:
    """Remove folders of clusters that have ended, and Ray's link to the newest, if it is theirs."""
    for folder in map(Path, folders):
        latest = folder.with_name("session_latest")
        with contextlib.suppress(OSError):
            if latest.readlink() == folder:
                latest.unlink()
        for _ in range(MOST_TRIES):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(PAUSE_S)


def _command(pid: int) -> list[str]:
    """The command line of the process; empty where there is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return words.split("\0")


def start_time(pid: int) -> str | None:
    """When the process started, in ticks of the kernel; None without such a process.

    The kernel may use a process id again. Id and start time together name one process.
    """
    fields = _fields(pid)
    return None if fields is None else fields[19]


def _fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: state, parent, group, session, ..."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is a name in parentheses, which may hold anything.
    return stat.rpartition(")")[2].split()


if __name__ == "__main__":
    main()
