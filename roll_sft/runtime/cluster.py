"""The Ray cluster of a run: one that it joins, or one of its own.

Assumes Linux. Promises: a cluster of our own never is one that happens to run, lets in nobody
without its token, and ends with the process; SIGTERM keeps its handler. `runtime/joining.py` joins.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from roll_sft.base.errors import ResourceError, first_line
from roll_sft.config.schema import RunConfig, cluster_address

LOG = logging.getLogger(__name__)
MAX_CPUS_PER_CORE = 64  # each worker is a process of 0.5 GiB
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """A Ray cluster while the block runs: `cluster.address`, RAY_ADDRESS, or one of our own.

    A process that is in a cluster already stays there. Raises `ResourceError` (exit 4) where the
    cluster cannot be joined or started.
    """
    if ray.is_initialized():
        yield
        return
    # Without this Ray hides the GPUs of the node from actors that ask for none, with a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cluster_address(config)
    if address is None:
        with _own_cluster(config):
            yield
        return
    from roll_sft.runtime.joining import joined

    with joined(address):
        yield


@contextlib.contextmanager
def _own_cluster(config: RunConfig) -> Iterator[None]:
    with _reaper() as watch:
        try:
            with kept_sigterm():
                _start(config)
            watch(psutil.Process().children(recursive=True))
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _reaper() -> Iterator[Callable[[list[psutil.Process]], None]]:
    """Start `reaper.py`; the function given to the block tells it what to kill after us."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("reaper.py"))]
    # In a session of its own, so that Ctrl-C in the driver's terminal does not end it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as program:

        def watch(processes: list[psutil.Process]) -> None:
            assert program.stdin is not None, "the reaper is given a pipe"
            pids = [process.pid for process in processes if process.pid != program.pid]
            program.stdin.write("".join(f"{pid}\n" for pid in pids).encode())
            program.stdin.flush()

        yield watch


@contextlib.contextmanager
def kept_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM after the block: Ray sets its own, in Python and in C++."""
    handler = signal.getsignal(signal.SIGTERM)
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        yield
    except SystemExit:  # from Ray's handler
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if in_main_thread and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _start(config: RunConfig) -> None:
    num_workers = config.parallel.num_workers
    cores = len(os.sched_getaffinity(0))
    num_cpus = num_workers * config.parallel.cpus_per_worker
    if num_cpus > MAX_CPUS_PER_CORE * cores:
        raise ResourceError(
            f"parallel.num_workers: {num_workers} workers need {num_cpus} CPUs; this machine has"
            f" {cores} cores, which serve at most {MAX_CPUS_PER_CORE * cores}. Lower it, or join a"
            " cluster with cluster.address."
        )
    if num_cpus > cores:
        LOG.warning("%d workers share %d cores of this machine", num_workers, cores)
    try:
        _make_token_private()
        # address="local" never joins a cluster that happens to run on this machine.
        ray.init(address="local", num_cpus=max(cores, num_cpus), include_dashboard=False, **QUIET)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ResourceError(
            f"cluster: Ray does not start on this machine: {first_line(error)}; its logs are in"
            " /tmp/ray/session_latest/logs"
        ) from error


def _make_token_private() -> None:
    """Create the file of Ray's token with mode 0600: Ray would create it readable by everyone."""
    # https://docs.ray.io/en/latest/ray-security/token-auth.html
    if os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    token.touch(mode=0o600)
    token.chmod(0o600)
