"""Runs on three nodes, of which one is lost, is about to leave, or shares no storage."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import doors, test_killed
from tests.exact import EXACT, exact
from tests.outcome import Outcome
from tests.runtime.ray_cluster import Program
from tests.runtime.ray_nodes import Node, Nodes, ray_nodes
from tests.training.test_driver import arguments_of

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]
assets = doors.assets
lines_of = test_killed.lines_of

STEPS = 14
RELATIVE = {"train_loss": 1e-6, "grad_norm": 5e-5}  # promise 1, on another layout


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    """A head and two more nodes of one CPU each."""
    with ray_nodes() as nodes:
        nodes.head()
        nodes.join()
        nodes.join()
        yield nodes


class Run(Program):
    """The main job on `cluster`, with results in `output`."""

    def __init__(self, cluster: Nodes, assets: Path, output: Path, **overrides: object) -> None:
        self.log = output / "steps.jsonl"
        keys: dict[str, object] = {
            "cluster__address": cluster.address,
            "train__max_steps": STEPS,
            "train__num_train_epochs": 9,
            "train__save_steps": 4,
            "train__global_batch_size": 6,
            "checkpoint__hf_export": "none",
            "data__validation": "[]",
            "tracking__backends": "[jsonl]",
        }
        arguments = arguments_of(assets, output, **{**keys, **overrides})
        folder = output.parent / f"{output.name}_{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        variables = cluster.token_variables
        super().__init__("-m", "roll_sft.run", *arguments, folder=folder, environment=variables)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(
            lambda: self.log.exists() and self.log.read_text().count("\n") >= step,
            timeout_s=180,
            what=f"step {step}",
        )

    def ended(self, *, timeout_s: float = 240) -> Outcome:
        """How the run ends, and that nothing of it is left."""
        return Outcome(self.wait(timeout_s=timeout_s), self.output, self.errors)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return lines_of(self.log)


@pytest.fixture
def run(cluster: Nodes, assets: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts runs, and ends what is left of them."""
    runs: list[Run] = []

    def start(name: str, **overrides: object) -> Run:
        runs.append(Run(cluster, assets, tmp_path / "runs" / name, **overrides))
        return runs[-1]

    yield start
    for each in runs:
        each.close()


def node_to_lose(cluster: Nodes) -> Node:
    """One with a worker that is not the head, where the driver is."""
    return next(node for node in cluster.nodes[1:] if node.has_worker)


def restarts_of(run: Run) -> list[dict[str, Any]]:
    return lines_of(run.log.parent / "restarts.jsonl")


def told(label: str, run: Run, lost_at: float) -> dict[str, Any]:
    """Print the figures of the restart of `run`, which lost a node at `lost_at` of time.time()."""
    (restart,) = restarts_of(run)
    figures = {
        "detected_s": round(restart["time"] - lost_at, 1),
        "back_at_work_s": round(restart["time"] + restart["seconds"] - lost_at, 1),
        "steps_lost": restart["step"] - 1 - restart["from_step"],
    }
    print(label, json.dumps({**restart, **figures}))
    return restart


@pytest.mark.parametrize("raylet_alone", [True, False], ids=["raylet", "machine"])
def test_a_run_that_loses_a_node_goes_on_with_the_nodes_that_are_left(
    raylet_alone: bool, cluster: Nodes, run: Any
) -> None:
    many = {"train__max_steps": 60}  # the head takes some seconds to miss a raylet
    clean = run("clean", **many)
    assert clean.ended().code == 0, clean.errors
    hit = run("hit", **many)
    hit.wait_for_step(6)
    node_to_lose(cluster).kill(raylet_alone=raylet_alone)
    lost_at = time.time()
    assert hit.ended().code == 0, hit.errors
    steps = exact(hit.steps)
    assert steps == exact(clean.steps)
    restart = told("same number of workers", hit, lost_at)
    assert (restart["kind"], restart["num_workers"]) == ("preemption", 2)
    assert restart["from_step"] >= 4


def test_an_elastic_run_goes_on_with_fewer_workers_and_the_same_losses(
    cluster: Nodes, run: Any
) -> None:
    keys = {"parallel__num_workers": 3, "cluster__elastic": True}
    clean = run("clean", **keys)
    assert clean.ended().code == 0, clean.errors
    hit = run("hit", **keys)
    hit.wait_for_step(6)
    node_to_lose(cluster).kill()
    lost_at = time.time()
    assert hit.ended().code == 0, hit.errors
    restart = told("fewer workers", hit, lost_at)
    assert (restart["kind"], restart["num_workers"]) == ("preemption", 2)
    assert [line["step"] for line in hit.steps] == [*range(1, STEPS + 1)]
    for line, wanted in zip(hit.steps, clean.steps, strict=True):
        for key in EXACT:
            if line["step"] <= restart["from_step"] or key not in RELATIVE:
                assert line[key] == wanted[key], (line["step"], key)
            else:
                assert line[key] == pytest.approx(wanted[key], rel=RELATIVE[key])
    assert "2 workers in place of 3" in hit.errors
    (told_once,) = {each for each in hit.errors.splitlines() if "in place of" in each}
    assert told_once


def test_a_run_that_is_not_elastic_waits_for_a_node_and_then_says_what_is_missing(
    cluster: Nodes, run: Any
) -> None:
    hit = run("hit", parallel__num_workers=3, parallel__placement_timeout_s=5)
    hit.wait_for_step(5)
    node_to_lose(cluster).kill()
    outcome = hit.ended()
    doors.refused(outcome, 4, "parallel.num_workers: 3 workers need 3 x (1 CPU)")


def test_a_node_that_is_to_leave_ends_the_run_with_a_save_and_the_same_command_goes_on(
    cluster: Nodes, run: Any
) -> None:
    many = {"train__max_steps": 300}  # a notice takes some seconds to arrive
    clean = run("clean", **many)
    assert clean.ended().code == 0, clean.errors
    hit = run("hit", **many)
    hit.wait_for_step(5)
    drained = node_to_lose(cluster)
    cluster.drain(drained, deadline_s=60)
    asked_at = time.time()
    outcome = hit.ended()
    assert outcome.code == 75, outcome.stderr
    assert "leaves the cluster in " in outcome.last_line
    assert "the same command goes on from it" in outcome.last_line
    kept = len(hit.steps)
    print("drain: saved and ended", round(time.time() - asked_at, 1), "s after the notice")
    assert 5 <= kept < 300
    drained.kill()
    again = run("hit", **many)
    assert again.ended().code == 0, again.errors
    assert f"with step {kept + 1}" in again.errors
    steps = exact(again.steps)
    assert steps == exact(clean.steps)


def test_a_node_without_the_shared_cache_is_named_before_training(
    assets: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "runs" / "cache"
    cache.mkdir(parents=True)
    elsewhere = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']
    elsewhere.append(str(cache))
    if subprocess.run([*elsewhere, "true"], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    with ray_nodes() as nodes:
        nodes.head()
        nodes.join()
        nodes.join(before=elsewhere)
        run = Run(nodes, assets, tmp_path / "runs" / "blind", parallel__num_workers=3)
        try:
            outcome = run.ended()
        finally:
            run.close()
    doors.refused(outcome, 4, "data.cache_dir: ", "is not visible on ")
    assert not run.log.exists()
