"""Ends a local Ray cluster with its driver. A program of its own, of the standard library.

A driver that is killed takes the head and the raylet with it. Ray's agents stay for another minute:
they report the end of the raylet to the head, which is gone, with a timeout of 60 s
(`create_check_raylet_task` in ray/_private/process_watcher.py). This program reads a process id a
line until its input ends, which happens when the driver ends for any reason, and then kills those
processes that are still there, and all in the sessions that they lead: a raylet leads that of its
workers, of which a stopped one ends by nothing else. Then it removes the folder of Ray's sockets
and logs, which Ray leaves there for ever, also where the driver ended before it named a process.

What runs no file of the folder of Ray, the first argument, is left alone: the service of a tracker,
or a process of a program that trains, may have been started beside Ray. The second is the path that
Ray's folder would have if it were made now: session_TIME_PID, the driver's id at its end.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

MOST_TRIES, PAUSE_S = 20, 0.05  # to remove a folder in which a process that dies still writes


def main() -> None:
    """Wait for the end of standard input, then kill the processes that it named."""
    files, earliest = sys.argv[1], Path(sys.argv[2])
    watched = dict[int, str | None]()
    for pid in map(int, sys.stdin):
        if _names(pid, files):
            watched[pid] = start_time(pid)
    folders = _folders_from(earliest)
    for pid in _others():  # a driver that was killed while Ray started named none
        if _names(pid, files) and any(_names(pid, str(folder)) for folder in folders):
            watched.setdefault(pid, start_time(pid))
    # Whoever has one of these ids now is another process than the one that was named.
    strangers = {pid for pid, started in watched.items() if start_time(pid) not in (None, started)}
    for pid in _others():
        session = (_fields(pid) or [""] * 4)[3]
        named = {pid, int(session)} if session else {pid}
        if (named & watched.keys()) - strangers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for folder in folders:
        _remove(folder)


def _folders_from(earliest: Path) -> list[Path]:
    """The folders of the driver's clusters from `earliest` on."""
    driver = earliest.name.rpartition("_")[2]
    found = earliest.parent.glob(f"session_*_{driver}")
    return [folder for folder in found if folder.name >= earliest.name]


def _remove(folder: Path) -> None:
    """Remove the folder of a cluster that has ended, and Ray's link to the newest, if to it."""
    latest = folder.with_name("session_latest")
    with contextlib.suppress(OSError):
        if latest.readlink() == folder:
            latest.unlink()
    for _ in range(MOST_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(PAUSE_S)


def _others() -> list[int]:
    """The ids of all processes but this one."""
    pids = {int(path.name) for path in Path("/proc").glob("[0-9]*")}
    return [*(pids - {os.getpid()})]


def _names(pid: int, path: str) -> bool:
    """Whether the command line of the process names `path`, or something below it."""
    try:
        return path in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


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
