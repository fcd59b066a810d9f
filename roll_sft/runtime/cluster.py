"""The Ray cluster of a run, one that it joins or one of its own, and the resources reserved there.

Assumes Linux. Promises:
- a cluster of our own never is one that happens to run, lets in nobody without its token, and ends
  with the process; its processes have sessions of their own, so that a signal to the group of the
  driver reaches the driver alone, and its folder goes with it; SIGTERM keeps its handler.
  `runtime/joining.py` joins;
- workers that the cluster can never hold are refused at once, and within `placement_timeout_s`
  where other jobs hold the resources, both with a table;
- ranks of one tensor-parallel group share a bundle, which lies on one node; ranks are numbered node
  by node.
"""

import contextlib
import ctypes
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from roll_sft.base.errors import ResourceError, first_line
from roll_sft.config.schema import ParallelConfig, RunConfig, cluster_address

Watch = Callable[[list[psutil.Process]], None]
LOG = logging.getLogger(__name__)
MAX_CPUS_PER_CORE = 64  # each worker is a process of 0.5 GiB
LONGEST_FOLDER = 43  # bytes: 107 of a socket's name, less /session_DATE_PID/sockets/plasma_store
SILENT_WAIT_S = 3.0  # a longer wait for resources is logged
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
SETTINGS = {
    "enable_metrics_collection": False,  # it answers without a token
    # The raylet asks its own object store before that listens, and by default again a second later.
    # As long as before in all, more often.
    "raylet_client_connect_timeout_milliseconds": 20,
    "raylet_client_num_connect_attempts": 500,
}


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """A Ray cluster while the block runs: `cluster.address`, RAY_ADDRESS, or one of our own.

    A process that is in a cluster already stays there. Raises `ResourceError` (exit 4) where the
    cluster cannot be joined or started.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster_address(config)
    if address is None:
        with starting(config) as started:
            started()
            yield
        return
    from roll_sft.runtime.joining import joined

    with joined(address):
        yield


@contextlib.contextmanager
def starting(config: RunConfig, *, as_guest: bool = False) -> Iterator[Callable[[], None]]:
    """Start the cluster that `connected` would start, in a thread, if it would start one.

    The block is given a function that waits for the start, and raises what `connected` does. A
    cluster that is still starting when the block ends is waited for and ended. Where the block
    raises it is killed; not `as_guest`, in a process that goes on all the same.
    """
    if ray.is_initialized() or cluster_address(config) is not None:
        yield lambda: None
        return
    started, leaving, folder = Future[None](), threading.Event(), _ray_folder()

    def start() -> None:
        try:
            with kept_sigterm(), _in_own_sessions():
                _start(config, folder)
            family = psutil.Process().children(recursive=True)
            watch([process for process in family if process not in others])
            started.set_result(None)
        except BaseException as error:  # also a fault: nobody may wait for the start for ever
            started.set_exception(error)
            if not isinstance(error, ResourceError):
                raise
        leaving.wait()  # the kernel kills Ray's processes when the thread that started them ends

    with _reaper(folder, started) as watch:
        others = psutil.Process().children(recursive=True)
        threading.Thread(target=start, name="ray.init", daemon=True).start()
        try:
            yield started.result
            as_guest = True  # an export may follow
        finally:
            if as_guest:  # Ray ends this process a minute after its start was killed
                wait([started])
            if started.done():
                shut_down()
            else:  # `ray.init` cannot be stopped
                from roll_sft.runtime.killed_start import kill_start

                kill_start(started, others)
            leaving.set()


@contextlib.contextmanager
def _reaper(folder: str, started: "Future[None]") -> Iterator[Watch]:
    """Start `reaper.py`; the function given to the block tells it what to kill after us."""
    earliest = f"{folder}/session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    reaper = str(Path(__file__).with_name("reaper.py"))
    command = [sys.executable, "-I", reaper, ray.__path__[0], earliest]
    # In a session of its own, so that Ctrl-C in the driver's terminal does not end it.
    program = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    told: Any = program.stdin

    def watch(processes: list[psutil.Process]) -> None:
        told.write("".join(f"{process.pid}\n" for process in processes).encode())
        told.flush()

    try:
        yield watch
    finally:
        if started.done():  # otherwise its input ends with this process, and Ray's start with it
            program.communicate(b"ended\n")  # reaper.ENDED


def shut_down() -> None:
    """End the cluster of this process, or leave the one that it joined."""
    with kept_sigterm():
        ray.shutdown()


@contextlib.contextmanager
def kept_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, in any thread: Ray sets one, and the default as it ends."""
    ctypes.pythonapi.PyOS_getsig.restype = ctypes.c_void_p
    handler = ctypes.pythonapi.PyOS_getsig(signal.SIGTERM)
    try:
        yield
    finally:
        ctypes.pythonapi.PyOS_setsig(signal.SIGTERM, ctypes.c_void_p(handler))


@contextlib.contextmanager
def _in_own_sessions() -> Iterator[None]:
    """Have each process that this thread starts in the block lead a session of its own.

    For processes that are started with a `preexec_fn`, as all of Ray's are.
    """
    threads, own = _threads_with_sessions(), threading.get_ident()
    threads.add(own)
    try:
        yield
    finally:
        threads.discard(own)


