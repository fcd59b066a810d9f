"""The learning rate of every optimizer step, as a pure function of the step.

The rate of step k (from 1) is `peak * min(1, k / warmup_steps)`, then the decay of its kind. The
first step after the warm-up has the full rate, and the minimum would be reached one step after the
last. This is the curve of Hugging Face's schedulers, except that their warm-up begins with one step
at rate 0.

Invariants: within `total_steps` the rate is positive if `peak` is, and never above it; it rises
during the warm-up and never after, but where cosine_with_restarts begins again.
"""

import math
from dataclasses import dataclass
from typing import get_args

from roll_sft.config.recipes import ScheduleKind, schedule_parameter
from roll_sft.config.schema import TrainConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning-rate curve over `total_steps` steps; `decay_steps` only counts for `wsd`.

    `wsd` (warm-up, stable, decay) stays at the peak until the last `decay_steps` steps and then
    falls linearly; a decay that would reach into the warm-up starts when the warm-up ends.
    """

    kind: ScheduleKind
    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int
    decay_steps: int = 0
    parameter: float | None = None  # power, cycles or timescale of the kinds in `more_schedules`

    def __post_init__(self) -> None:
        kinds = get_args(ScheduleKind)
        assert self.kind in kinds, f"kind {self.kind!r} is not one of {kinds}"
        assert 0 <= self.minimum <= self.peak, f"need 0 <= {self.minimum} <= {self.peak}"
        steps = (self.warmup_steps, self.total_steps, self.decay_steps)
        assert min(steps) >= 0, f"steps (warm-up, total, decay) {steps} must not be negative"

    @classmethod
    def of(cls, train: TrainConfig, *, total_steps: int) -> "Schedule":
        """The curve of a run of `total_steps` steps."""
        warmup_steps = train.warmup_steps
        if warmup_steps is None:
            warmup_steps = math.ceil(total_steps * train.warmup_ratio)
        return cls(
            kind=train.lr_scheduler_type,
            peak=train.learning_rate,
            minimum=train.min_learning_rate,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            decay_steps=math.ceil(total_steps * train.wsd_decay_ratio),
            parameter=schedule_parameter(train, warmup_steps=warmup_steps),
        )

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, from 1."""
        assert step >= 1, f"step {step}: steps count from 1"
        if step <= self.warmup_steps:
            return self.peak * (step / self.warmup_steps)
        if self.kind == "constant":
            return self.peak
        start = self.warmup_steps
        if self.kind == "wsd":
            start = max(start, self.total_steps - self.decay_steps)
        progress = (step - 1 - start) / max(1, self.total_steps - start)
        progress = min(1.0, max(0.0, progress))
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        elif self.parameter is not None:
            from roll_sft.data.steps.more_schedules import share_decayed

            progress = share_decayed(self, step, progress=progress)
        return self.peak + (self.minimum - self.peak) * progress
