import pickle

import pytest
import torch
import torch.distributed as dist

from roll_sft.base.errors import CheckpointError, DataError
from roll_sft.runtime import rank_faults
from roll_sft.runtime.rank_faults import RankError
from roll_sft.runtime.worker import WorkerAddress, device_index

ADDRESS = WorkerAddress(3, host="gpu-7", ip="10.0.0.7", node_id="ab12", pid=4711)


def fault_of(error):
    try:
        raise error
    except Exception as raised:  # noqa: BLE001 -- any kind is described
        return rank_faults.fault_of(raised, ADDRESS, phase="step 12")


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited"),
        dist.DistNetworkError("The client socket has timed out after 60000ms"),
        dist.DistStoreError("wait timeout after 60000ms, keys: /default_pg/0"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error"),
        RuntimeError("Connection closed by peer [10.0.0.8]:4242"),
        ConnectionResetError(104, "Connection reset by peer"),
        CheckpointError("step_3: cannot be written: ranks 0: gloo/transport/tcp/pair.cc timed out"),
    ],
)
def test_error_about_a_peer_is_collateral(error):
    assert fault_of(error).is_collateral


@pytest.mark.parametrize(
    "error",
    [
        ValueError("gloom"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        DataError("rows.jsonl:7: is empty; remove it"),
        CheckpointError("step_3: cannot be written: [Errno 28] No space left on device"),
    ],
)
def test_error_of_the_rank_itself_is_not_collateral(error):
    assert not fault_of(error).is_collateral


def test_a_gpu_without_memory_is_said_with_what_helps():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
    fault = fault_of(error)
    assert fault.exit_code == 4
    assert "train.micro_batch_tokens" in fault.summary
    assert fault.summary.endswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "\n" not in fault.summary


def test_error_crosses_the_wire_with_rank_host_phase_and_traceback():
    error = pickle.loads(pickle.dumps(RankError(fault_of(KeyError("lost")))))
    assert str(error) == (
        "rank 3 on gpu-7 (10.0.0.7, pid 4711) failed during step 12: KeyError: 'lost'"
    )
    assert error.fault.exit_code is None
    assert "raise error" in error.fault.details


def test_error_of_a_user_keeps_its_words_and_exit_code():
    fault = fault_of(DataError("rows.jsonl:7: is empty; remove it"))
    assert (fault.summary, fault.exit_code) == ("rows.jsonl:7: is empty; remove it", 3)


def test_long_error_of_a_library_is_its_first_line():
    assert fault_of(RuntimeError("first\nC++ stack\n#0")).summary == "RuntimeError: first"


@pytest.mark.parametrize(
    ("lent", "visible", "index"),
    [
        pytest.param("6", "6", 0, id="Ray shows the worker its own GPU alone"),
        pytest.param("6", "4,5,6,7", 2, id="all of a node's share are shown"),
        pytest.param("6", None, 6, id="nothing is hidden"),
        pytest.param("0", "GPU-8932f937", 0, id="a GPU by its uuid"),
    ],
)
def test_a_rank_uses_the_gpu_that_ray_lent_it(lent, visible, index):
    assert device_index(lent, visible=visible) == index
