"""Ends a local Ray cluster with its driver. A program of its own, of the standard library.

A driver that is killed takes the head and the raylet with it. Ray's agents stay for another minute:
they report the end of the raylet to the head, which is gone, with a timeout of 60 s
(`create_check_raylet_task` in ray/_private/process_watcher.py). This program reads a process id a
line until its input ends, which happens when the driver ends for any reason, and then kills those
processes that are still there, and all in the sessions that they lead: a raylet leads that of its
workers, of which a stopped one ends by nothing else. Then it removes the folder of Ray's sockets
and logs, which Ray leaves there for ever, also where the driver ended before it named a process.
`ENDED` is the last line where the driver has ended Ray: otherwise it may start processes until it
is gone itself.

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

PAUSE_S = 0.05
MOST_ROUNDS = 40  # while a process that dies still writes into the folder
# A raylet that was alone for a moment may have started an agent, which is not seen at once.
ROUNDS_AFTER_A_KILL = 10
ENDED = "ended"
TITLE = "ray::"  # as in ray::DashboardAgent
DRIVER_TIMEOUT_S = 10.0


def main() -> None:
    """Wait for the end of standard input, then end what it named and what runs in the folders."""
    files, earliest = sys.argv[1], Path(sys.argv[2])
    named, least = dict[int, str | None](), ROUNDS_AFTER_A_KILL
    for line in map(str.strip, sys.stdin):
        if line == ENDED:
            least = 1
        elif _names(int(line), files):
            named[int(line)] = start_time(int(line))
    driver, since = int(earliest.name.rpartition("_")[2]), time.monotonic()
    while least > 1 and os.getppid() == driver and time.monotonic() < since + DRIVER_TIMEOUT_S:
        time.sleep(PAUSE_S)
    for number in range(1, MOST_ROUNDS + 1):
        folders = _folders_from(earliest)
        # A driver that was killed while Ray started named no process.
        others = _others()
        inside = [pid for pid in others if any(_is_inside(pid, files, each) for each in folders)]
        is_over = not _kill({pid: start_time(pid) for pid in inside} | named)
        for folder in folders:
            _remove(folder)
        if number >= least and is_over and not any(folder.exists() for folder in folders):
            break
        time.sleep(PAUSE_S)


def _kill(watched: dict[int, str | None]) -> bool:
    """Kill the processes `watched`, id -> start, and their sessions; whether one was there."""
    found = False
    # Whoever has one of these ids now is another process than the one that was named.
    strangers = {pid for pid, started in watched.items() if start_time(pid) not in (None, started)}
    for pid in _others():
        state, _, _, session = (_fields(pid) or ["Z", "", "", "0"])[:4]
        if state != "Z" and ({pid, int(session)} & watched.keys()) - strangers:
            found = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return found


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
    shutil.rmtree(folder, ignore_errors=True)


def _others() -> list[int]:
    """The ids of all processes but this one."""
    pids = {int(path.name) for path in Path("/proc").glob("[0-9]*")}
    return [*(pids - {os.getpid()})]


def _is_inside(pid: int, files: str, folder: Path) -> bool:
    """Whether the process is one of Ray's that belongs to the cluster in `folder`.

    Its command line says so, or else an open file: an agent writes its title over the former.
    """
    if _names(pid, files):
        return _names(pid, str(folder))
    return _names(pid, TITLE) and any(folder in each.parents for each in _open_files(pid))


def _open_files(pid: int) -> list[Path]:
    try:
        return [each.readlink() for each in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []


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
