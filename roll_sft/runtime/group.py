"""`WorkerGroup`: one actor per rank, with one typed method for each call to all of them.

`train_step` returns references at once, so that the driver can queue the next step; `wait_step`
collects the results. A call sends one message to each worker, which holds plans and never tokens.
Promises: an error names the rank and host that caused it; nothing waits past a deadline for a rank
that makes no progress; after `close` or `kill` no worker is left, stopped processes included.
"""

import contextlib
import itertools
import logging
import pickle
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from roll_sft.base.files import writing
from roll_sft.base.metrics import EvalMetrics, StepMetrics
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.plan import StepPlan
from roll_sft.data.tokens.cache import TokenData
from roll_sft.models.source import ModelSource
from roll_sft.runtime.cluster import Slots
from roll_sft.runtime.worker import Gpu, Worker, WorkerAddress, WorkerSpec, setup_deadline_s

LOG = logging.getLogger(__name__)
DEADLINE_GRACE_S = 3.0  # time for a worker to write its stacks after the deadline
CLOSE_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 1.0
CHUNKS_AHEAD = 2  # chunks of an evaluation that are queued at the workers


@dataclass(frozen=True, slots=True)
class Pending:
    """A running call, one reference per rank; its deadline counts from the wait for it."""

    phase: str
    deadline_s: float
    references: list[Any]


