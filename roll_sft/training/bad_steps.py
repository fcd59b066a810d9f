"""Steps whose loss or gradient is not finite, or is a spike: recorded, skipped, or the run's end.

A spike is a loss or a norm above the mean of the last WINDOW steps and `train.spike_sigma` standard
deviations, as in OLMo-core. The workers decide before the update, on numbers that all of them have.
A skipped step is a step of the run all the same: its samples are used, the learning rate goes on,
and Adam's count does not. Promises: the limits of a step depend on the steps before it alone, also
after a resume; a run whose steps are sound is the same without this module.
"""

import contextlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from roll_sft.base.errors import DataError, DivergedError
from roll_sft.base.files import json_lines
from roll_sft.base.metrics import StepMetrics
from roll_sft.data.steps.plan import StepPlan
from roll_sft.job.job import Job
from roll_sft.training.records import Records

LOG = logging.getLogger(__name__)
WINDOW = 128
LEAST = 32  # steps before anything can be a spike
BEHIND = 2  # the step before may still run where a step is queued, so it is left out of the limits
LINE_BYTES = 2048  # more than a line of steps.jsonl has


class BadSteps:
    """Tells bad steps from sound ones, in a run that goes on after `step`."""

    def __init__(self, job: Job, records: Records, *, step: int) -> None:
        self._job, self._records = job, records
        self._window = deque[tuple[float, float]](maxlen=WINDOW)  # loss and norm
        self._waiting = deque[tuple[int, float, float]]()  # of the last BEHIND steps, with the step
        self._limits: dict[int, tuple[float, float] | None] = {}
        self._num_skipped = 0
        if step:
            self._num_skipped, sound = _earlier_steps(records.folder, WINDOW + BEHIND)
            self._waiting.extend(sound)

    def begin(self, plan: StepPlan) -> StepPlan:
        """The plan of a step that is queued now, with the limits above which it is skipped.

        Raises `DataError` for a step without a supervised token.
        """
        if plan.supervised_tokens == 0:
            raise DataError(
                f"step {plan.step}: no token of its samples is supervised, as of"
                f" {self._job.data.train.sample_name(plan.sample_ids[0])}; leave them out"
            )
        limits = self._limits[plan.step] = self._limits_of(plan.step)
        if limits is None or self._job.config.train.on_spike == "record":
            return plan
        return replace(plan, limits=(limits[0] * plan.supervised_tokens, limits[1]))

    def finish(self, plan: StepPlan, result: StepMetrics) -> float:
        """Record a finished step; returns its seconds.

        Raises `DivergedError` for one that ends the run.
        """
        loss, norm = result.loss_sum / result.supervised_tokens, result.grad_norm
        limits, skipped = self._limits.pop(plan.step), None
        is_above = limits is not None and (loss > limits[0] or norm > limits[1])
        if is_above or not (math.isfinite(loss) and math.isfinite(norm)):
            num = self._num_skipped
            skipped = _take_bad(self._job, self._records, plan, result, num_skipped=num)
        self._records.step(plan, result, skipped=skipped)
        if skipped is None:
            self._waiting.append((plan.step, loss, norm))
        else:
            self._num_skipped += 1
        return result.step_time_s

    def _limits_of(self, step: int) -> tuple[float, float] | None:
        while self._waiting and self._waiting[0][0] <= step - BEHIND:
            self._window.append(self._waiting.popleft()[1:])
        sigma = self._job.config.train.spike_sigma
        if sigma is None or len(self._window) < LEAST:
            return None
        loss, norm = (_limit(values, sigma) for values in zip(*self._window, strict=True))
        return loss, norm


def _limit(values: Sequence[float], sigma: float) -> float:
    """The mean of `values` and `sigma` standard deviations; the same in any order of them."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return mean + sigma * math.sqrt(variance)


def _take_bad(
    job: Job, records: Records, plan: StepPlan, result: StepMetrics, *, num_skipped: int
) -> str | None:
    """Record the samples of a bad step; returns why it made no update, None where it made one.

    `num_skipped` steps were skipped before. Raises `DivergedError` for a step that ends the run.
    """
    train = job.config.train
    loss, norm = result.loss_sum / result.supervised_tokens, result.grad_norm
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    reason = "spike" if is_finite else "not finite"
    is_skipped = result.is_skipped and (is_finite or train.on_nan == "skip")
    names = [job.data.train.sample_name(index) for index in plan.sample_ids]
    records.open(records.folder / "bad_batches.jsonl").write(
        {
            "step": plan.step,
            "train_loss": loss,
            "grad_norm": norm,
            "reason": reason,
            "skipped": is_skipped,
            "samples": names,
        }
    )
    what = f"step {plan.step}: train_loss {loss:.6g} and grad_norm {norm:.6g}"
    where = "the samples of this step are in bad_batches.jsonl"
    # A loss is computed with the weights of the step before, so it says whether those are sound.
    sound_step = plan.step - (1 if math.isfinite(loss) else 2)
    if not (is_finite or is_skipped):
        raise DivergedError(f"{what} must be finite; {where}", sound_step=sound_step)
    if is_skipped and num_skipped >= train.max_skipped_steps:
        raise DivergedError(
            f"{what}: {num_skipped + 1} steps would be skipped, and train.max_skipped_steps is"
            f" {train.max_skipped_steps}; {where}",
            sound_step=sound_step,
        )
    LOG.warning("%s: %s, %s; %s", what, reason, "no update" if is_skipped else "trained on", where)
    return reason if is_skipped else None


def _earlier_steps(folder: Path, count: int) -> tuple[int, list[tuple[int, float, float]]]:
    """How many steps were skipped, and step, loss and norm of the last `count` that were not."""
    bad = json_lines(folder / "bad_batches.jsonl")
    num_skipped = sum(line.get("skipped", False) for line in bad)
    sound = [
        (line["step"], line["train_loss"], line["grad_norm"])
        for line in _last_lines(folder / "steps.jsonl", count + num_skipped)
        if "skipped" not in line
    ]
    return num_skipped, sound[-count:]


def _last_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The last records of a file of one JSON object a line."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - count * LINE_BYTES)
        file.seek(start)
        lines = file.read().splitlines()[1 if start else 0 :]
    records = []
    for line in lines[-count:]:
        with contextlib.suppress(ValueError):  # a torn line
            records.append(json.loads(line))
    return records
