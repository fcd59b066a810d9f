from collections import Counter

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from roll_sft.base.errors import ResourceError
from roll_sft.runtime import cluster
from roll_sft.runtime.cluster import reserved
from roll_sft.runtime.joining import with_device_of_cluster
from tests.runtime.ray_cluster import wait_until

pytestmark = pytest.mark.slow
ALL_CPUS = 4.0


def refusal(config):
    """The message, and whether the refusal waited for resources to become free."""
    waits = []
    wait_for = cluster._wait_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_wait_for", lambda *args: (waits.append(args), wait_for(*args)))
        with pytest.raises(ResourceError) as caught, reserved(config):
            pass
    return str(caught.value), bool(waits)


def free_cpus():
    return ray.available_resources().get("CPU", 0)


def nodes_of(slots):
    node_of_bundle = ray.util.placement_group_table(slots.group)["bundles_to_node_id"]
    return [node_of_bundle[bundle] for bundle in slots.bundle_of_rank]


def test_more_workers_than_the_cluster_has_cpus_are_refused_at_once_with_a_table(joined):
    wait_until(lambda: free_cpus() == ALL_CPUS, timeout_s=60, what="all CPUs are free")
    message, waits = refusal(joined(parallel={"num_workers": 5}))
    assert not waits
    *table, last = message.splitlines()
    assert [row.split() for row in table[:2]] == [
        ["resource", "wanted", "in", "total", "free", "now"],
        ["CPU", "5", "4", "4"],
    ]
    assert [row.split()[-2:] for row in table[2:]] == [["CPU", "2"]] * 2
    assert last.startswith("parallel.num_workers: 5 workers need 5 x (1 CPU)")
    assert "in total" in last


def test_tensor_group_that_no_single_node_holds_is_refused_though_the_total_would_do(joined):
    parallel = {"num_workers": 4, "tensor_model_parallel_size": 4}
    message, waits = refusal(joined(parallel=parallel))
    assert not waits
    assert "4 workers need 1 x (4 CPU) on one node each" in message


def test_gpus_that_nobody_has_are_named(joined):
    message, _waits = refusal(joined(parallel={"num_workers": 2, "device": "cuda"}))
    assert ["GPU", "2", "0", "0"] in [row.split() for row in message.splitlines()]


def test_resources_that_others_hold_are_waited_for_and_then_refused(joined):
    wait_until(lambda: free_cpus() == ALL_CPUS, timeout_s=10, what="all is free")
    held = placement_group([{"CPU": 2}])
    ray.get(held.ready())
    try:
        parallel = {"num_workers": 4, "placement_timeout_s": 2.0}
        message, waits = refusal(joined(parallel=parallel))
    finally:
        remove_placement_group(held)
    assert waits
    assert ["CPU", "4", "4", "2"] in [row.split() for row in message.splitlines()]
    assert "after 2 s (parallel.placement_timeout_s)" in message


def test_resources_that_become_free_in_time_are_taken_and_given_back(joined):
    wait_until(lambda: free_cpus() == ALL_CPUS, timeout_s=10, what="all is free")
    held = placement_group([{"CPU": 2}])
    ray.get(held.ready())
    remove_placement_group(held)
    with reserved(joined(parallel={"num_workers": 4})):
        wait_until(lambda: free_cpus() == 0, timeout_s=5, what="all is taken")
    wait_until(lambda: free_cpus() == ALL_CPUS, timeout_s=5, what="all is given back")


def test_ranks_of_a_tensor_group_share_a_bundle_and_ranks_go_node_by_node(joined):
    with reserved(joined(parallel={"num_workers": 4})) as slots:
        nodes = nodes_of(slots)
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert sorted(slots.bundle_of_rank) == [0, 1, 2, 3]
    parallel = {"num_workers": 4, "tensor_model_parallel_size": 2}
    with reserved(joined(parallel=parallel)) as slots:
        nodes = nodes_of(slots)
    assert slots.bundle_of_rank == (0, 0, 1, 1)
    assert Counter(nodes) == {node: 2 for node in set(nodes)}


def test_bundles_are_ordered_by_node_and_nodes_by_first_bundle():
    node_of_bundle = {3: "a", 0: "b", 1: "a", 2: "b"}
    order = cluster._bundles_by_node(node_of_bundle, tensor_size=2)
    assert order == (0, 0, 2, 2, 1, 1, 3, 3)


@pytest.mark.parametrize(("gpus", "device", "dtype"), [(0, "cpu", "fp32"), (1, "cuda", "bf16")])
def test_device_and_dtype_are_those_of_the_cluster(joined, monkeypatch, gpus, device, dtype):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": float(gpus)})
    config = with_device_of_cluster(joined(parallel={"device": "auto"}))
    assert (config.parallel.device, config.model.dtype) == (device, dtype)
