"""Joins a Ray cluster that others started: `cluster.address`, or RAY_ADDRESS.

Promises: an address where nothing listens, and a cluster that asks for another token, are refused
at once, and one that cannot be joined within `JOIN_TIMEOUT_S`. A token goes only where
RAY_AUTH_MODE asks for it, as Ray has it: an address may be anybody's.
"""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import grpc
import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.grpc_utils import init_grpc_channel
from ray.exceptions import RayError

from roll_sft.base.errors import ConfigError, ResourceError, first_line
from roll_sft.config.schema import RunConfig, cluster_address, on_device
from roll_sft.runtime.cluster import QUIET, connected, kept_sigterm, shut_down

CONNECT_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 30.0
HEALTH_CHECK = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # of Ray's gcs_service.proto


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """The cluster at `address` while the block runs."""
    with kept_sigterm():
        _join(address)
    try:
        yield
    finally:
        shut_down()


def with_device_of_cluster(config: RunConfig) -> RunConfig:
    """`config` with `parallel.device` and `model.dtype` decided by the cluster that it joins.

    Unchanged where the run joins no cluster. Raises `ResourceError` where it cannot be joined.
    """
    if config.parallel.device != "auto" or cluster_address(config) is None:
        return config
    with connected(config):
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    return on_device(config, "cuda" if has_gpus else "cpu")


def mute_ray() -> None:
    """Discard the line that Ray writes to stderr at each attempt, and keep Python's stderr.

    The last line on stderr names the cause, and the thread that tries to join cannot be stopped.
    """
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _join(address: str) -> None:
    if "://" in address:
        raise ConfigError(
            f"cluster.address: {address!r} is a URL; give host:port of the cluster's head, or run"
            " the command on the cluster with `ray job submit`"
        )
    joined: Future[None] = Future()

    def init() -> None:
        try:
            ray.init(address=address, **QUIET)
            joined.set_result(None)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            joined.set_exception(error)

    try:
        if address != "auto":  # Ray looks for a cluster on this machine
            _check_listening(address)
            _check_token(address)
        # ray.init tries for minutes and ignores Ctrl-C meanwhile, so a thread waits for it.
        threading.Thread(target=init, name="ray.init", daemon=True).start()
        joined.result(timeout=JOIN_TIMEOUT_S)
    except TimeoutError as error:
        mute_ray()
        reason = f"no Ray cluster answers there within {JOIN_TIMEOUT_S:g} s"
        raise _cannot_join(address, reason) from error
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise _cannot_join(address, first_line(error)) from error


def _check_listening(address: str) -> None:
    """Raise `OSError` or `ValueError` where nothing listens at `address`."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _check_token(address: str) -> None:
    """Raise `ResourceError` where a cluster at `address` lets nobody in with our token, or none.

    Ray itself tries again for 20 s then, and says that it does not reach the cluster.
    """
    with init_grpc_channel(address) as channel:  # with the token, as RAY_AUTH_MODE has it
        try:
            channel.unary_unary(HEALTH_CHECK)(b"", timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                return  # ray.init says what else there is
            does = "refuses the token" if is_token_auth_enabled() else "asks for a token"
            raise ResourceError(
                f"cluster.address: {address} {does}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or"
                " the file ~/.ray/auth_token to the token of the cluster's head"
            ) from error


def _cannot_join(address: str, reason: str) -> ResourceError:
    return ResourceError(
        f"cluster.address: cannot join {address!r}: {reason}; start it with `ray start --head`, or"
        " leave cluster.address and RAY_ADDRESS empty for a local cluster"
    )
