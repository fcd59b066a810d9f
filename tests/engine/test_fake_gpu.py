"""`make fake-gpu` in small, and the faults that it must find; needs torch's CUDA build."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.fake_gpu import native

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(native.why_not() is not None, reason=f"make fake-gpu: {native.why_not()}")
def test_a_step_on_fake_gpus_has_no_fault_and_each_planted_fault_is_found() -> None:
    done = subprocess.run(  # a process of its own, which the tool makes a fake one
        [sys.executable, "-m", "tools.fake_gpu", "--self-test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "no plant: 0 faults"
    for plant in ("cpu-tensor", "item", "synchronize"):
        assert any(line.startswith(f"{plant}: 1 fault") for line in lines), done.stdout
