import contextlib
import pickle
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import ray

from roll_sft.base.errors import ConfigError, DataError, ResourceError, WorkerError
from roll_sft.base.metrics import EvalMetrics
from roll_sft.data.tokens.cache import TokenData
from roll_sft.runtime import group as group_module
from roll_sft.runtime.cluster import reserved
from roll_sft.runtime.group import WorkerGroup
from roll_sft.runtime.worker import log_path
from tests.runtime.light import NO_INPUTS, LightWorker, gloo_worker, light_worker, plan
from tests.runtime.ray_cluster import is_alive, wait_until

pytestmark = pytest.mark.slow
DEADLINE_S = 1.0


@pytest.fixture
def workers(joined, monkeypatch, tmp_path):
    """Starts a group of workers of a class; ends it and gives its resources back."""
    with contextlib.ExitStack() as stack:

        def start(kind=LightWorker, *, start=True, **sections):
            sections.setdefault("parallel", {"num_workers": 2, "tensor_model_parallel_size": 2})
            monkeypatch.setattr(group_module, "Worker", kind)
            monkeypatch.setattr(group_module, "DEADLINE_GRACE_S", 1.0)
            config = joined(**sections)
            slots = stack.enter_context(reserved(config))
            group = WorkerGroup(config, slots=slots, logs=tmp_path / "logs")
            stack.callback(group.kill)
            if start:
                group.start(*NO_INPUTS)
            return group

        yield start


class Counting:
    """An actor handle that counts the calls made through it."""

    def __init__(self, actor, calls):
        self._actor, self._calls = actor, calls

    def __getattr__(self, verb):
        self._calls[verb] += 1
        return getattr(self._actor, verb)


def error_of(group, *, step=1):
    with pytest.raises((WorkerError, DataError)) as caught:
        group.wait_step(group.train_step(plan(step), learning_rate=0.1))
    return caught.value


def process_of(group, rank):
    return psutil.Process(group.addresses[rank].pid)


# Verbs


def test_one_message_goes_to_each_worker_for_each_verb(workers, monkeypatch, tmp_path):
    group = workers(parallel={"num_workers": 4, "tensor_model_parallel_size": 2})
    calls = [Counter() for _ in range(4)]
    counting = [Counting(*pair) for pair in zip(group._actors, calls, strict=True)]
    monkeypatch.setattr(group, "_actors", counting)
    pending = [group.train_step(plan(step, data_size=2), learning_rate=0.1) for step in (1, 2, 3)]
    metrics = [group.wait_step(each) for each in pending]
    evaluation = group.evaluate("v", [plan(chunk, data_size=2) for chunk in (1, 2, 3, 4, 5)])
    group.begin_save(tmp_path)
    question = group.is_saved()
    group.finish_save()
    monkeypatch.undo()
    assert (
        calls
        == [
            {
                "train_step": 3,
                "evaluate": 5,
                "begin_save": 1,
                "is_saved": 1,
                "finish_save": 1,
            }
        ]
        * 4
    )
    assert group.answers_of(question) == [True] * 4
    assert [each.step for each in metrics] == [1, 2, 3]
    assert (metrics[0].loss_sum, metrics[0].supervised_tokens) == (120.0, 60)
    assert evaluation == EvalMetrics(loss_sum=7.5, supervised_tokens=15)
    assert sorted(path.name for path in tmp_path.glob("*.distcp")) == [
        f"__{i}_0.distcp" for i in range(4)
    ]


def test_tensor_ranks_get_equal_work_and_data_ranks_their_own(workers):
    group = workers(parallel={"num_workers": 4, "tensor_model_parallel_size": 2})
    group.wait_step(group.train_step(plan(1, data_size=2), learning_rate=0.1))
    seen = [ray.get(actor.seen.remote())[0] for actor in group._actors]
    first, second = ((0,), (1,), (2,)), ((3,), (4,), (5,))
    assert seen == [first, first, second, second]


def test_work_on_the_wire_is_a_few_kilobytes_even_for_a_large_batch():
    work = plan(7, data_size=8, samples_per_rank=512).work_for(3, learning_rate=0.1)
    assert len(pickle.dumps(work)) < 8192


