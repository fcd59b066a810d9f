"""Where the ranks of a run sit: check the resources, wait for them, reserve them.

Assumes a connection to Ray and nothing about the cluster. Promises that what cannot fit is refused
with a table of what is wanted and what there is, at once where it can never fit and within
`placement_timeout_s` where others hold it. Ranks of one tensor-parallel group share a bundle, a
bundle never spans nodes, and ranks go node by node.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from roll_sft.base.errors import ResourceError
from roll_sft.config.schema import ParallelConfig, RunConfig, cluster_address, on_device
from roll_sft.runtime.cluster import connected

LOG = logging.getLogger(__name__)
PATIENCE_S = 3.0  # a wait that lasts longer is announced


@dataclass(frozen=True, slots=True)
class Slots:
    """Where ranks go: rank r runs in bundle `bundle_of_rank[r]` of `group`."""

    group: PlacementGroup
    bundle_of_rank: tuple[int, ...]
    device: str  # cpu | cuda
    cpus_per_worker: int


def with_device_of_cluster(config: RunConfig) -> RunConfig:
    """`config` with `auto` decided by the cluster that it joins; as it is where it joins none.

    Raises `ResourceError` where that cluster does not answer.
    """
    if config.parallel.device != "auto" or cluster_address(config) is None:
        return config
    with connected(config):
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    return on_device(config, "cuda" if has_gpus else "cpu")


@contextlib.contextmanager
def reserved(config: RunConfig) -> Iterator[Slots]:
    """The resources of a run while the block runs. Raises `ResourceError` (exit 4), with a table.

    They go back to the cluster after the block, or when this process ends.
    """
    parallel = config.parallel
    tensor_size = parallel.tensor_model_parallel_size
    device = parallel.device
    assert device != "auto", "the device is decided before resources are reserved"
    bundle = {"CPU": float(tensor_size * parallel.cpus_per_worker)}
    if device == "cuda":
        bundle["GPU"] = float(tensor_size)
    num_bundles = parallel.num_workers // tensor_size
    if _bundles_that_fit(bundle) < num_bundles:
        raise ResourceError(_shortfall(parallel, bundle, verdict="the cluster can never hold"))
    group = placement_group([bundle] * num_bundles, strategy="PACK")
    try:
        _wait_for(group, parallel, bundle)
        node_of_bundle = placement_group_table(group)["bundles_to_node_id"]
        yield Slots(
            group,
            bundle_of_rank=_bundles_by_node(node_of_bundle, tensor_size=tensor_size),
            device=device,
            cpus_per_worker=parallel.cpus_per_worker,
        )
    finally:
        remove_placement_group(group)


def _wait_for(group: PlacementGroup, parallel: ParallelConfig, bundle: Mapping[str, float]) -> None:
    ready, timeout_s = group.ready(), parallel.placement_timeout_s
    if not ray.wait([ready], timeout=min(PATIENCE_S, timeout_s))[0]:
        LOG.info("waiting up to %g s for %d workers' resources", timeout_s, parallel.num_workers)
    try:
        ray.get(ready, timeout=max(0.0, timeout_s - PATIENCE_S))
    except GetTimeoutError as error:
        verdict = f"others hold, after {timeout_s:g} s, what is left does not hold"
        raise ResourceError(_shortfall(parallel, bundle, verdict=verdict)) from error


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _bundles_that_fit(bundle: Mapping[str, float]) -> int:
    """How many bundles the nodes hold when nothing else runs, each node for itself."""
    return sum(
        min(int(node["Resources"].get(name, 0) // amount) for name, amount in bundle.items())
        for node in _nodes()
    )


def _bundles_by_node(node_of_bundle: Mapping[int, str], *, tensor_size: int) -> tuple[int, ...]:
    """The bundle of each rank: node by node, so that neighbouring ranks are close on the wire."""
    nodes = list(dict.fromkeys(node_of_bundle[bundle] for bundle in sorted(node_of_bundle)))
    ordered = sorted(
        node_of_bundle, key=lambda bundle: (nodes.index(node_of_bundle[bundle]), bundle)
    )
    return tuple(bundle for bundle in ordered for _ in range(tensor_size))


def _shortfall(parallel: ParallelConfig, bundle: Mapping[str, float], *, verdict: str) -> str:
    """The table of wanted and available, with the verdict and the remedy as its last line."""
    free = ray.available_resources()
    num_bundles = parallel.num_workers // parallel.tensor_model_parallel_size
    rows = [("resource", "wanted", "in total", "free now")]
    for name, amount in bundle.items():
        total = sum(node["Resources"].get(name, 0) for node in _nodes())
        wanted = amount * num_bundles
        rows.append((name, f"{wanted:g}", f"{total:g}", f"{free.get(name, 0):g}"))
    for node in _nodes():
        own = ", ".join(f"{name} {node['Resources'].get(name, 0):g}" for name in bundle)
        rows.append((f"node {node['NodeManagerAddress']}", "", own, ""))
    table = "\n".join("  ".join(cell.ljust(18) for cell in row).rstrip() for row in rows)
    each = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    return (
        f"{table}\nparallel.num_workers: {parallel.num_workers} workers need {num_bundles} x"
        f" ({each}), each of these on one node, which {verdict}; lower num_workers or the degrees,"
        " or add nodes"
    )
