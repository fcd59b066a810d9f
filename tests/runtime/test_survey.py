"""What the nodes of a cluster report of themselves."""

import tempfile
from pathlib import Path

from roll_sft.config.build import build_config
from roll_sft.runtime.survey import survey
from tests.runtime.ray_cluster import two_nodes


def test_each_node_measures_its_devices_and_says_what_it_sees() -> None:
    cluster = two_nodes()
    config = build_config({"cluster": {"address": cluster.address}})
    with tempfile.TemporaryDirectory() as folder:
        places = {"output_dir": Path(folder) / "run"}
        if cluster.apart is not None:
            places["data.cache_dir"] = cluster.apart
        nodes = survey(config, places, seconds=0.2)
        assert not list(Path(folder).iterdir())  # nothing is left
    assert len(nodes) == 2
    assert all(each["devices"][0]["tflops"] > 0 for each in nodes), nodes
    assert all(abs(each["skew_s"]) < 60 for each in nodes)
    assert [each["sees"]["output_dir"] for each in nodes] == [True, True]
    if cluster.apart is not None:
        assert sorted(each["sees"]["data.cache_dir"] for each in nodes) == [False, True]
