"""What a run must not leave behind, whatever happened to it."""

import contextlib
import re
from pathlib import Path

import psutil
import ray
from filelock import FileLock
from ray.util.placement_group import placement_group_table

from roll_sft.config.schema import RunConfig
from roll_sft.runtime.cluster import connected
from tests.runtime.ray_cluster import is_alive, wait_until

STARTED = re.compile(r"^.*, pid (\d+)\) started$", re.MULTILINE)
GONE_S = 20.0  # Ray ends a stopped process of another node after five seconds


def workers_of(output: Path) -> list[psutil.Process]:
    """The workers that ever wrote a log in `output` and still live."""
    found = []
    for log in (output / "logs").glob("rank_*.log"):
        for pid in STARTED.findall(log.read_text()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(pid))
                if any("ray::" in word for word in process.cmdline()):
                    found.append(process)
    return found


def check_nothing_left(output: Path, cluster: RunConfig | None = None) -> None:
    """No worker, half-written folder, mark or lock in `output`, and nothing reserved in `cluster`.

    `cluster` is a configuration that joins the cluster of the run, where it had not its own.
    """
    processes = workers_of(output)
    wait_until(lambda: not any(map(is_alive, processes)), timeout_s=GONE_S, what="workers are gone")
    marks = [*output.glob("logs/.*"), *output.glob("checkpoints/.staging_*")]
    assert not marks, f"left in the folder of the run: {marks}"
    lock = FileLock(output / ".lock")
    lock.acquire(blocking=False)
    lock.release()
    # Shared memory of torch's carries the id of the process that made it.
    pids = {str(process.pid) for process in processes}
    shared = [path for path in Path("/dev/shm").glob("torch_*") if pids & {*path.name.split("_")}]
    assert not shared, f"left in shared memory: {shared}"
    if cluster is not None:
        with connected(cluster):
            wait_until(_is_free, timeout_s=GONE_S, what="resources are free")


def _is_free() -> bool:
    states = {group["state"] for group in placement_group_table().values()}
    total, free = ray.cluster_resources(), ray.available_resources()
    return states <= {"REMOVED"} and free.get("CPU") == total.get("CPU")