def test_ranks_sit_node_by_node_and_say_where(workers):
    group = workers(parallel={"num_workers": 4})
    nodes = [address.node_id for address in group.addresses]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert [address.rank for address in group.addresses] == [0, 1, 2, 3]
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    assert all(address.ip == alive[address.node_id] for address in group.addresses)


# Errors


def test_error_of_a_user_names_rank_and_host_and_keeps_its_kind(workers, caplog):
    def fault(rank, step):
        if rank == 1:
            raise DataError("rows.jsonl:7: is empty; remove it")

    group = workers(light_worker(fault))
    error = error_of(group)
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{group.addresses[1]} failed during step 1: rows.jsonl:7: is")
    assert "Traceback" not in caplog.text


def test_rank_that_failed_repeats_its_error_and_works_no_more(workers):
    def fault(rank, step):
        if (rank, step) == (1, 1):
            raise KeyError("lost")

    group = workers(light_worker(fault))
    first, second = error_of(group), error_of(group, step=2)
    assert str(first) == str(second)
    assert "failed during step 1: KeyError: 'lost'" in str(first)
    assert [len(ray.get(actor.seen.remote())) for actor in group._actors] == [2, 1]


def test_worker_that_cannot_start_says_why(workers, tmp_path):
    log_path(tmp_path / "logs", 1).mkdir(parents=True)  # a folder where a file is wanted
    group = workers(start=False)
    with pytest.raises(ResourceError, match=r"rank 1 on .*/rank_01\.log: .* Is a directory"):
        group.start(*NO_INPUTS)


def test_worker_that_cannot_be_made_says_why(workers):
    class Broken(LightWorker):
        def __init__(self, spec):
            raise ImportError("no module named nowhere")

    group = workers(Broken, start=False)
    with pytest.raises(WorkerError, match=r"rank \d\b.*nowhere"):
        group.start(*NO_INPUTS)


def test_error_of_one_rank_comes_before_those_of_the_peers_it_left(workers, caplog):
    def fault(rank, step):
        if (rank, step) == (1, 2):
            raise ValueError("the true cause")

    group = workers(gloo_worker(fault))
    group.wait_step(group.train_step(plan(1), learning_rate=0.1))
    error = error_of(group, step=2)
    assert str(error).startswith(f"{group.addresses[1]} failed during step 2: ValueError: the true")
    assert str(log_path(group._logs, 1)) in str(error)
    assert "raise ValueError" in caplog.text


def test_death_of_one_rank_comes_before_the_broken_connections_of_its_peers(workers):
    def fault(rank, step):
        if (rank, step) == (1, 2):
            time.sleep(60)

    group = workers(gloo_worker(fault))
    group.wait_step(group.train_step(plan(1), learning_rate=0.1))
    pending = group.train_step(plan(2), learning_rate=0.1)
    victim = process_of(group, 1)
    time.sleep(0.3)
    victim.kill()
    with pytest.raises(WorkerError) as caught:
        group.wait_step(pending)
    message = (
        f"{group.addresses[1]} died during step 2: it was killed, by a signal or by the kernel"
    )
    assert str(caught.value).startswith(message)
    # The peer's own error is of the kind that gives way.
    with pytest.raises(ray.exceptions.RayTaskError) as peer:
        ray.get(pending.references[0])
    assert peer.value.cause.fault.is_collateral


def test_crash_is_told_from_a_kill(workers):
    def fault(rank, step):
        if rank == 1:
            import faulthandler

            faulthandler._sigsegv()

    error = error_of(workers(light_worker(fault)))
    assert "died during step 1: it crashed (Segmentation fault); its log is" in str(error)


# Deadlines


def test_rank_that_hangs_in_python_is_named_with_the_place_and_its_stack_is_in_its_log(workers):
    def fault(rank, step):
        if rank == 1:
            time.sleep(60)

    group = workers(gloo_worker(fault), cluster={"step_timeout_s": DEADLINE_S})
    error = error_of(group)
    message = str(error)
    assert message.startswith(f"step 1 did not finish within 1 s: {group.addresses[1]} is in ")
    assert "test_group.py" in message
    assert "in fault" in message
    assert "rank 0 waited for that" in message
    log = log_path(group._logs, 1)
    assert str(log) in message
    assert "(most recent call first):" in log.read_text()
    assert "in fault" in log.read_text()


