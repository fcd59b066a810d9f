from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.runtime.cluster import connected
from tests.runtime.ray_cluster import Cluster, Program, two_nodes

Sections = dict[str, object]


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """Two nodes of two CPUs, for the session."""
    return two_nodes()


@pytest.fixture(scope="module")
def joined(cluster: Cluster) -> Iterator[Callable[..., RunConfig]]:
    """This process in the cluster; makes configurations of runs there, section by section."""

    def config(**sections: Sections) -> RunConfig:
        sections.setdefault("cluster", {})["address"] = cluster.address
        sections.setdefault("parallel", {}).setdefault("device", "cpu")
        return build_config(dict(sections))

    with connected(config()):
        yield config


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts Python programs, and leaves nothing of them."""
    programs: list[Program] = []

    def start(*arguments: str, **environment: str) -> Program:
        programs.append(Program(*arguments, folder=tmp_path, environment=environment))
        return programs[-1]

    yield start
    for each in programs:
        each.close()
