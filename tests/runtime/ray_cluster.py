"""Ray clusters and processes for tests: made here, found again by a mark, stopped here.

Everything that a test starts carries a mark in its environment, which children inherit. So what is
left of it can be found and stopped without touching anybody else's Ray.
"""

import atexit
import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
MARK = "ROLL_SFT_TEST_MARK"
CPUS_PER_NODE = 2


@dataclass(frozen=True)
class Cluster:
    """A cluster of two nodes of two CPUs on this machine, which asks for a token.

    `apart` is a folder that is another one on the second node, as on a machine of its own; None
    where the system does not let us make one (it takes the right to mount).
    """

    address: str
    token: str
    apart: Path | None


@functools.cache
def two_nodes() -> Cluster:
    """The cluster of this test session, started once; this process may join it."""
    port, mark = free_port(), secrets.token_hex(8)
    elsewhere = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    apart = Path(tempfile.mkdtemp(prefix="apart"))
    can_part = subprocess.run([*elsewhere, str(apart), "true"], capture_output=True).returncode == 0
    cluster = Cluster(f"127.0.0.1:{port}", secrets.token_hex(32), apart if can_part else None)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets allow no long path
    os.environ["RAY_AUTH_TOKEN"] = cluster.token
    environment = {**os.environ, MARK: mark, "RAY_AUTH_MODE": "token"}
    ray_start = [str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats"]
    ray_start += [f"--num-cpus={CPUS_PER_NODE}", "--object-store-memory=80000000"]
    head = ["--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false"]
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(shutil.rmtree, apart, ignore_errors=True)
    atexit.register(lambda: end(marked(mark)))
    second = [*ray_start, f"--address={cluster.address}"]
    for command in ([*ray_start, *head], [*elsewhere, str(apart), *second] if can_part else second):
        started = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120
        )
        assert started.returncode == 0, started.stdout + started.stderr
    return cluster


def marked(mark: str) -> list[psutil.Process]:
    """The processes that carry `mark`, and their descendants.

    Ray's own names for its processes are written over the beginning of their environment.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found |= {each.pid: each for each in process.children(recursive=True)}
                found[process.pid] = process
    return [process for process in found.values() if is_alive(process)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(processes: Iterable[psutil.Process]) -> None:
    """Stop processes that a test started."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until(condition: Callable[[], object], *, timeout_s: float, what: str) -> float:
    """Seconds until `condition` held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.01)
    return time.monotonic() - started


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _heed_signals() -> None:
    """As from a shell: what it starts in the background, or under `nohup`, ignores these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Program:
    """A Python program in a session of its own, with a mark, and all that it starts."""

    def __init__(self, *arguments: str, folder: Path, environment: dict[str, str] | None = None):
        self._mark = secrets.token_hex(8)
        self._output, self._errors = folder / "stdout.txt", folder / "stderr.txt"
        self._family, self._began = set[psutil.Process](), time.time()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                stdout=output,
                stderr=errors,
                env={**inherited, "PYTHONPATH": str(ROOT), **(environment or {}), MARK: self._mark},
                start_new_session=True,
                preexec_fn=_heed_signals,
            )

    @property
    def process(self) -> psutil.Process:
        """The program itself."""
        return psutil.Process(self._process.pid)

    def signal(self, number: int, *, whole_group: bool = False) -> None:
        """Send a signal to the program, or as a terminal does to all in its group."""
        (os.killpg if whole_group else os.kill)(self._process.pid, number)

    def wait_until(self, condition: Callable[[], object], *, timeout_s: float, what: str) -> None:
        """Wait for something that the program does while it runs."""

        def is_over() -> bool:
            return bool(condition()) or self._process.poll() is not None

        wait_until(is_over, timeout_s=timeout_s, what=what)
        assert condition(), f"ended before {what}: {self.errors}"

    def json_line(self, *, timeout_s: float) -> Any:
        """The first line that the program prints, an object."""
        self.wait_until(lambda: "\n" in self.output, timeout_s=timeout_s, what="a line")
        return json.loads(self.output.partition("\n")[0])

    def wait(self, *, timeout_s: float) -> int:
        """The exit code, once the program and all that it started are gone, Ray's folder too."""
        code = self._process.wait(timeout_s)
        try:
            wait_until(lambda: not self.left, timeout_s=15.0, what="no process is left")
        except AssertionError as late:
            left = [each.as_dict(("pid", "ppid", "status", "cmdline")) for each in self.left]
            raise AssertionError(f"{late}: {left}") from None
        folder = Path(tempfile.gettempdir(), "ray")
        sessions = folder.glob(f"session_*_{self._process.pid}")
        assert [path for path in sessions if path.stat().st_ctime > self._began] == []
        return code

    @property
    def left(self) -> list[psutil.Process]:
        """What runs of the program and of all that it started.

        Some of it is known by its parent alone, so ask before the program is killed, too.
        """
        self._family |= set(marked(self._mark))
        return [process for process in self._family if is_alive(process)]

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def close(self) -> None:
        """Leave nothing behind."""
        while left := self.left:
            end(left)
        self._process.wait()
