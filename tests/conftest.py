import os
from collections.abc import Iterator

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


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four ranks, started once: importing Megatron-Core costs more than most tests."""
    ranks = RankPool(4)
    yield ranks
    ranks.close()