class WorkerGroup:
    """The actors of a run, in order of rank. Call `start` first and `close` last."""

    def __init__(
        self, config: RunConfig, *, slots: Slots, logs: Path, checkpoint: Path | None = None
    ) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._layout = layout_of(config.parallel)
        self._logs = logs
        self._nonce = logs / f".shared_{uuid.uuid4().hex}"
        with writing(logs):
            logs.mkdir(parents=True, exist_ok=True)
            for left in (*logs.glob(".shared_*"), *logs.glob(".beat_*")):  # by a killed driver
                left.unlink(missing_ok=True)
            self._nonce.touch()
        worker = Worker
        if config.debug.faults:
            from roll_sft.runtime.faults import with_faults

            worker = with_faults(Worker)
        actor: Any = ray.remote(worker)
        self._actors: list[Any] = [
            actor.options(
                num_cpus=config.parallel.cpus_per_worker,
                num_gpus=1 if slots.device == "cuda" else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    slots.group, placement_group_bundle_index=bundle
                ),
            ).remote(WorkerSpec(config, rank, slots.device, logs, self._nonce, checkpoint))
            for rank, bundle in enumerate(slots.bundle_of_rank)
        ]
        self.addresses: tuple[WorkerAddress, ...] = ()
        self._on_this_node: list[psutil.Process] = []
        self.gpus: tuple[Gpu, ...] = ()  # in order of rank; none on CPUs

    def start(self, source: ModelSource, data: TokenData) -> None:
        """Build process groups and engines on all ranks."""
        deadline_s = self._config.cluster.setup_timeout_s
        started = [actor.start.remote() for actor in self._actors]
        try:
            self.addresses = tuple(self._collect(Pending("start", deadline_s, started)))
        finally:
            self._nonce.unlink(missing_ok=True)
        here = ray.get_runtime_context().get_node_id()
        pids = [address.pid for address in self.addresses if address.node_id == here]
        self._on_this_node = [*_processes(pids)]  # now: later an id may be another process's
        self._fetch_model(source)
        is_spread = len({address.node_id for address in self.addresses}) > 1
        stores = [actor.serve_store.remote(is_spread=is_spread) for actor in self._actors]
        store_address = self._collect(Pending("rendezvous", deadline_s, stores))[0]
        inputs = ray.put((source, data))
        ready = [actor.setup.remote(store_address, inputs) for actor in self._actors]
        setup_s = setup_deadline_s(self._config, self._checkpoint)
        self.gpus = tuple(filter(None, self._collect(Pending("setup", setup_s, ready))))

    def train_step(
        self, plan: StepPlan, *, learning_rate: float, following: StepPlan | None = None
    ) -> Pending:
        """Queue one optimizer step; each rank gets the micro-batches of its data-parallel rank.

        A rank also builds the batch of the `following` step while this one runs.
        """
        shared: dict[str, Any] = {"learning_rate": learning_rate, "following": following}
        works = [  # as bytes, since Ray's own pickling takes longer than an empty message
            pickle.dumps(plan.work_for(data_rank, **shared))
            for data_rank in range(self._layout.data_size)
        ]
        references = [
            actor.train_step.remote(works[self._layout.coordinate(rank).data_rank])
            for rank, actor in enumerate(self._actors)
        ]
        return Pending(f"step {plan.step}", self._config.cluster.step_timeout_s, references)

    def wait_step(self, pending: Pending) -> StepMetrics:
        """Wait until every rank has finished a queued step; returns its metrics."""
        metrics: StepMetrics = self._collect(pending)[self._layout.reporting_rank]
        return metrics

    def evaluate(self, name: str, plans: Iterable[StepPlan]) -> EvalMetrics:
        """Loss over a validation set; each of `plans` is taken when it is queued, some ahead."""
        total, pending, waiting = EvalMetrics(0.0, 0), deque[Pending](), iter(plans)
        while True:
            ahead = itertools.islice(waiting, CHUNKS_AHEAD + 1 - len(pending))
            pending.extend(self._evaluate_chunk(name, plan) for plan in ahead)
            if not pending:
                return total
            total += self._collect(pending.popleft())[self._layout.reporting_rank]

    def begin_save(self, folder: Path) -> None:
        """Write all shards into `folder`; with `async_save` copy them, and write in background."""
        self._collect(self._saving([actor.begin_save.remote(folder) for actor in self._actors]))

    def is_saved(self) -> Pending:
        """Ask every rank whether its part of the save is written; answered in order of calls."""
        return self._saving([actor.is_saved.remote() for actor in self._actors])

    def answers_of(self, pending: Pending) -> list[Any] | None:
        """The answers of all ranks, or None while not every rank has answered."""
        _ready, late = ray.wait(pending.references, num_returns=len(self._actors), timeout=0)
        return None if late else self._collect(pending)

    def finish_save(self) -> None:
        """Wait until every rank has written its part of the save."""
        self._collect(self._saving([actor.finish_save.remote() for actor in self._actors]))

    def call(self, function: str, argument: Any, *, phase: str, deadline_s: float) -> list[Any]:
        """Call `function`, as "module:name", with each rank's engine and `argument`."""
        return self._collect(self.ask(function, argument, phase=phase, deadline_s=deadline_s))

    def ask(self, function: str, argument: Any, *, phase: str, deadline_s: float) -> Pending:
        """`call` without a wait; `answers_of` has the answers."""
        options: dict[str, Any] = {"phase": phase, "deadline_s": deadline_s}
        shared = ray.put(argument)
        references = [actor.call.remote(function, shared, **options) for actor in self._actors]
        return Pending(phase, deadline_s, references)

    def _saving(self, references: list[Any]) -> Pending:
        return Pending("checkpoint", self._config.cluster.checkpoint_timeout_s, references)

    def close(self) -> None:
        """Let the workers leave their process groups, then end them; an error is only logged."""
        references = [actor.close.remote() for actor in self._actors]
        try:
            ray.get(references, timeout=CLOSE_TIMEOUT_S)
        except RayError as error:  # the run is done and saved
            LOG.warning("the workers did not close: %s", str(error).strip().rpartition("\n")[2])
        self.kill()

    def kill(self) -> None:
        """End the workers now; those on this node are gone when it returns."""
        for actor in self._actors:
            ray.kill(actor)
        # A stopped process reacts to SIGKILL alone, which Ray sends after five seconds; by then a
        # cluster of our own has ended, and nobody sends it.
        _gone, stopped = psutil.wait_procs(self._on_this_node, timeout=KILL_TIMEOUT_S)
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for beat in self._logs.glob(".beat_*"):
            beat.unlink(missing_ok=True)

    def _fetch_model(self, source: ModelSource) -> None:
        """Download a model of the hub: the first rank of each node does it for the node."""
        if source.hub is None:
            return
        first_rank = {address.node_id: address.rank for address in reversed(self.addresses)}
        fetched = [
            actor.fetch_model.remote(source.hub if rank in first_rank.values() else None)
            for rank, actor in enumerate(self._actors)
        ]
        deadline_s = self._config.cluster.checkpoint_timeout_s
        self._collect(Pending("model download", deadline_s, fetched))

    def _evaluate_chunk(self, name: str, plan: StepPlan) -> Pending:
        references = [
            actor.evaluate.remote(name, plan.ranks[self._layout.coordinate(rank).data_rank])
            for rank, actor in enumerate(self._actors)
        ]
        deadline_s = self._config.cluster.step_timeout_s
        return Pending(f"evaluation of {name}", deadline_s, references)

    def _collect(self, pending: Pending) -> list[Any]:
        """Results of all ranks. Raises the error that caused the others, or `WorkerError`."""
        references, wait_s = pending.references, pending.deadline_s + DEADLINE_GRACE_S
        while True:
            try:
                # Raises at the first error, while other ranks may still wait for their peers.
                results: list[Any] = ray.get(references, timeout=wait_s)
                return results
            except RayError as error:
                from roll_sft.runtime import failures, watchdog

                ranks = failures.Ranks(self.addresses, self._logs)
                if not isinstance(error, GetTimeoutError):
                    raise failures.first_cause(pending.phase, references, ranks) from None
                # Slow ranks that make progress are waited for.
                wait_s = DEADLINE_GRACE_S + watchdog.time_left(
                    pending.phase, references, deadline_s=pending.deadline_s, ranks=ranks
                )


def _processes(pids: Iterable[int]) -> Iterator[psutil.Process]:
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(pid)
