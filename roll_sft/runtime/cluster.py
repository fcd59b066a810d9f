"""The Ray cluster of a run: one of our own, or one that is joined.

Assumes Linux. Promises: a cluster of our own is never one that happens to run, lets in nobody
without its token, and ends with the process; an address that cannot be joined is refused within
seconds and says why; SIGTERM still means what it meant before Ray started.
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

import grpc  # type: ignore[import-untyped]
import psutil
import ray
from ray.exceptions import RayError

from roll_sft.base.errors import ConfigError, ResourceError, first_line
from roll_sft.config.schema import RunConfig, cluster_address
from roll_sft.runtime import reaper

LOG = logging.getLogger(__name__)
PROBE_TIMEOUT_S = 5.0
MOST_CPUS_PER_CORE = 64  # of workers that share a core; each is a process of 0.5 GiB
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
AUTH_MODE = "RAY_AUTH_MODE"


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """A Ray cluster while the block runs: `cluster.address`, RAY_ADDRESS, or one of our own.

    Where this process is in a cluster already, because who called us joined it, that one is used
    and stays. Raises `ResourceError` (exit 4) where there is none to have.
    """
    if ray.is_initialized():
        yield
        return
    # Without this Ray hides the GPUs of the node from actors that ask for none, with a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cluster_address(config)
    with _local(config) if address is None else _joined(address):
        yield


@contextlib.contextmanager
def _local(config: RunConfig) -> Iterator[None]:
    with _reaper() as watch:
        try:
            with _own_sigterm():
                _start(config)
            watch(psutil.Process().children(recursive=True))
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    try:
        with _own_sigterm():
            _join(address)
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _reaper() -> Iterator[Callable[[list[psutil.Process]], None]]:
    """A program that, after this process, kills those that it is given; see `reaper.py`."""
    command = [sys.executable, "-I", reaper.__file__]
    # In a session of its own: what a terminal sends to the driver's is not for it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as program:

        def watch(processes: list[psutil.Process]) -> None:
            assert program.stdin is not None, "the reaper is given a pipe"
            pids = [process.pid for process in processes if process.pid != program.pid]
            lines = [f"{pid} {reaper.start_time(pid)}\n" for pid in pids]
            program.stdin.write("".join(lines).encode())
            program.stdin.flush()

        yield watch


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Give SIGTERM back after the block: Ray takes it, from Python and again from C++."""
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
    cores = len(os.sched_getaffinity(0))
    wanted = config.parallel.num_workers * config.parallel.cpus_per_worker
    if wanted > MOST_CPUS_PER_CORE * cores:
        raise ResourceError(
            f"parallel.num_workers: {config.parallel.num_workers} workers want {wanted} CPUs, and"
            f" this machine has {cores} cores, which serve {MOST_CPUS_PER_CORE * cores} at most;"
            " lower it, or join a cluster with cluster.address"
        )
    if wanted > cores:
        LOG.warning("%d workers share %d cores of this machine", config.parallel.num_workers, cores)
    try:
        if AUTH_MODE not in os.environ:  # as Ray itself does from 2.59 on
            _keep_token_private()
            _use_token()
        # address="local" never joins a cluster that happens to run on this machine.
        ray.init(address="local", num_cpus=max(cores, wanted), include_dashboard=False, **QUIET)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ResourceError(
            f"cluster: Ray does not start on this machine: {first_line(error)}; its logs are in"
            " /tmp/ray/session_latest/logs"
        ) from error


def _keep_token_private() -> None:
    """Make the file that Ray is about to write its token to, for everyone to read, the user's."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    token = _default_token_path()
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    token.touch(mode=0o600)
    token.chmod(0o600)


def _use_token() -> None:
    os.environ[AUTH_MODE] = "token"
    ray._raylet.Config.initialize("")  # Ray read the variable when it was imported


def _join(address: str) -> None:
    if "://" in address:
        raise ConfigError(
            f"cluster.address: {address!r} is a URL; give host:port of the cluster's head, or run"
            " the command on the cluster with `ray job submit`"
        )
    if address != "auto":  # which is looked up among the processes of this machine
        _check_reachable(address)
    try:
        ray.init(address=address, **QUIET)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise _cannot_join(address, first_line(error)) from error


def _check_reachable(address: str) -> None:
    """Refuse an address where no Ray answers: Ray itself would try for minutes.

    Turns token authentication on where the cluster asks for it and the user has a token, which Ray
    does for a cluster on this machine only. Other ways to prove who one is are left to Ray.
    """
    code, details = _ask(address, token="")
    uses_token = os.environ.get(AUTH_MODE, "token").lower() == "token"
    if code == grpc.StatusCode.UNAUTHENTICATED and uses_token:
        code, details = _ask(address, token=_user_token())
        if code == grpc.StatusCode.UNAUTHENTICATED:
            details = "it asks for a token, and there is none here or another one"
            remedy = "set RAY_AUTH_TOKEN, or copy the head's ~/.ray/auth_token to this machine"
            raise _cannot_join(address, details, remedy=remedy)
        _use_token()
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise _cannot_join(address, details)


def _ask(address: str, *, token: str) -> tuple[grpc.StatusCode, str]:
    """Status of one bounded call to the head of a cluster, answered before one has joined."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    # As Ray does; a proxy would answer for the cluster.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", timeout=PROBE_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


def _user_token() -> str:
    """The token of the user, where Ray looks for it, or an empty string."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", _default_token_path()))
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _default_token_path() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _cannot_join(address: str, reason: str, *, remedy: str = "") -> ResourceError:
    remedy = remedy or (
        "start it with `ray start --head`, or leave cluster.address and RAY_ADDRESS empty for a"
        " local one"
    )
    return ResourceError(f"cluster.address: cannot join {address!r}: {reason}; {remedy}")
