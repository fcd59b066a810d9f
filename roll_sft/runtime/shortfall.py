"""A table of what a run wants and the cluster lacks. Loaded where a run cannot be placed."""

from collections.abc import Mapping

import ray

from roll_sft.config.schema import ParallelConfig
from roll_sft.runtime.cluster import alive_nodes


def table_of(parallel: ParallelConfig, bundle: Mapping[str, float], *, reason: str) -> str:
    """A table of wanted and available resources; the last line has the reason and the remedy."""
    free = ray.available_resources()
    num_bundles = parallel.num_workers // parallel.tensor_model_parallel_size
    rows = [("resource", "wanted", "in total", "free now")]
    for name, amount in bundle.items():
        total = sum(node["Resources"].get(name, 0) for node in alive_nodes())
        wanted = amount * num_bundles
        rows.append((name, f"{wanted:g}", f"{total:g}", f"{free.get(name, 0):g}"))
    for node in alive_nodes():
        own = ", ".join(f"{name} {node['Resources'].get(name, 0):g}" for name in bundle)
        rows.append((f"node {node['NodeManagerAddress']}", "", own, ""))
    table = "\n".join("  ".join(cell.ljust(18) for cell in row).rstrip() for row in rows)
    each = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    return (
        f"{table}\nparallel.num_workers: {parallel.num_workers} workers need {num_bundles} x"
        f" ({each}) on one node each; {reason}, lower parallel.num_workers or"
        " parallel.tensor_model_parallel_size, or add nodes"
    )
