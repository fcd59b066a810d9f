"""Names ranks that are slower than the others, step after step: a hot GPU, a busy host.

A step lasts as long as its slowest data rank takes. Each WINDOW steps the driver asks every rank
how long it computed in them (`engine/step_timer.py`), and does not wait for the answers. In a step
a rank is compared with the median of all; its figure is the median of that over the window, so that
a few slow steps of any cause count for nothing. Promise: the run is the same without this module.
"""

import logging
import time
from collections.abc import Sequence
from statistics import median, median_low

from roll_sft.job.job import Job
from roll_sft.report import STRAGGLERS
from roll_sft.runtime.group import Pending, WorkerGroup
from roll_sft.training.records import Records

LOG = logging.getLogger(__name__)
WINDOW = 20  # steps
LEAST_LAG_S = 0.02  # in a step; less is the noise of the machine
TIMES = "roll_sft.engine.step_timer:times"


class Stragglers:
    """Looks for slow ranks of `group`."""

    def __init__(self, job: Job, records: Records, group: WorkerGroup) -> None:
        self._job, self._records, self._group = job, records, group
        self._named = set[int]()  # data ranks that are slow, and known to be
        self._num_steps = 0
        self._asked: Pending | None = self._ask()

    def look(self, step: int) -> None:
        """After `step`: ask, or name who is slow, if the answers are there."""
        self._num_steps += 1
        if self._asked is not None:
            answers = self._group.answers_of(self._asked)
            if answers is not None:
                self._asked = None
                self._judge(answers, step)
        elif self._num_steps >= WINDOW:
            self._num_steps, self._asked = 0, self._ask()

    def _ask(self) -> Pending:
        deadline_s = self._job.config.cluster.step_timeout_s
        return self._group.ask(TIMES, None, phase="times of steps", deadline_s=deadline_s)

    def _judge(self, answers: Sequence[tuple[str, list[float]]], step: int) -> None:
        layout, factor = self._job.layout, self._job.config.cluster.straggler_factor
        assert factor is not None, "nobody looks for stragglers without a factor"
        replicas: list[list[int]] = [[] for _ in range(layout.data_size)]
        for rank in range(layout.world_size):
            replicas[layout.coordinate(rank).data_rank].append(rank)
        seconds = [_slowest([answers[rank][1] for rank in ranks]) for ranks in replicas]
        slow: dict[int, tuple[float, float]] = {}
        if all(len(each) >= WINDOW // 2 for each in seconds):
            slow = slow_ones(seconds, factor=factor)
        for data_rank, (ratio, lag_s) in slow.items():
            if data_rank not in self._named:
                self._tell(replicas[data_rank], answers, step=step, ratio=ratio, lag_s=lag_s)
        self._named = set(slow)

    def _tell(
        self,
        ranks: list[int],
        answers: Sequence[tuple[str, list[float]]],
        *,
        step: int,
        ratio: float,
        lag_s: float,
    ) -> None:
        rank = max(ranks, key=lambda each: median(answers[each][1]))
        address, device = self._group.addresses[rank], answers[rank][0]
        peers = "" if len(ranks) == 1 else f", or of the ranks {ranks} that it works with,"
        LOG.warning(
            "slow: %s (%s)%s takes %.1f times as long as the others in a step, and %.3g s more",
            address, device, peers, ratio, lag_s,
        )  # fmt: skip
        line = {
            "time": time.time(),
            "step": step,
            "rank": rank,
            "ranks": ranks,
            "host": address.host,
            "device": device,
            "times_as_long": ratio,
            "lag_s": lag_s,
        }
        self._records.open(self._records.folder / STRAGGLERS).write(line)


def slow_ones(
    seconds: Sequence[Sequence[float]], *, factor: float
) -> dict[int, tuple[float, float]]:
    """Those whose seconds are `factor` times those of the others, or more, in most steps.

    `seconds` has the steps of each; the values are how many times as long it takes, and the seconds
    that it takes longer, in the median step.
    """
    steps = [*zip(*seconds, strict=False)]
    usual = [median_low(step) for step in steps]
    found = {}
    for index, own in enumerate(zip(*steps, strict=True)):
        ratio = median(mine / max(other, 1e-9) for mine, other in zip(own, usual, strict=True))
        lag_s = median(mine - other for mine, other in zip(own, usual, strict=True))
        if ratio >= factor and lag_s >= LEAST_LAG_S:
            found[index] = (ratio, lag_s)
    return found


def _slowest(seconds: Sequence[Sequence[float]]) -> list[float]:
    """Of ranks that wait for each other, the longest time in each step."""
    return [max(step) for step in zip(*seconds, strict=False)]
