"""Checks the cluster for the resources of a run, waits for them and reserves them.

Assumes a connection to Ray. Promises: workers that the cluster can never hold are refused at once,
and within `placement_timeout_s` where other jobs hold the resources, both with a table; ranks of
one tensor-parallel group share a bundle, which lies on one node; ranks are numbered node by node.
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
from roll_sft.config.schema import ParallelConfig, RunConfig

LOG = logging.getLogger(__name__)
SILENT_WAIT_S = 3.0  # a longer wait is logged


@dataclass(frozen=True, slots=True)
class Slots:
    """Where ranks go: rank r runs in bundle `bundle_of_rank[r]` of `group`."""

    group: PlacementGroup
    bundle_of_rank: tuple[int, ...]
    device: str  # cpu | cuda
    cpus_per_worker: int


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
    bundle = {"CPU": float(tensor_size * parallel.cpus_per_worker)}
    if device == "cuda":
        bundle["GPU"] = float(tensor_size)
    num_bundles = parallel.num_workers // tensor_size
    if _bundles_that_fit(bundle) < num_bundles:
        raise ResourceError(_shortfall(parallel, bundle, reason="the cluster has less in total"))
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
    if not ray.wait([ready], timeout=min(SILENT_WAIT_S, timeout_s))[0]:
        LOG.info("waiting up to %g s for %d workers' resources", timeout_s, parallel.num_workers)
    try:
        ray.get(ready, timeout=max(0.0, timeout_s - SILENT_WAIT_S))
    except GetTimeoutError as error:
        reason = (
            f"other jobs still hold them after {timeout_s:g} s (parallel.placement_timeout_s); wait"
        )
        raise ResourceError(_shortfall(parallel, bundle, reason=reason)) from error


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _bundles_that_fit(bundle: Mapping[str, float]) -> int:
    """How many bundles the nodes hold when no other job runs; a bundle lies on one node."""
    return sum(
        min(int(node["Resources"].get(name, 0) // amount) for name, amount in bundle.items())
        for node in _nodes()
    )


def _bundles_by_node(node_of_bundle: Mapping[int, str], *, tensor_size: int) -> tuple[int, ...]:
    """The bundle of each rank, node by node, so that neighbouring ranks share a node."""
    nodes = list(dict.fromkeys(node_of_bundle[bundle] for bundle in sorted(node_of_bundle)))
    ordered = sorted(
        node_of_bundle, key=lambda bundle: (nodes.index(node_of_bundle[bundle]), bundle)
    )
    return tuple(bundle for bundle in ordered for _ in range(tensor_size))


def _shortfall(parallel: ParallelConfig, bundle: Mapping[str, float], *, reason: str) -> str:
    """A table of wanted and available resources; the last line has the reason and the remedy."""
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
        f" ({each}) on one node each; {reason}, lower parallel.num_workers or"
        " parallel.tensor_model_parallel_size, or add nodes"
    )