def test_stopped_rank_gives_no_sign_of_life(workers):
    group = workers(gloo_worker(lambda rank, step: None), cluster={"step_timeout_s": DEADLINE_S})
    process = process_of(group, 1)
    process.suspend()
    error = error_of(group)
    process.resume()  # Ray needs five seconds to end one that is stopped, on another node
    assert f"within 1 s: {group.addresses[1]} gives no sign of life; rank 0 waited" in str(error)
    assert "stacks by py-spy:\nProcess" in log_path(group._logs, 1).read_text()
    assert error.may_pass
    assert (error.rank, error.host) == (1, group.addresses[1].host)


def test_rank_that_is_slow_and_makes_progress_is_waited_for(workers, caplog):
    class Slow(gloo_worker(lambda rank, step: None)):
        def setup(self, store, inputs):
            super().setup(store, inputs)
            meet, beat = self._engine._fault, self.beat

            def slowly(rank, step):
                for _micro_batch in range(8 if rank == 1 else 0):
                    time.sleep(DEADLINE_S / 2)
                    beat()
                meet(rank, step)

            self._engine._fault = slowly

    caplog.set_level("INFO")
    # Twice the deadline, since a rank may get no core for a second.
    group = workers(Slow, cluster={"step_timeout_s": 2 * DEADLINE_S})
    result = group.wait_step(group.train_step(plan(1), learning_rate=0.1))
    assert result.step == 1
    assert "step 1 is slow, and goes on: rank 1 makes progress" in caplog.text


def test_stopped_workers_of_this_node_are_gone_after_kill(workers):
    group = workers(parallel={"num_workers": 4})
    here = ray.get_runtime_context().get_node_id()
    stopped = [
        process_of(group, address.rank) for address in group.addresses if address.node_id == here
    ]
    assert len(stopped) == 2
    for process in stopped:
        process.suspend()
    group.kill()
    wait_until(lambda: not any(map(is_alive, stopped)), timeout_s=20, what="gone")


def test_close_is_bounded_where_a_worker_does_not_leave(workers, monkeypatch, caplog):
    class Staying(LightWorker):
        def close(self):
            time.sleep(60)

    monkeypatch.setattr(group_module, "CLOSE_TIMEOUT_S", 1.0)
    group = workers(Staying)
    processes = [process_of(group, rank) for rank in (0, 1)]
    group.close()
    assert "did not close" in caplog.text
    wait_until(lambda: not any(map(is_alive, processes)), timeout_s=20, what="gone")


def test_marks_that_a_killed_driver_left_go_with_the_next_workers(workers, tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in (".shared_0123", ".beat_07", "rank_07.log"):
        (logs / name).touch()
    workers().close()
    assert [*logs.glob(".*")] == []
    assert (logs / "rank_07.log").exists()


def test_a_node_that_does_not_share_the_output_folder_stops_the_run(workers, tmp_path):
    group = workers(start=False)
    # As on a node whose disk is its own: the folder is there, the driver's file is not.
    for path in (tmp_path / "logs").glob(".shared_*"):
        path.unlink()
    with pytest.raises(ConfigError, match=rf"output_dir: '{tmp_path}' on .*"):
        group.start(*NO_INPUTS)


def test_a_node_that_does_not_see_the_tokens_stops_the_run(workers, cluster):
    if cluster.apart is None:
        pytest.skip("this system does not let a process have a mount of its own")
    folder = cluster.apart / "tokens"
    folder.mkdir()
    train = SimpleNamespace(caches=(SimpleNamespace(folder=folder),))
    group = workers(start=False, parallel={"num_workers": 4})
    with pytest.raises(ResourceError) as caught:
        group.start(NO_INPUTS[0], TokenData(train, {}))
    message = str(caught.value)
    assert f"data.cache_dir: '{folder}'" in message
    assert f" on {group.addresses[0].host}" in message
    assert "\n" not in message