@functools.cache
def _threads_with_sessions() -> set[int]:
    """Identifiers of the threads in `_in_own_sessions`; the hook of a fork cannot be taken back."""
    threads = set[int]()
    os.register_at_fork(
        after_in_child=lambda: os.setsid() if threading.get_ident() in threads else None
    )
    return threads


def _ray_folder() -> str:
    """Where Ray keeps the folders of clusters: its own choice, if sockets can have names there."""
    folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")) + "/ray"
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        from roll_sft.runtime.short_folder import short_folder

        return short_folder()
    return folder


def _start(config: RunConfig, folder: str) -> None:
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
        with _on_loopback():
            # address="local" never joins a cluster that happens to run on this machine.
            ray.init(
                address="local",
                _temp_dir=folder,
                num_cpus=max(cores, num_cpus),
                include_dashboard=False,
                _system_config=SETTINGS,
                **QUIET,
            )
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ResourceError(
            f"cluster: Ray does not start on this machine: {first_line(error)}; its logs are in"
            f" {folder}/session_latest/logs"
        ) from error


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Within the block, a cluster that `ray.init` starts listens on loopback alone.

    Ray takes the address of the network even for `_node_ip_address="127.0.0.1"`, except where
    clusters of several machines are off, as by default on a Mac:
    https://github.com/ray-project/ray/issues/18730
    The variable for this (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER) counts only before Ray is imported,
    and would also keep a run from joining a cluster.
    """
    kept = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


def _make_token_private() -> None:
    """Create the file of Ray's token with mode 0600: Ray would create it readable by everyone."""
    # https://docs.ray.io/en/latest/ray-security/token-auth.html
    if os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    token.touch(mode=0o600)
    token.chmod(0o600)


@dataclass(frozen=True, slots=True)
class Slots:
    """Where ranks go: rank r runs in bundle `bundle_of_rank[r]` of `group`."""

    group: PlacementGroup
    bundle_of_rank: tuple[int, ...]
    device: str  # cpu | cuda
    nodes: frozenset[str]  # that hold a bundle, by their ids


@contextlib.contextmanager
def reserved(config: RunConfig) -> Iterator[Slots]:
    """Reserve the resources of a run while the block runs.

    Ray releases them when this process ends. Raises `ResourceError` (exit 4) with a table of
    resources where the cluster does not have them.
    """
    parallel = config.parallel
    tensor_size = parallel.tensor_model_parallel_size
    device = parallel.device
    assert device != "auto", "the device is decided before resources are reserved"
    bundle = bundle_of(parallel)
    num_bundles = parallel.num_workers // tensor_size
    if bundles_that_fit(bundle) < num_bundles:
        raise _shortfall(parallel, bundle, reason="the cluster has less in total")
    group = placement_group([bundle] * num_bundles, strategy="PACK")
    try:
        _wait_for(group, parallel, bundle)
        node_of_bundle = placement_group_table(group)["bundles_to_node_id"]
        yield Slots(
            group,
            bundle_of_rank=_bundles_by_node(node_of_bundle, tensor_size=tensor_size),
            device=device,
            nodes=frozenset(node_of_bundle.values()),
        )
    finally:
        remove_placement_group(group)


def _wait_for(group: PlacementGroup, parallel: ParallelConfig, bundle: Mapping[str, float]) -> None:
    ready, timeout_s = group.ready(), parallel.placement_timeout_s
    if not ray.wait([ready], timeout=min(SILENT_WAIT_S, timeout_s))[0]:
        LOG.info("waiting up to %g s for %d workers' resources", timeout_s, parallel.num_workers)
    try:
        ray.get(ready, timeout=max(0.0, timeout_s - SILENT_WAIT_S))
    except GetTimeoutError as error:
        reason = (
            f"other jobs still hold them after {timeout_s:g} s (parallel.placement_timeout_s); wait"
        )
        raise _shortfall(parallel, bundle, reason=reason) from error


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray says of each node of the cluster that is alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def bundle_of(parallel: ParallelConfig) -> dict[str, float]:
    """What one tensor-parallel group takes, on one node."""
    tensor_size = parallel.tensor_model_parallel_size
    bundle = {"CPU": float(tensor_size * parallel.cpus_per_worker)}
    if parallel.device == "cuda":
        bundle["GPU"] = float(tensor_size)
    return bundle


def bundles_that_fit(bundle: Mapping[str, float]) -> int:
    """How many bundles the nodes hold when no other job runs; a bundle lies on one node."""
    return sum(
        min(int(node["Resources"].get(name, 0) // amount) for name, amount in bundle.items())
        for node in alive_nodes()
    )


def _bundles_by_node(node_of_bundle: Mapping[int, str], *, tensor_size: int) -> tuple[int, ...]:
    """The bundle of each rank, node by node, so that neighbouring ranks share a node."""
    nodes = list(dict.fromkeys(node_of_bundle[bundle] for bundle in sorted(node_of_bundle)))
    ordered = sorted(
        node_of_bundle, key=lambda bundle: (nodes.index(node_of_bundle[bundle]), bundle)
    )
    return tuple(bundle for bundle in ordered for _ in range(tensor_size))


def _shortfall(parallel: ParallelConfig, bundle: Mapping[str, float], *, reason: str) -> Exception:
    from roll_sft.runtime.shortfall import table_of

    return ResourceError(table_of(parallel, bundle, reason=reason))
