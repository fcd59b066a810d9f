"""A real head, a second node, a submitted job over both, and what is left afterwards."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import parity
from tests.runtime.ray_cluster import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def call(
    arguments: list[str], home: Path, *, timeout_s: float = 90, **variables: str
) -> subprocess.CompletedProcess[str]:
    names = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**clean, "HOME": str(home), **variables},
    )


def node(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return call([sys.executable, str(ROOT / "cluster" / "node.py"), *arguments], home)


def submit(
    home: Path, dashboard: int, job: list[str], *options: str
) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, tried again while the head's job agent, which starts last, is not there."""
    command = [
        str(BIN / "ray"),
        "job",
        "submit",
        "--address",
        f"http://127.0.0.1:{dashboard}",
        *options,
        "--",
    ]
    ends = time.monotonic() + 90
    while True:
        result = call([*command, *job], home, timeout_s=240, RAY_AUTH_MODE="token")
        if "try again later" not in result.stdout + result.stderr or time.monotonic() > ends:
            return result
        time.sleep(1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Its owner's home and the dashboard's port: a head and a second node, one CPU each."""
    home = tmp_path_factory.mktemp("home")
    port, dashboard = free_port(), free_port()
    head = node(
        home, "head", "--port", str(port), "--dashboard-port", str(dashboard), "--", "--num-cpus=1"
    )
    assert head.returncode == 0, head.stderr
    joined = node(home, "join", f"127.0.0.1:{port}", "--name", "second", "--", "--num-cpus=1")
    try:
        assert joined.returncode == 0, joined.stderr
        yield home, dashboard
    finally:
        node(home, "stop", "--name", "second")
        node(home, "stop")


def test_the_token_is_for_its_owner_alone(cluster: tuple[Path, int]) -> None:
    token = cluster[0] / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_submitted_job_trains_over_both_nodes(cluster: tuple[Path, int], tmp_path: Path) -> None:
    home, dashboard = cluster
    parity.write_model(tmp_path / "model")
    parity.write_rows(tmp_path / "rows.jsonl")
    job = [
        sys.executable,
        "-m",
        "roll_sft.run",
        f"model.path={tmp_path / 'model'}",
        f"data.train=[{{path: {tmp_path / 'rows.jsonl'}}}]",
        "data.sequence_length=200",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'out'}",
        "parallel.num_workers=2",
        "parallel.device=cpu",
        "train.max_steps=3",
        "train.global_batch_size=8",
        "tracking.backends=[jsonl]",
    ]
    refused = submit(tmp_path, dashboard, ["true"])
    assert refused.returncode != 0
    assert "auth" in (refused.stdout + refused.stderr).lower()
    result = submit(home, dashboard, job)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").open()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert (tmp_path / "out" / "hf" / "model.safetensors").is_file()


def test_a_job_brings_its_checkout_along_and_its_relative_output_dir_is_refused(
    cluster: tuple[Path, int], tmp_path: Path
) -> None:
    home, dashboard = cluster
    for name in ("roll_sft", "conf"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    # Found in the folder that the job brings, or nowhere.
    only_here = "defaults: [base, _self_]\nmodel: {path: m}\ndata: {train: [{path: a.jsonl}]}\n"
    (tmp_path / "conf" / "only_here.yaml").write_text(only_here)
    job = [sys.executable, "-m", "roll_sft.run", "--config-name", "only_here"]
    result = submit(home, dashboard, job, "--working-dir", str(tmp_path))
    assert result.returncode != 0
    assert "under a Ray job it would lie in" in result.stdout + result.stderr


def test_stop_ends_its_own_node_and_no_other(cluster: tuple[Path, int]) -> None:
    home, _ = cluster
    mine, other = (_family(home, name) for name in ("second", "main"))
    assert len(mine) > 3
    assert len(other) > 3
    assert node(home, "head").returncode == 2  # it runs already
    assert node(home, "stop", "--name", "second").returncode == 0
    assert not [process for process in mine if process.is_running()]
    assert all(process.is_running() for process in other)
    # Nothing left to stop is no error.
    assert node(home, "stop", "--name", "second").returncode == 0


def test_a_node_without_the_token_does_not_join(tmp_path: Path) -> None:
    result = node(tmp_path, "join", "127.0.0.1:1")
    assert result.returncode == 2
    assert "copy the head's there" in result.stderr


def _family(home: Path, name: str) -> list[psutil.Process]:
    pid = int((home / ".roll_sft" / "nodes" / f"{name}.pid").read_text().split()[0])
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]
