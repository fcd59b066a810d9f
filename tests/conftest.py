import gc
import os
import signal
import sys
from collections.abc import Iterator

# Before torch is imported, here and in every process that a test starts: pools of threads that wait
# for each other by spinning cost a third of the suite's time where four ranks share two cores.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Before Ray is imported, which reads it then: the cluster of the tests asks for its token.
os.environ["RAY_AUTH_MODE"] = "token"

import absl.logging
import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.pool import RankPool

# A shell that starts the tests in the background has them ignore Ctrl-C, `nohup` the end of the
# terminal, and their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# absl's handler keeps the stderr of its import, and closes it where Hydra sets up logging and
# stderr is another one by then: here it would close what pytest captures with.
absl.logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

# The same examples on every run: what hypothesis finds by chance belongs in an @example.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layouts",
        action="store_true",
        help="parity at every layout, tied and untied, packed or not, at both micro-batch sizes",
    )


# Side by side, tests that share something costly stay in one process: Ray's cluster is started
# once, and so are the ranks.
LANES = (
    (
        "tests/runtime/",
        "tests/test_cluster.py",
        "tests/submit/",
    ),
    (
        "tests/training/test_driver.py",
        "tests/training/test_nodes.py",
        "tests/training/test_restarts.py",
        "tests/test_killed.py",
    ),
    ("tests/engine/", "tests/parity/"),
    ("tests/checkpoint/", "tests/convert/", "tests/job/"),
)


def lane_of(nodeid: str) -> int:
    """Which of LANES a test is in; their number for all others, which stay together by module."""
    places = (number for number, lane in enumerate(LANES) if nodeid.startswith(lane))
    return next(places, len(LANES))


class Lanes(LoadScopeScheduling):
    """Gives a process a whole lane, or else a whole module."""

    def _split_scope(self, nodeid: str) -> str:
        lane = lane_of(nodeid)
        return f"lane {lane}" if lane < len(LANES) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Lanes:
    return Lanes(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `make test-long` runs. The lanes come first, since these last longest."""
    if not config.getoption("--all-layouts"):
        long = [each for each in items if each.get_closest_marker("long") is not None]
        config.hook.pytest_deselected(items=long)
        items[:] = [each for each in items if each.get_closest_marker("long") is None]
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: lane_of(item.nodeid))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks, each started once: importing Megatron-Core costs more than most tests."""
    ranks = RankPool()
    yield ranks
    ranks.close()
