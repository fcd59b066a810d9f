"""Schedules that few runs use, as transformers defines them.

`inverse_sqrt` has no lower end there; here it stops at the minimum. The others are transformers'
own where the minimum is theirs: `lr_end` of the polynomial, 0 of the cosines.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roll_sft.data.steps.learning_rate import Schedule


def share_decayed(schedule: "Schedule", step: int, *, progress: float) -> float:
    """How far from the highest rate to the lowest step `step` is, from 0 to 1.

    `progress`, from 0 to 1, is how much of the steps after the warm-up are done.
    """
    parameter = schedule.parameter
    assert parameter is not None, f"{schedule.kind} has no parameter"
    if schedule.kind == "polynomial":
        return float(1 - (1 - progress) ** parameter)
    if schedule.kind == "cosine_with_restarts":
        if progress >= 1:
            return 1.0
        return (1 - math.cos(math.pi * (parameter * progress % 1.0))) / 2
    assert schedule.kind == "inverse_sqrt", f"no schedule {schedule.kind}"
    done = step - 1 - schedule.warmup_steps
    rate = schedule.peak / math.sqrt((done + parameter) / parameter)
    span = schedule.peak - schedule.minimum
    return min(1.0, (schedule.peak - rate) / span) if span else 0.0
