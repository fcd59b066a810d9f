"""What both doors set for the libraries of a rank."""

import os
import subprocess
import sys

import pytest

from roll_sft.engine.environment import set_variables


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


def test_memory_grows_in_segments_and_a_deterministic_run_fixes_cublas() -> None:
    set_variables(deterministic=True)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    set_variables(deterministic=False)
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.slow
def test_the_engine_is_imported_without_the_compiler_which_stays_usable() -> None:
    script = (
        "import importlib.util, sys, torch\n"
        "from roll_sft.engine.without_compiler import compiler_left_out\n"
        "before = torch.compile\n"
        "with compiler_left_out():\n"
        "    import roll_sft.engine.engine\n"
        "assert torch.compile is before\n"
        "torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict()\n"
        "left = {'torch._dynamo', 'torch._inductor', 'wandb', 'torch.utils.tensorboard'}\n"
        "assert not left & {*sys.modules}\n"
        "assert importlib.util.find_spec('torch.utils.tensorboard')\n"
        "ones = torch.compile(torch.neg, backend='eager')(torch.ones(2))\n"
        "assert ones.tolist() == [-1, -1]\n"
        "assert 'torch._dynamo' in sys.modules\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
