"""Load of the driver's machine, under the names of MLflow's own system metrics.

MLflow's monitors read the values. Its own thread is not used: it stops at the first failure of a
server, imports pandas, and asks the server for the run before each sample.
"""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from roll_sft.tracking.journal import Point

PREFIX = "system/"


class SystemMetrics:
    """Samples of processors, memory, disk and network, and of GPUs where nvidia-ml-py is installed.

    Samples count from 0, or continue after those in `recorded` (metric -> last step).
    """

    def __init__(self, recorded: Mapping[str, int]) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor]
        self._monitors: list[Any] = []
        for kind in kinds:
            with contextlib.suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no driver
                self._monitors.append(kind())
        earlier = [step for name, step in recorded.items() if name.startswith(PREFIX)]
        self._next = max(earlier, default=-1) + 1
        self._sample()  # the first sample of processor time covers no interval
        self._sampled = time.monotonic()

    def points(self, *, every_s: float) -> list[Point]:
        """A sample if the last one is `every_s` seconds old, else an empty list."""
        if time.monotonic() - self._sampled < every_s:
            return []
        self._sampled, step = time.monotonic(), self._next
        self._next += 1
        return [Point(f"{PREFIX}{name}", value, step) for name, value in self._sample().items()]

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return values
