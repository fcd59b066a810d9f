"""What a command says where it ends."""

import pytest
import torch

from roll_sft.base.errors import KILLED, report, why_ended


def test_a_gpu_without_memory_is_no_fault_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """Behind every door: torchrun's has no driver that explains a worker's error."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
    assert report(error) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "train.micro_batch_tokens" in lines[0]
    assert lines[0].endswith("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("code", "errors", "why"),
    [
        (6, "a warning\nit is broken\n", "it is broken"),
        (-9, "a warning\n", KILLED),
        (-11, "", "exit code -11 without a message"),
    ],
)
def test_why_a_process_ended(code, errors, why):
    assert why_ended(code, errors) == why
