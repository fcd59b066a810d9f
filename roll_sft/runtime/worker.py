"""The actor of one rank: sets the environment, opens the rank's log, builds and calls `Engine`.

The engine is imported in methods, so that the driver runs on a head node without CUDA. Each method
adds rank, host and phase to an error and raises it again. Promises: a rank that makes no progress
within the deadline of a phase leaves the stack of every thread in its log; after an error, a rank
only repeats that error, so that it never meets its peers in the wrong collective.
"""

import contextlib
import faulthandler
import gc
import importlib
import logging
import os
import pickle
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import ray
import ray.util

from roll_sft.base.errors import ConfigError, ResourceError
from roll_sft.base.files import writing
from roll_sft.base.metrics import EvalMetrics, StepMetrics
from roll_sft.base.text import printable, refer, references
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.engine.environment import listen_at, set_variables, silence_warnings

if TYPE_CHECKING:
    from roll_sft.data.steps.plan import RankWork
    from roll_sft.data.tokens.cache import TokenData
    from roll_sft.models.files.hub import HubModel
    from roll_sft.models.source import ModelSource
    from roll_sft.runtime.rank_faults import RankFault
    from roll_sft.runtime.store_gate import Gate

LOG = logging.getLogger(__name__)
BEAT_EVERY_S = 1.0  # signs of progress are no closer than that


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """The arguments of a worker."""

    config: RunConfig
    rank: int
    device: str
    logs: Path
    nonce: Path  # a file of the driver's: who sees it sees its folder, not one of the same name
    checkpoint: Path | None = None  # resume from it
    references: Mapping[str, str] = field(default_factory=references)  # of the driver


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker runs. `host` is for people, `ip` for sockets, `node_id` for Ray."""

    rank: int
    host: str
    ip: str
    node_id: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.ip}, pid {self.pid})"


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """The rendezvous store: its port on the loopback of rank 0's node, and the gate to it."""

    node_id: str
    port: int
    gate: "Gate | None" = None  # where ranks are spread over nodes


@dataclass(frozen=True, slots=True)
class Gpu:
    """The device of a rank, and what was free there before the model was built."""

    name: str
    free_gib: float


