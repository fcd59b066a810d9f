"""The Ray cluster of a run and where its ranks sit: start or join, check, reserve.

Assumes nothing about the cluster; promises that what cannot fit is refused with a table of what is
wanted and what there is, at once where it can never fit and within `placement_timeout_s` where
others hold it. Ranks of one tensor-parallel group share a bundle, and a bundle never spans nodes.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from roll_sft.config import RunConfig
from roll_sft.errors import ResourceError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Slots:
    """Where ranks go: rank r runs in bundle `bundle_of_rank[r]` of `group`."""

    group: PlacementGroup
    bundle_of_rank: tuple[int, ...]
    device: str  # cpu | cuda
    cpus_per_worker: int


@contextlib.contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """A Ray cluster while the block runs: `cluster.address`, RAY_ADDRESS, or one of our own."""
    # Without this Ray hides the GPUs of the node from actors that ask for none, with a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ResourceError(
                f"cluster.address: cannot join {address!r}: {reason}; start it with `ray start"
                " --head`, or leave cluster.address and RAY_ADDRESS empty for a local one"
            ) from error
    else:
        _start_local(config, quiet)
    try:
        yield
    finally:
        ray.shutdown()


def reserve(config: RunConfig) -> Slots:
    """Check the resources, then take them. Raises `ResourceError` (exit 4) with a table."""
    parallel = config.parallel
    device = _device(parallel.device)
    tensor_size = parallel.tensor_model_parallel_size
    num_bundles = parallel.num_workers // tensor_size
    bundle = {"CPU": float(tensor_size * parallel.cpus_per_worker)}
    if device == "cuda":
        bundle["GPU"] = float(tensor_size)
    if _bundles_that_fit(bundle) < num_bundles:
        raise ResourceError(_shortfall(config, bundle, "the cluster can never hold"))
    group = placement_group([bundle] * num_bundles, strategy="PACK", name=config.run_name)
    try:
        ray.get(group.ready(), timeout=parallel.placement_timeout_s)
    except GetTimeoutError as error:
        remove_placement_group(group)
        held = f"others hold, after {parallel.placement_timeout_s:g} s, what is left does not hold"
        raise ResourceError(_shortfall(config, bundle, held)) from error
    return Slots(group, _bundle_order(group, tensor_size), device, parallel.cpus_per_worker)


def release(slots: Slots) -> None:
    """Give the reserved resources back."""
    remove_placement_group(slots.group)


def _start_local(config: RunConfig, quiet: dict[str, Any]) -> None:
    cores = os.cpu_count() or 1
    wanted = config.parallel.num_workers * config.parallel.cpus_per_worker
    if config.parallel.device != "cuda" and wanted > cores:
        LOG.warning("%d workers share %d cores of this machine", config.parallel.num_workers, cores)
    # address="local" never joins a cluster that happens to run on this machine.
    ray.init(address="local", num_cpus=max(cores, wanted), include_dashboard=False, **quiet)
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)  # Ray writes it readable by everyone


def _device(asked: str) -> str:
    if asked != "auto":
        return asked
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _bundles_that_fit(bundle: dict[str, float]) -> int:
    """How many bundles the nodes hold when nothing else runs, each node for itself."""
    counts = [
        min(int(node["Resources"].get(name, 0) // amount) for name, amount in bundle.items())
        for node in _nodes()
    ]
    return sum(counts)


def _shortfall(config: RunConfig, bundle: dict[str, float], verdict: str) -> str:
    """The table of wanted and available, with the verdict and the remedy as its last line."""
    parallel = config.parallel
    available = ray.available_resources()
    num_bundles = parallel.num_workers // parallel.tensor_model_parallel_size
    rows = [("resource", "wanted", "in total", "free now")]
    for name, amount in bundle.items():
        total = sum(node["Resources"].get(name, 0) for node in _nodes())
        free = available.get(name, 0)
        rows.append((name, f"{amount * num_bundles:g}", f"{total:g}", f"{free:g}"))
    for node in _nodes():
        own = ", ".join(f"{name} {node['Resources'].get(name, 0):g}" for name in bundle)
        rows.append((f"node {node['NodeManagerAddress']}", "", own, ""))
    table = "\n".join("  ".join(cell.ljust(18) for cell in row).rstrip() for row in rows)
    each = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    return (
        f"{table}\nparallel.num_workers: {parallel.num_workers} workers need {num_bundles} x"
        f" ({each}) with each group on one node, which {verdict}; lower num_workers or the degrees,"
        " or add nodes"
    )


def _bundle_order(group: PlacementGroup, tensor_size: int) -> tuple[int, ...]:
    """Bundles node by node, so that neighbouring ranks are neighbours on the wire."""
    node_of: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    first_seen = {node: index for index, node in reversed(sorted(node_of.items()))}
    ordered = sorted(node_of, key=lambda index: (first_seen[node_of[index]], index))
    return tuple(index for index in ordered for _ in range(tensor_size))
