"""What a run on one machine shows to others: the ports that it opens, and the words it writes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests import doors
from tests.test_run import served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
assets = doors.assets

SECRETS = {
    "HF_TOKEN": "hf_CanaryCanaryCanary1",
    "MLFLOW_TRACKING_PASSWORD": "Canary2",
    "WANDB_API_KEY": "Canary3",
    "AWS_SECRET_ACCESS_KEY": "Canary4",
}
OF_URL, OF_REFERENCE = "Canary5", "folder-of-Canary6"
ALARMS = ("error", "warning", "died", "killed", "traceback", "failed")


@dataclass(frozen=True)
class Run:
    """What came of a run of two ranks on this machine."""

    folder: Path
    code: int
    console: str
    listening: set[str]  # addresses that its processes listened at
    num_ports: int
    of_ray: dict[str, bytes]  # what Ray had written, shortly before the end


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses and ports that `process` and all that it started listen at."""
    found = set()
    try:
        for each in (process, *process.children(recursive=True)):
            for connection in each.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, connection.laddr.port))
    except psutil.Error:  # one of them has ended: the next look sees the others
        return found
    return found


@pytest.fixture(scope="module")
def trained(assets: Path) -> Iterator[Run]:
    # pytest's own folders have names that are too long for Ray's sockets.
    with (
        tempfile.TemporaryDirectory(prefix="home", dir="/tmp") as name,
        served(assets.parent) as port,
    ):
        folder = Path(name)
        (assets.parent / OF_REFERENCE).symlink_to(assets)
        url = f"http://127.0.0.1:{port}/{OF_REFERENCE}/rows.jsonl"
        password = f"http://me:{OF_URL}@127.0.0.1:{port}/{assets.name}/rows.jsonl"
        arguments = [
            f"model.path={assets / 'model'}",
            "data.train=[{path: '${oc.env:ROWS}'}]",
            f"data.validation=[{{path: '{password}', name: held_out}}]",
            "data.sequence_length=100",
            "data.cache_dir=cache",
            "output_dir=run",
            "parallel.num_workers=2",
            "parallel.device=cpu",
            "train.max_steps=3",
            "train.eval_steps=2",
            "tracking.backends=[mlflow,jsonl]",
        ]
        own = {"HOME": str(folder), "RAY_TMPDIR": str(folder / "ray"), "ROWS": url}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with (folder / "console").open("wb") as console:
            program = subprocess.Popen(
                [sys.executable, "-m", "roll_sft.run", *arguments],
                cwd=folder,
                env={**kept, **own, **SECRETS},
                stdout=console,
                stderr=subprocess.STDOUT,
            )
            found, of_ray = set[tuple[str, int]](), dict[str, bytes]()
            while program.poll() is None:
                found |= listening(psutil.Process(program.pid))
                with contextlib.suppress(OSError):  # a file that goes while it is read
                    of_ray |= doors.contents(folder / "ray")
                time.sleep(0.3)
        yield Run(
            folder,
            program.returncode,
            (folder / "console").read_text(),
            {ip for ip, _ in found},
            len(found),
            of_ray,
        )


def test_a_clean_run_ends_with_0_and_alarms_nobody(trained: Run) -> None:
    assert trained.code == 0, trained.console
    steps = (trained.folder / "run" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3]
    lines = trained.console.splitlines()
    found = [line for line in lines if any(word in line.lower() for word in ALARMS)]
    # Two ranks on a machine of one core, which no run can help.
    assert [line for line in found if "cores of this machine" not in line] == []


def test_ray_leaves_no_folder(trained: Run) -> None:
    assert [*(trained.folder / "ray").rglob("session_*")] == []


def test_nothing_listens_beyond_this_machine(trained: Run) -> None:
    assert trained.num_ports > 8, "Ray, the store and gloo listen"
    assert {ip.removeprefix("::ffff:") for ip in trained.listening} <= {"127.0.0.1", "::1"}


def test_no_secret_is_in_anything_that_a_run_writes(trained: Run) -> None:
    assert any("raylet" in name for name in trained.of_ray), sorted(trained.of_ray)
    written = trained.of_ray | doors.contents(trained.folder)
    for name in ("run/config.yaml", "run/data_report.json", "mlflow.db", "run/hf/README.md"):
        assert name in written, sorted(written)
    for secret in (*SECRETS.values(), OF_URL, OF_REFERENCE):
        assert [name for name, content in written.items() if secret.encode() in content] == []
    assert b"${oc.env:ROWS}" in written["run/config.yaml"]
    assert b"${oc.env:ROWS}" in written["run/data_report.json"]
