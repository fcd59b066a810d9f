"""The actor of one rank: environment, log file, then `Engine`.

The only module that touches the process environment of a worker, and the one place where the engine
is imported late, so that a head node without CUDA can hold the driver. Every verb adds rank, host
and phase to what goes wrong and re-raises.
"""

import contextlib
import faulthandler
import logging
import os
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import ray
import ray.util

from roll_sft.config import RunConfig, layout_of
from roll_sft.errors import RollSftError
from roll_sft.metrics import EvalMetrics, StepMetrics

if TYPE_CHECKING:
    from roll_sft.data.plan import RankWork
    from roll_sft.engine.inputs import ModelSource, TokenData

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is made from."""

    config: RunConfig
    rank: int
    device: str
    logs: Path


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker runs."""

    rank: int
    host: str
    pid: int


class RankError(Exception):
    """What went wrong on one rank, in a form that survives the wire.

    `is_collateral` marks errors of a collective: another rank left, and its error is the cause.
    """

    def __init__(
        self, address: WorkerAddress, phase: str, summary: str, details: str, exit_code: int | None
    ) -> None:
        super().__init__(address, phase, summary, details, exit_code)
        self.address, self.phase, self.summary = address, phase, summary
        self.details, self.exit_code = details, exit_code

    @property
    def is_collateral(self) -> bool:
        """Whether the error only says that a peer is gone."""
        signs = ("gloo", "Connection closed", "Connection reset", "NCCL", "DistBackendError")
        return self.exit_code is None and any(sign in self.summary for sign in signs)

    def __str__(self) -> str:
        where = f"rank {self.address.rank} on {self.address.host} (pid {self.address.pid})"
        return f"{where} failed during {self.phase}: {self.summary}"


class Worker:
    """One rank. Methods run one at a time, in the order of the calls."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._address = WorkerAddress(spec.rank, ray.util.get_node_ip_address(), os.getpid())
        self._log = _open_log(spec)
        self._resources = contextlib.ExitStack()
        self._store: Any = None
        # Megatron's tensor parallelism relies on one hardware queue to order its kernels.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def address(self) -> WorkerAddress:
        """Where this worker runs."""
        return self._address

    def serve_store(self) -> tuple[str, int]:
        """Rank 0: serve the rendezvous store; returns its host and port."""
        with self._phase("rendezvous", self._spec.config.cluster.setup_timeout_s):
            from roll_sft.engine.parallel import serve_store

            host = self._address.host
            timeout_s = self._spec.config.cluster.setup_timeout_s
            world_size = self._spec.config.parallel.num_workers
            self._store = serve_store(host, world_size=world_size, timeout_s=timeout_s)
            return host, self._store.port

    def setup(self, store: tuple[str, int], inputs: "tuple[ModelSource, TokenData]") -> str | None:
        """Join the process groups and build the engine; returns the GPU's name, if there is one."""
        cluster = self._spec.config.cluster
        with self._phase("setup", cluster.setup_timeout_s):
            import torch

            from roll_sft.engine.engine import Engine
            from roll_sft.engine.parallel import Rendezvous, process_groups

            torch.set_num_threads(self._spec.config.parallel.cpus_per_worker)
            rendezvous = Rendezvous(
                *store,
                rank=self._spec.rank,
                world_size=self._spec.config.parallel.num_workers,
                setup_timeout_s=cluster.setup_timeout_s,
                collective_timeout_s=max(cluster.step_timeout_s, cluster.checkpoint_timeout_s),
            )
            layout = layout_of(self._spec.config.parallel)
            self._resources.enter_context(
                process_groups(rendezvous, layout, device=self._spec.device, store=self._store)
            )
            source, data = inputs
            self._engine = Engine(self._spec.config, source=source, data=data)
            return torch.cuda.get_device_name() if self._spec.device == "cuda" else None

    def train_step(self, work: "RankWork") -> StepMetrics | None:
        """One optimizer step."""
        with self._phase(f"step {work.step}", self._spec.config.cluster.step_timeout_s):
            return self._engine.train_step(work)

    def evaluate(self, name: str, micro_batches: tuple[tuple[int, ...], ...]) -> EvalMetrics | None:
        """One chunk of a validation set."""
        with self._phase(f"evaluation of {name}", self._spec.config.cluster.step_timeout_s):
            return self._engine.evaluate(name, micro_batches)

    def save(self, folder: Path) -> None:
        """Write this rank's shards into `folder`."""
        with self._phase("checkpoint", self._spec.config.cluster.checkpoint_timeout_s):
            self._engine.save(folder)

    def close(self) -> None:
        """Leave the process groups."""
        with self._phase("teardown", self._spec.config.cluster.setup_timeout_s):
            self._resources.close()

    def no_op(self) -> None:
        """Answer; the unit that the driver's cost per step is measured in."""

    @contextlib.contextmanager
    def _phase(self, phase: str, deadline_s: float) -> Iterator[None]:
        """Name the phase in errors; past its deadline, write every thread's stack to the log."""
        faulthandler.dump_traceback_later(deadline_s, file=self._log)
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- a catch point: adds where and re-raises
            details = traceback.format_exc()
            LOG.error("%s\n%s", phase, details)
            lines = str(error).strip().splitlines() or [""]
            code = error.exit_code if isinstance(error, RollSftError) else None
            summary = f"{type(error).__name__}: {lines[0]}" if code is None else str(error)
            raise RankError(self._address, phase, summary, details, code) from None
        finally:
            faulthandler.cancel_dump_traceback_later()


def log_path(logs: Path, rank: int) -> Path:
    """The log file of `rank`."""
    return logs / f"rank_{rank:02d}.log"


def _open_log(spec: WorkerSpec) -> TextIO:
    """The rank's own log; also what its libraries print, and the stack of a crash."""
    spec.logs.mkdir(parents=True, exist_ok=True)
    log = log_path(spec.logs, spec.rank).open("a", buffering=1, encoding="utf-8")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    faulthandler.enable(file=log)
    form = f"%(asctime)s {socket.gethostname()} rank {spec.rank} %(levelname)s %(message)s"
    logging.basicConfig(stream=log, level=logging.INFO, format=form, force=True)
    return log