class Worker:
    """One rank. Methods run one at a time, in the order of the calls; `start` comes first."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._address = WorkerAddress(
            rank=spec.rank,
            host=socket.gethostname(),
            ip=ray.util.get_node_ip_address(),
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
        )
        self._resources = contextlib.ExitStack()
        self._fault: RankFault | None = None
        self._store: Any = None
        self._deadline_s = self._last_beat = 0.0

    def start(self) -> WorkerAddress:
        """Open the log and set the environment, before the engine is imported."""
        refer(self._spec.references)
        with self._errors_of("start"):
            _check_shared(self._spec, self._address)
            self._log = _open_log(self._spec, self._address)
            set_variables(deterministic=self._spec.config.deterministic)
            listen_at(self._address.ip)
            silence_warnings()
        return self._address

    def serve_store(self, *, is_spread: bool) -> StoreAddress | None:
        """Import the engine, and on rank 0 serve the rendezvous store.

        Where ranks are spread over nodes, a gate leads there from the other nodes.
        """
        cluster = self._spec.config.cluster
        with self._phase("rendezvous", cluster.setup_timeout_s):
            gc.disable()  # a search through what is being imported takes a sixth of the time
            # Takes most of the start, so all ranks do it at once.
            if self._spec.device == "cpu":
                from roll_sft.engine.without_compiler import import_engine

                import_engine()
            import roll_sft.engine.engine  # noqa: F401
            from roll_sft.engine.process_groups import serve_store

            gc.enable()
            if self._spec.rank != 0:
                return None
            self._store = serve_store(
                world_size=self._spec.config.parallel.num_workers,
                timeout_s=cluster.setup_timeout_s,
            )
            address = StoreAddress(self._address.node_id, self._store.port)
            if not is_spread:
                return address
            from roll_sft.runtime.store_gate import gate_to

            gate = gate_to(address.port, host=self._address.ip)
            return replace(address, gate=self._resources.enter_context(gate))

    def fetch_model(self, model: "HubModel | None") -> None:
        """Download the model of the hub to this node; None does nothing."""
        with self._phase("model download", self._spec.config.cluster.checkpoint_timeout_s):
            if model is not None:
                model.fetch()

    def setup(self, store: StoreAddress, inputs: "tuple[ModelSource, TokenData]") -> Gpu | None:
        """Join the process groups and build the engine; returns the GPU, if there is one."""
        cluster = self._spec.config.cluster
        with self._phase("setup", setup_deadline_s(self._spec.config, self._spec.checkpoint)):
            import torch

            from roll_sft.engine.engine import Engine
            from roll_sft.engine.process_groups import Rendezvous, process_groups

            source, data = inputs
            check_tokens_visible(data.folders, address=self._address)
            torch.set_num_threads(self._spec.config.parallel.cpus_per_worker)
            rendezvous = Rendezvous(
                port=self._port_to(store),
                rank=self._spec.rank,
                world_size=self._spec.config.parallel.num_workers,
                setup_timeout_s=cluster.setup_timeout_s,
                collective_timeout_s=max(cluster.step_timeout_s, cluster.checkpoint_timeout_s),
                local_device=_local_device() if self._spec.device == "cuda" else 0,
            )
            layout = layout_of(self._spec.config.parallel)
            self._resources.enter_context(
                process_groups(rendezvous, layout, device=self._spec.device, store=self._store)
            )
            gpu = None
            if self._spec.device == "cuda":
                free_bytes, _ = torch.cuda.mem_get_info()
                gpu = Gpu(torch.cuda.get_device_name(), free_bytes / 2**30)
            self._engine = Engine(
                self._spec.config, source=source, data=data, checkpoint=self._spec.checkpoint
            )
            self._engine.on_micro_batch = self.beat
            # What lives as long as the process is never searched again: a pause of one rank in a
            # step is everybody's.
            gc.collect()
            gc.freeze()
            return gpu

    def train_step(self, pickled: bytes) -> StepMetrics | None:
        """One optimizer step of a pickled `RankWork`."""
        work: RankWork = pickle.loads(pickled)
        with self._phase(f"step {work.step}", self._spec.config.cluster.step_timeout_s):
            return self._engine.train_step(work)

    def evaluate(self, name: str, micro_batches: tuple[tuple[int, ...], ...]) -> EvalMetrics | None:
        """One chunk of a validation set."""
        with self._phase(f"evaluation of {name}", self._spec.config.cluster.step_timeout_s):
            return self._engine.evaluate(name, micro_batches)

    def begin_save(self, folder: Path) -> None:
        """Begin to write this rank's part into `folder`; with `async_save` in background."""
        with self._phase("checkpoint", self._spec.config.cluster.checkpoint_timeout_s):
            self._engine.begin_save(folder)

    def is_saved(self) -> bool:
        """Whether the save is on disk; raises the error of a failed one."""
        with self._errors_of("checkpoint"):
            is_saved: bool = self._engine.is_saved()
            return is_saved

    def finish_save(self) -> None:
        """Wait until the save is on disk."""
        with self._phase("checkpoint", self._spec.config.cluster.checkpoint_timeout_s):
            self._engine.finish_save()

    def call(self, function: str, argument: Any, *, phase: str, deadline_s: float) -> Any:
        """Call `function`, as "module:name", with this rank's engine and `argument`."""
        with self._phase(phase, deadline_s):
            module, _, name = function.partition(":")
            return getattr(importlib.import_module(module), name)(self._engine, argument)

    def close(self) -> None:
        """Leave the process groups."""
        with self._phase("teardown", self._spec.config.cluster.setup_timeout_s):
            self._resources.close()

    def _port_to(self, store: StoreAddress) -> int:
        """The port of this node's loopback that leads to the store."""
        if store.node_id == self._address.node_id:
            return store.port
        from roll_sft.runtime.store_gate import port_behind

        assert store.gate is not None, "ranks are spread over nodes, and rank 0 has no gate"
        return self._resources.enter_context(port_behind(store.gate))

    @contextlib.contextmanager
    def _phase(self, phase: str, deadline_s: float) -> Iterator[None]:
        """`_errors_of`, and `deadline_s` after the last beat write all stacks to the log."""
        with self._errors_of(phase):
            self._deadline_s, self._last_beat = deadline_s, 0.0
            self.beat()
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def beat(self) -> None:
        """Show that this rank makes progress: its deadline begins again."""
        now = time.monotonic()
        if now - self._last_beat < min(BEAT_EVERY_S, self._deadline_s / 10):
            return
        self._last_beat = now
        signal.setitimer(signal.ITIMER_REAL, self._deadline_s, self._deadline_s)
        with contextlib.suppress(OSError):  # a sign that is lost ends no step
            os.utime(beat_path(self._spec.logs, self._spec.rank))

    @contextlib.contextmanager
    def _errors_of(self, phase: str) -> Iterator[None]:
        """Add rank, host and phase to an error, and raise it in every later call too."""
        if self._fault is not None:
            raise self._fault.error()
        try:
            yield
        except Exception as error:  # adds rank, host and phase, and raises again
            LOG.exception("%s", phase)
            from roll_sft.runtime.rank_faults import fault_of

            self._fault = fault_of(error, self._address, phase=phase)
            raise self._fault.error() from None


