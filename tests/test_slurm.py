"""The SLURM script on two nodes: it trains, saves before the limit, requeues and goes on."""

import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import doors, test_killed
from tests.exact import exact
from tests.runtime.ray_cluster import Program, wait_until
from tests.slurm import Batch, Slurm, may_make_nodes, slurm
from tests.training.test_driver import arguments_of

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
assets = doors.assets
lines_of = test_killed.lines_of
SCRIPT = Path(__file__).parents[1] / "cluster" / "slurm.sh"
STEPS = 40


@pytest.fixture
def nodes() -> Iterator[Slurm]:
    if not may_make_nodes():
        pytest.skip("no namespaces may be made here")
    short = tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp")  # of sockets' names
    with short as folder, slurm(Path(folder), num_nodes=2) as cluster:
        yield cluster


def arguments(assets: Path, output: Path, **overrides: object) -> list[str]:
    keys: dict[str, object] = {
        "train__max_steps": STEPS,
        "train__num_train_epochs": 30,
        "train__global_batch_size": 4,
        "checkpoint__hf_export": "none",
        "data__validation": "[]",
        "tracking__backends": "[jsonl]",
    }
    return arguments_of(assets, output, **{**keys, **overrides})


def start(nodes: Slurm, assets: Path, output: Path, **overrides: object) -> Batch:
    words = arguments(assets, output, **overrides)
    resources = "--num-cpus=1 --object-store-memory=80000000"
    return nodes.sbatch(SCRIPT, *words, PYTHON=sys.executable, RAY_START=resources)


def plain_run(*words: str, folder: Path) -> int:
    """The exit code of a run of the same layout, without SLURM."""
    program = Program("-m", "roll_sft.run", *words, folder=folder)
    try:
        return program.wait(timeout_s=200)
    finally:
        program.close()


def test_a_job_saves_before_its_limit_is_requeued_and_goes_on(
    nodes: Slurm, assets: Path, tmp_path: Path
) -> None:
    output = tmp_path / "runs" / "first"
    log = output / "steps.jsonl"
    batch = start(nodes, assets, output)
    try:
        wait_until(
            lambda: batch.is_over() or (log.exists() and log.read_text().count("\n") >= 3),
            timeout_s=240,
            what="steps",
        )
    finally:
        print(batch.log)  # pytest shows it where the test fails
    assert not batch.is_over(), batch.log
    batch.signal(signal.SIGUSR1)
    assert batch.wait(timeout_s=120) == 75, batch.log
    assert "ended by SIGUSR1: " in batch.log
    assert nodes.requeued() == ["7"]
    assert "slurm.sh: node2: Ray ended after" in batch.log
    # A step of SLURM's ends with all its processes; these end by themselves, too.
    names = ("raylet", "gcs_server", "roll_sft.run")
    wait_until(lambda: not nodes.left(*names), timeout_s=30, what="no process is left")
    kept = len(lines_of(log))
    assert 3 <= kept < STEPS
    again = start(nodes, assets, output)
    assert again.wait(timeout_s=300) == 0, again.log
    assert f"with step {kept + 1}" in again.log
    assert nodes.requeued() == ["7"]
    hosts = {re.findall(r"on (\S+) \(", path.read_text())[0] for path in output.glob("logs/*")}
    assert hosts == {"node1", "node2"}, "a worker on each node"
    whole = tmp_path / "runs" / "whole"
    assert plain_run(*arguments(assets, whole), folder=tmp_path) == 0
    assert exact(lines_of(log)) == exact(lines_of(whole / "steps.jsonl"))


def test_another_exit_code_ends_the_job(nodes: Slurm, assets: Path, tmp_path: Path) -> None:
    batch = start(nodes, assets, tmp_path / "out", data__train="[{path: /no/such.jsonl}]")
    assert batch.wait(timeout_s=240) == 3, batch.log
    assert nodes.requeued() == []
