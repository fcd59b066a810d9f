"""Notices that a node of the run leaves its cluster: a spot instance, or a node to be serviced.

Autoscalers and `ray drain-node` tell Ray before they take a node away; the processes there go on
until the deadline. Ray has no public call that says so, and the one here may be gone in another
version: then a node that leaves is what it is without a notice, a node that fails.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import ray
from ray._private.state import state
from ray.exceptions import RayError

LOG = logging.getLogger(__name__)
LOOK_EVERY_S = 2.0


@contextlib.contextmanager
def watching(ask: Callable[[str], None]) -> Iterator[None]:
    """Call `ask` with the reason once a node with an actor of ours is to leave, during the block.

    The process may join the cluster in the block, and leave it again.
    """
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY_S):
            node = _leaving_node() if ray.is_initialized() else None
            if node is not None:
                ask(f"node {node} leaves the cluster")
                return

    thread = threading.Thread(target=look, name="draining nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _leaving_node() -> str | None:
    """The address of a node that is to leave and has an actor of this process, if there is one."""
    get = getattr(state, "get_draining_nodes", None)
    try:
        leaving = set(get()) if get is not None else set()
        if not leaving:
            return None
        job = ray.get_runtime_context().get_job_id()
        actors = state.actor_table(None, actor_state_name="ALIVE").values()
        leaving &= {each["Address"]["NodeID"] for each in actors if each["JobID"] == job}
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return next((addresses.get(node_id, node_id[:8]) for node_id in sorted(leaving)), None)
    except (RayError, RuntimeError, OSError) as error:  # the head is gone; the run sees it itself
        LOG.debug("cannot ask for nodes that leave: %s", error)
        return None