def setup_deadline_s(config: RunConfig, checkpoint: Path | None) -> float:
    """Deadline of the setup, with the load of a checkpoint."""
    cluster = config.cluster
    return cluster.setup_timeout_s + (cluster.checkpoint_timeout_s if checkpoint else 0.0)


def _local_device() -> int:
    """Index, among the GPUs that this process sees, of the one that Ray assigned to it."""
    lent = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return device_index(lent[0], visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def device_index(lent: str, *, visible: str | None) -> int:
    """Index of the GPU `lent` in `visible`, the value of CUDA_VISIBLE_DEVICES.

    Ray shows a worker its own GPU alone, unless RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set
    in the cluster: then all ranks of a node see all of its GPUs.
    """
    if visible is None:
        return int(lent)
    names = visible.split(",")
    return names.index(lent) if lent in names else 0


def log_path(logs: Path, rank: int) -> Path:
    """The log file of `rank`."""
    return logs / f"rank_{rank:02d}.log"


def beat_path(logs: Path, rank: int) -> Path:
    """A file whose time of change is the last sign of progress of `rank`, while it runs."""
    return logs / f".beat_{rank:02d}"


def started_line(address: WorkerAddress) -> str:
    """First line of a worker in its log, which may hold earlier runs."""
    return f"{address} started"


def _check_shared(spec: WorkerSpec, address: WorkerAddress) -> None:
    if not spec.nonce.exists():
        raise ConfigError(
            f"output_dir: {str(spec.logs.parent)!r} on {address.host} is not the driver's folder;"
            " checkpoints need one that all nodes share, so give an output_dir on shared storage"
        )


def check_tokens_visible(folders: Iterable[Path], *, address: WorkerAddress) -> None:
    """Raise `ResourceError` for a token folder that the node at `address` does not see."""
    for folder in folders:
        if not folder.is_dir():
            raise ResourceError(
                f"data.cache_dir: {str(folder)!r} is not visible on {address.host}; set"
                " data.cache_dir to a folder on storage that all nodes share, as output_dir is"
            )


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _open_log(spec: WorkerSpec, address: WorkerAddress) -> TextIO:
    """Open the rank's log; the output of its libraries and the stack of a crash go there too."""
    path = log_path(spec.logs, spec.rank)
    with writing(path):
        spec.logs.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1, encoding="utf-8")
        beat_path(spec.logs, spec.rank).touch()
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    faulthandler.enable(file=log)
    # At a deadline. It needs no GIL, so it also shows a rank that never releases it.
    faulthandler.register(signal.SIGALRM, file=log)
    handler = logging.StreamHandler(log)
    handler.setFormatter(
        _LogFormatter(f"%(asctime)s {address.host} rank {spec.rank} %(levelname)s %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    LOG.info("%s", started_line(address))
    return log
