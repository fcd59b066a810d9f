"""Resources for new workers after a failure: those that are reserved, or what the cluster has left.

Assumes that the process is in the cluster. A node that died is known to the cluster only after some
seconds; until then its agent does not answer, which is seen at once.
"""

import logging
import socket
import time
from dataclasses import replace

import ray
from ray.util.placement_group import remove_placement_group

from roll_sft.base.errors import ResourceError
from roll_sft.config.layout_checks import layout_problems
from roll_sft.config.schema import ParallelConfig, RunConfig
from roll_sft.runtime.cluster import Slots, bundle_of, bundles_that_fit

LOG = logging.getLogger(__name__)
PROBE_TIMEOUT_S = 2.0
NODE_TIMEOUT_S = 90.0  # for the cluster to notice that a node is gone, or for it to answer again
POLL_S = 0.5


def is_node_lost(slots: Slots) -> bool:
    """Whether a node that held workers is gone; waits until the cluster knows of it.

    Ray may have moved what was reserved there to another node by then.
    """
    wait_for_cluster()
    return not slots.nodes <= {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def wait_for_cluster() -> None:
    """Wait until every node that the cluster believes alive answers, for a bounded time."""
    ends = time.monotonic() + NODE_TIMEOUT_S
    silent = _silent_nodes()
    if silent:
        LOG.info("%s does not answer; waiting for the cluster to notice", ", ".join(silent))
    while silent and time.monotonic() < ends:
        time.sleep(POLL_S)
        silent = _silent_nodes()


def _silent_nodes() -> list[str]:
    """Addresses of the nodes that are said to live, and whose agents do not answer."""
    silent = []
    for node in ray.nodes():
        place = (node["NodeManagerAddress"], node["NodeManagerPort"])
        if not node["Alive"]:
            continue
        try:
            socket.create_connection(place, timeout=PROBE_TIMEOUT_S).close()
        except OSError:
            silent.append(node["NodeManagerAddress"])
    return silent


def release(slots: Slots) -> None:
    """Give back what `slots` reserves; `reserved` may do it again."""
    remove_placement_group(slots.group)


def num_workers_left(wanted: RunConfig) -> int:
    """How many workers the cluster can hold, at most those of `wanted`.

    With `cluster.elastic` fewer data-parallel ranks where nodes are missing; else it waits for them
    up to `parallel.placement_timeout_s`. Raises `ResourceError` where not one replica of the model
    fits.
    """
    parallel = wanted.parallel
    ends = time.monotonic() + parallel.placement_timeout_s
    while True:
        most = bundles_that_fit(bundle_of(parallel)) * parallel.tensor_model_parallel_size
        if most >= parallel.num_workers:
            return parallel.num_workers
        if wanted.cluster.elastic:
            break
        if time.monotonic() >= ends:
            return parallel.num_workers  # which `reserved` refuses, with a table
        time.sleep(POLL_S)
    for num_workers in range(most, 0, -1):
        # Experts lie on consecutive ranks of a pipeline stage.
        stage = num_workers // parallel.pipeline_model_parallel_size
        is_whole = stage % parallel.expert_model_parallel_size == 0
        layout = replace(parallel, num_workers=num_workers)
        if is_whole and not list(layout_problems(layout)):
            return num_workers
    raise ResourceError(
        f"cluster.elastic: the nodes that are left hold {most} workers, and one replica of the"
        f" model needs {_replica(parallel)}; add nodes and run the same command again"
    )


def _replica(parallel: ParallelConfig) -> int:
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
