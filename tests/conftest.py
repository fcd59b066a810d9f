import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, here and in every process that a test starts: pools of threads that wait
# for each other by spinning cost a third of the suite's time where four ranks share two cores.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings

from tests.pool import RankPool

# The same examples on every run: what hypothesis finds by chance belongs in an @example.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layouts",
        action="store_true",
        help="parity at every layout, tied and untied, packed or not, at both micro-batch sizes",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side, what needs Ray is one lane, what needs ranks another, each started once.

    The two come first, since they last longest; all other tests stay together by module.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    in_ray = {item.path for item in items if item.get_closest_marker("ray")}
    in_ranks = {item.path for item in items if "pool" in getattr(item, "fixturenames", ())}

    def lane(path: Path) -> str:
        return "0_ray" if path in in_ray else "1_ranks" if path in in_ranks else f"2_{path}"

    items.sort(key=lambda item: lane(item.path)[0])
    for item in items:
        item.add_marker(pytest.mark.xdist_group(lane(item.path)))


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks, each started once: importing Megatron-Core costs more than most tests."""
    ranks = RankPool()
    yield ranks
    ranks.close()
