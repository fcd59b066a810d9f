"""Preparation as a process: its error is the run's, and it ends with the process that began it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from roll_sft.base.errors import ConfigError, WorkerError
from roll_sft.config.build import build_config
from roll_sft.preparing import preparing
from tests.runtime.ray_cluster import is_alive, wait_until

# Stands still, once it has said who it is, where the child begins to prepare.
SITE = """
import os, sys, time
class Standing:
    def find_spec(self, name, path=None, target=None):
        if name == "roll_sft.job.prepare":
            with open(os.environ["PID_FILE"] + ".new", "w") as file:
                file.write(str(os.getpid()))
            os.rename(os.environ["PID_FILE"] + ".new", os.environ["PID_FILE"])
            time.sleep(300)
sys.meta_path.insert(0, Standing())
"""
PARENT = """
import signal, sys
from pathlib import Path
from roll_sft.config.schema import RunConfig
from roll_sft.preparing import preparing
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with preparing(RunConfig(), Path(sys.argv[1])) as prepared:
    prepared()
"""


def test_an_error_of_the_child_is_raised_here_with_its_kind(tmp_path: Path) -> None:
    config = build_config(
        {"model": {"path": str(tmp_path / "none")}, "data": {"train": [{"path": "rows.jsonl"}]}}
    )
    with (
        pytest.raises(ConfigError, match=r"^model\.path: .*none"),
        preparing(config, tmp_path / "job") as prepared,
    ):
        prepared()
    assert not (tmp_path / "job").exists()


def test_a_child_that_finishes_nothing_is_ended_and_its_stacks_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    config = build_config({"cluster": {"prepare_timeout_s": 1}})
    began, where = "within 1 s (cluster.prepare_timeout_s)", "it is in Standing.find_spec"
    with preparing(config, tmp_path / "job") as prepared:
        wait_until((tmp_path / "pid").exists, timeout_s=60, what="the child stands")
        child = psutil.Process(int((tmp_path / "pid").read_text()))
        with pytest.raises(WorkerError) as caught:
            prepared()
    assert began in str(caught.value)
    assert where in str(caught.value)
    assert str(tmp_path / "logs" / "preparing.log") in str(caught.value)
    assert "find_spec" in (tmp_path / "logs" / "preparing.log").read_text()
    assert not is_alive(child)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_ends_with_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    pid_file = tmp_path / "pid"
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PID_FILE": str(pid_file)}
    command = [sys.executable, "-c", PARENT, str(tmp_path / "job")]
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        child = psutil.Process(int(_content(pid_file)))
        parent.send_signal(number)
        parent.wait(60)
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running()
    finally:
        parent.kill()


def test_a_child_whose_parent_has_ended_ends_at_once() -> None:
    program = "import signal, time\nfrom roll_sft.base.child import end_with_parent\n"
    program += "end_with_parent('1', signal.SIGTERM)\ntime.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", program], timeout=30, check=False)
    assert ended.returncode == -signal.SIGTERM


def _content(path: Path) -> str:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, "the child never began"
        time.sleep(0.05)
    return path.read_text()
