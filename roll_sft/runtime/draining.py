"""Notices that a node of the run leaves its cluster: a spot instance, or a node to be serviced.

Autoscalers and `ray drain-node` tell Ray before they take a node away, and often when; the
processes there go on until then. Ray has no public call that says so, and the one here may be gone
in another version: then a node that leaves is what it is without a notice, a node that fails.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator

import ray
from ray._private.state import state
from ray.exceptions import RayError

LOG = logging.getLogger(__name__)
LOOK_EVERY_S = 2.0


@contextlib.contextmanager
def watching(ask: Callable[[str, float], None]) -> Iterator[None]:
    """Call `ask` once a node with an actor of ours is to leave, during the block.

    It is given the reason, and the seconds until then (infinite where Ray was not told). The
    process may join the cluster in the block, and leave it again.
    """
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY_S):
            leaving = _leaving_node() if ray.is_initialized() else None
            if leaving is not None:
                node, left_s = leaving
                when = "" if math.isinf(left_s) else f" in {left_s:.0f} s"
                ask(f"node {node} leaves the cluster{when}", left_s)
                return

    thread = threading.Thread(target=look, name="draining nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _leaving_node() -> tuple[str, float] | None:
    """The first node to leave that has an actor of this process: its address, and in how long."""
    get = getattr(state, "get_draining_nodes", None)
    try:
        deadlines: dict[str, int] = get() if get is not None else {}  # ms since 1970, 0 for none
        if not deadlines:
            return None
        job = ray.get_runtime_context().get_job_id()
        actors = state.actor_table(None, actor_state_name="ALIVE").values()
        used = {each["Address"]["NodeID"] for each in actors if each["JobID"] == job}
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        leaving = [
            (addresses.get(node, node[:8]), max(0.0, at / 1e3 - time.time()) if at else math.inf)
            for node, at in deadlines.items()
            if node in used
        ]
    except (RayError, RuntimeError, OSError) as error:  # the head is gone; the run sees it itself
        LOG.debug("cannot ask for nodes that leave: %s", error)
        return None
    return min(leaving, key=lambda each: each[1], default=None)
