"""`WorkerGroup`: one actor per rank behind one typed method per verb.

`train_step` returns at once with references, so that the driver can queue the next step; `wait`
collects them. One message goes to each worker per verb. Promise: whatever goes wrong, the first
true cause surfaces with its rank and host, and nothing waits past a deadline.
"""

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from roll_sft.config import RunConfig, layout_of
from roll_sft.data.plan import StepPlan
from roll_sft.engine.inputs import ModelSource, TokenData
from roll_sft.errors import CheckpointError, ConfigError, DataError, RollSftError, WorkerError
from roll_sft.metrics import EvalMetrics, StepMetrics
from roll_sft.runtime.placement import Slots
from roll_sft.runtime.worker import RankError, Worker, WorkerAddress, WorkerSpec, log_path

LOG = logging.getLogger(__name__)
CAUSE_GRACE_S = 3.0  # after the first error, how long another rank may still name the true cause
DEADLINE_GRACE_S = 5.0  # a worker writes its stack at the deadline; leave it time to
CLOSE_TIMEOUT_S = 10.0

Pending = tuple[str, float, list[Any]]  # phase, deadline in seconds from now, one reference a rank


class WorkerGroup:
    """The actors of a run, rank by rank. Use `start`, then the verbs, then `close`."""

    def __init__(self, config: RunConfig, *, slots: Slots, logs: Path) -> None:
        self._config = config
        self._layout = layout_of(config.parallel)
        self._logs = logs
        actor: Any = ray.remote(Worker)
        self._actors: list[Any] = [
            actor.options(
                num_cpus=slots.cpus_per_worker,
                num_gpus=1 if slots.device == "cuda" else 0,
                name=f"{config.run_name}-rank-{rank}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    slots.group, placement_group_bundle_index=bundle
                ),
            ).remote(WorkerSpec(config, rank, slots.device, logs))
            for rank, bundle in enumerate(slots.bundle_of_rank)
        ]
        self.addresses: list[WorkerAddress] = []
        self.device_name: str | None = None

    def start(self, source: ModelSource, data: TokenData) -> None:
        """Build process groups and engines on all ranks."""
        deadline_s = self._config.cluster.setup_timeout_s
        phase = "start of the workers"
        self.addresses = self._collect(
            (phase, deadline_s, [actor.address.remote() for actor in self._actors])
        )
        store = self._collect((phase, deadline_s, [self._actors[0].serve_store.remote()]))[0]
        inputs = ray.put((source, data))
        references = [actor.setup.remote(store, inputs) for actor in self._actors]
        self.device_name = self._collect(("setup", deadline_s, references))[0]

    def train_step(self, plan: StepPlan, *, learning_rate: float) -> Pending:
        """Queue one optimizer step; each rank gets its data rank's micro-batches."""
        works = [
            plan.work_for(data_rank, learning_rate=learning_rate)
            for data_rank in range(self._layout.data_size)
        ]
        references = [
            actor.train_step.remote(works[self._layout.coordinate(rank).data_rank])
            for rank, actor in enumerate(self._actors)
        ]
        return f"step {plan.step}", self._config.cluster.step_timeout_s, references

    def wait_step(self, pending: Pending) -> StepMetrics:
        """The metrics of a queued step, once every rank has finished it."""
        metrics: StepMetrics = self._collect(pending)[self._layout.reporting_rank]
        return metrics

    def evaluate(self, name: str, plans: Sequence[StepPlan]) -> EvalMetrics:
        """Loss over a whole validation set, its chunks queued together."""
        pending = [
            [
                actor.evaluate.remote(name, plan.ranks[self._layout.coordinate(rank).data_rank])
                for rank, actor in enumerate(self._actors)
            ]
            for plan in plans
        ]
        deadline_s = self._config.cluster.step_timeout_s
        chunks: list[EvalMetrics] = [
            self._collect((f"evaluation of {name}", deadline_s, references))[
                self._layout.reporting_rank
            ]
            for references in pending
        ]
        return EvalMetrics(
            sum(chunk.loss_sum for chunk in chunks),
            sum(chunk.supervised_tokens for chunk in chunks),
        )

    def save(self, folder: Path) -> None:
        """Write all shards into `folder`."""
        references = [actor.save.remote(folder) for actor in self._actors]
        self._collect(("checkpoint", self._config.cluster.checkpoint_timeout_s, references))

    def no_op(self) -> None:
        """A round trip to every worker and back."""
        self._collect(("no-op", 60.0, [actor.no_op.remote() for actor in self._actors]))

    def close(self) -> None:
        """Let the workers leave their groups, then end them. Bounded; never raises for a worker."""
        references = [actor.close.remote() for actor in self._actors]
        _ready, late = ray.wait(references, num_returns=len(references), timeout=CLOSE_TIMEOUT_S)
        if late:
            LOG.warning("%d workers did not close within %g s", len(late), CLOSE_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the workers now."""
        for actor in self._actors:
            ray.kill(actor)

    def _collect(self, pending: Pending) -> list[Any]:
        """Results of all ranks; the first true cause as an error of ours, or a missed deadline."""
        phase, deadline_s, references = pending
        waiting, ends = list(references), time.monotonic() + deadline_s + DEADLINE_GRACE_S
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=max(0.0, ends - time.monotonic()))
            if not ready:
                raise self._missed_deadline(phase, deadline_s, references, waiting)
            try:
                ray.get(ready)
            except (RayActorError, RayTaskError):
                raise self._first_cause(phase, references) from None
        results: list[Any] = ray.get(references)
        return results

    def _missed_deadline(
        self, phase: str, deadline_s: float, references: list[Any], waiting: list[Any]
    ) -> WorkerError:
        late = [rank for rank, reference in enumerate(references) if reference in waiting]
        logs = ", ".join(str(log_path(self._logs, rank)) for rank in late[:4])
        hosts = sorted({self.addresses[rank].host for rank in late}) if self.addresses else []
        return WorkerError(
            f"{phase} did not finish within {deadline_s:g} s on rank {', '.join(map(str, late))}"
            f"{' on ' + ', '.join(hosts) if hosts else ''}; their stacks are at the end of {logs}"
        )

    def _first_cause(self, phase: str, references: list[Any]) -> RollSftError:
        """The error that explains the others: a dead rank, or one that is no lost connection."""
        ray.wait(references, num_returns=len(references), timeout=CAUSE_GRACE_S)
        errors: list[tuple[int, Exception]] = []
        for rank, reference in enumerate(references):
            try:
                ray.get(reference, timeout=0)
            except (RayActorError, RayTaskError) as error:
                errors.append((rank, error))
            except GetTimeoutError:
                continue
        for rank, failure in errors:
            if isinstance(failure, RayActorError):
                return WorkerError(self._describe_death(rank, phase, failure))
        causes = [each.cause for _, each in errors if isinstance(each, RayTaskError)]
        ours = [cause for cause in causes if isinstance(cause, RankError)]
        ours.sort(key=lambda cause: (cause.is_collateral, cause.address.rank))
        if not ours:
            return WorkerError(f"{phase} failed: {errors[0][1]}")
        LOG.error("%s", ours[0].details)
        kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, CheckpointError)}
        return kinds.get(ours[0].exit_code or 0, WorkerError)(str(ours[0]))

    def _describe_death(self, rank: int, phase: str, error: RayActorError) -> str:
        where = f"rank {rank}"
        if self.addresses:
            address = self.addresses[rank]
            where += f" on {address.host} (pid {address.pid})"
        detail = re.search(r"Worker exit detail: (.*)", str(error))
        reason = detail.group(1).strip() if detail else str(error).strip().splitlines()[0]
        return (
            f"{where} died during {phase}: its process was killed or crashed ({reason}); its log is"
            f" {log_path(self._logs, rank)}"
        )
