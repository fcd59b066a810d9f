import pytest
from ray.exceptions import ActorDiedError, RayActorError

from roll_sft.runtime import failures
from roll_sft.runtime.failures import Ranks
from roll_sft.runtime.worker import WorkerAddress, log_path, started_line

KILLED = """The actor died unexpectedly before finishing this task.
	class_name: Worker
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes \
include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop"""
TERMINATED = """The actor died unexpectedly before finishing this task.
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker exits unexpectedly. Worker exits with an exit code 1. The process receives a SIGTERM.
"""
NODE = (
    "The actor died because its node has died. Node Id: 9a4943\n\tthe actor's node was terminated"
)
DUMP = """
2026 vm rank 0 INFO step 3
Thread 0x00007f0 [ray_print] (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 324 in wait
Current thread 0x00007f1 (most recent call first):
{frames}
  File "/site-packages/roll_sft/runtime/worker.py", line 155 in train_step
  File "/site-packages/ray/_private/worker.py", line 1069 in main_loop
2026 vm rank 0 INFO said by another thread
"""
COLLECTIVE = '  File "/site-packages/torch/distributed/distributed_c10d.py", line 32 in all_reduce'
READING = '  File "/site-packages/roll_sft/data/tokens/cache.py", line 90 in sample'


@pytest.mark.parametrize(
    ("text", "log", "reason"),
    [
        (KILLED, "", "it was killed, by a signal or by the kernel for want of memory"),
        (KILLED, "Fatal Python error: Bus error\n\nThread", "it crashed (Bus error)"),
        (
            TERMINATED,
            "",
            "Worker exits unexpectedly. Worker exits with an exit code 1. The process receives a"
            " SIGTERM.",
        ),
        (NODE, "", "The actor died because its node has died. Node Id: 9a4943"),
    ],
)
def test_reason_of_a_death_is_one_line(text, log, reason):
    assert failures._reason_of_death(RayActorError(error_msg=text), log) == reason


def test_reason_of_a_death_that_ray_does_not_explain_is_its_first_line():
    reason = failures._reason_of_death(ActorDiedError(), "")
    assert reason == ActorDiedError.BASE_ERROR_MSG


@pytest.mark.parametrize(
    ("frames", "state"),
    [
        (
            COLLECTIVE,
            'waits for its peers in "/site-packages/torch/distributed/distributed_c10d.py",'
            " line 32 in all_reduce",
        ),
        (READING, 'is in "/site-packages/roll_sft/data/tokens/cache.py", line 90 in sample'),
    ],
)
def test_stack_says_where_a_rank_is(frames, state):
    stack = failures.stack_in(DUMP.format(frames=frames))
    assert len(stack) == 3
    assert failures._state(stack) == state


def test_rank_without_a_stack_gives_no_sign_of_life():
    assert failures._state(failures.stack_in("step 3\nstep 4\n")) == "gives no sign of life"


def test_log_of_a_rank_is_read_from_its_last_start_on(tmp_path):
    addresses = [WorkerAddress(0, "vm", "1.2.3.4", "n", pid) for pid in (11, 12)]
    lines = [
        f"{started_line(addresses[0])}\nThread 0x00007f0 (of the run before)\n",
        "x" * 2 * failures.LOG_TAIL_BYTES,
        f"{started_line(addresses[1])}\nhere\n",
    ]
    log_path(tmp_path, 0).write_text("".join(lines))
    assert Ranks((addresses[1],), tmp_path).log(0) == "\nhere\n"
    assert Ranks((), tmp_path / "elsewhere").log(0) == ""


def test_ranks_of_a_long_list_are_counted():
    assert failures._listed([3]) == "rank 3"
    assert failures._listed(range(12)) == "rank 0, 1, 2, 3 and 8 more"


@pytest.mark.parametrize(
    ("frame", "waits"),
    [
        (COLLECTIVE.strip(), True),
        ('File "/m/core/pipeline_parallel/p2p_communication.py", line 9 in _communicate', True),
        ('File "/roll_sft/engine/engine.py", line 64 in read', True),
        ('File "/roll_sft/engine/engine.py", line 64 in build', False),
        (READING.strip(), False),
    ],
)
def test_rank_that_waits_for_others_is_told_from_one_that_works(frame, waits):
    assert failures.is_waiting([frame]) is waits
