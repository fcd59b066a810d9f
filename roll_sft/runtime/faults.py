"""Faults that a run plants in its own workers, to rehearse what it does then: `debug.faults`.

Loaded where a configuration names one. Promise: a fault happens once in an output folder. A file
says so before it happens, and stays, so that neither new workers nor a new start repeat it.
"""

import contextlib
import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from roll_sft.config.debug import FaultConfig
from roll_sft.runtime.worker import LOG, Worker

HAPPENED = ".fault_{index:02d}"  # in the output folder
LARGEST_FILE = 1 << 16  # bytes that a full disk still takes: a log grows, a shard does not
FOREVER_S = 1e7


def happened(folder: Path, index: int) -> Path:
    """The file that says that fault `index` has happened in the run of `folder`."""
    return folder / HAPPENED.format(index=index)


def with_faults(worker: type[Worker]) -> type[Worker]:
    """`worker` with the faults that its configuration names."""

    class FaultyWorker(worker):  # type: ignore[misc, valid-type]
        """A worker to which things happen."""

        _last_step = 0

        @contextlib.contextmanager
        def _phase(self, phase: str, deadline_s: float) -> Iterator[None]:
            with super()._phase(phase, deadline_s):
                where, _, number = phase.partition(" ")
                if where == "step":
                    self._last_step = int(number)
                for index, fault in enumerate(self._spec.config.debug.faults):
                    where = "start" if where == "rendezvous" else where
                    if self._is_due(fault, where) and _claims(self._spec.logs.parent, index):
                        LOG.warning("fault %d of debug.faults happens: %s", index, fault)
                        _happen(fault, getattr(self, "_engine", None))
                yield

        def _is_due(self, fault: FaultConfig, where: str) -> bool:
            is_timed = where not in ("start", "setup")
            return (
                fault.rank == self._spec.rank
                and fault.where == where
                and (not is_timed or fault.step == self._last_step)
            )

    return FaultyWorker


def _claims(folder: Path, index: int) -> bool:
    """Whether the fault has not happened yet; from now on it has."""
    try:
        happened(folder, index).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _happen(fault: FaultConfig, engine: Any) -> None:
    match fault.kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(FOREVER_S)
        case "spin":
            ctypes.PyDLL(None).pause()  # a call through PyDLL keeps the interpreter's lock
        case "error":
            raise RuntimeError("planted by debug.faults")
        case "nan":
            next(engine.chunks[0].parameters()).data.fill_(float("nan"))
        case "full_disk":
            # The kernel refuses what goes beyond, as it does where a disk is full.
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, hard))
