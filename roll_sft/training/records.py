"""The records of a run: `steps.jsonl`, `eval.jsonl`, other files of lines, and the display.

Turns the plan and the metrics of a step into the line that trackers, summary and picture read, and
tells bad steps from sound ones; `bad_batches.py` has what follows for a bad one.
"""

import contextlib
import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from roll_sft.base import metrics
from roll_sft.base.errors import DataError
from roll_sft.base.metrics import EvalMetrics, StepMetrics, StepRecord
from roll_sft.data.steps.plan import StepPlan
from roll_sft.job.job import Job
from roll_sft.runtime.group import WorkerGroup
from roll_sft.training.run_folder import JsonLines
from roll_sft.training.terminal import StepDisplay, step_display

WINDOW = 128
LEAST = 32  # steps before anything can be a spike
BEHIND = 2  # the step before may still run where a step is queued, so it is left out of the limits


class Records:
    """The open files of a run and its display."""

    def __init__(self, job: Job, folder: Path, *, display: StepDisplay) -> None:
        self._job, self.folder, self._display = job, folder, display
        self._files, self._all = contextlib.ExitStack(), list[JsonLines]()
        self.device_name: str | None = None

    def begin(self) -> None:
        """Open the files, to append to the lines that they have."""
        folder = self.folder
        self._steps = self.open(folder / "steps.jsonl")
        prompts = self._job.config.evaluation.prompts
        evaluates = self._job.validation or prompts
        self._evals = self.open(folder / "eval.jsonl") if evaluates else None
        self._generations = self.open(folder / "generations.jsonl") if prompts else None
        wanted = self._job.config.train.log_samples
        self._samples = self.open(folder / "samples.jsonl") if wanted else None

    def sync(self) -> None:
        """Bring every line to disk. A checkpoint is published after that."""
        for lines in self._all:
            lines.sync()

    def step(
        self, plan: StepPlan, result: StepMetrics, *, skipped: str | None = None
    ) -> StepRecord:
        """Record a finished step; `skipped` says why one made no update."""
        names = [self._job.data.train.sample_name(index) for index in plan.sample_ids]
        record = self._record(plan, result, names)
        line: Any = record
        if result.told or result.experts or skipped:
            from roll_sft.data.steps.objective import with_more

            line = with_more(record, result, skipped=skipped)
        self._steps.write(line)
        if self._samples is not None:
            self._samples.write({"step": plan.step, "samples": names})
        self._display.show(record)
        return record

    def evaluation(self, step: int, name: str, result: EvalMetrics, *, seconds: float) -> float:
        """Record the loss of validation set `name` after `step`; returns it."""
        assert self._evals is not None, "a run without validation sets evaluates nothing"
        from roll_sft.training.evaluations import line_of

        line = line_of(self.folder, step, name, result, seconds=seconds)
        self._evals.write(line)
        return line.loss

    def generations(self, lines: Sequence[dict[str, Any]], total: dict[str, Any]) -> None:
        """Record answers, and the line of `eval.jsonl` that sums them up."""
        assert self._generations is not None, "a run without evaluation.prompts answers nothing"
        assert self._evals is not None, "eval.jsonl is open where there are prompts"
        for line in lines:
            self._generations.write(line)
        self._evals.write(total)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def open(self, path: Path) -> JsonLines:
        """Lines to append to, which are brought to disk and closed with the others."""
        lines = JsonLines(path)
        self._files.callback(lines.close)
        self._all.append(lines)
        return lines

    def _record(self, plan: StepPlan, result: StepMetrics, names: list[str]) -> StepRecord:
        job = self._job
        per_epoch = job.planner.samples_per_epoch
        seconds = result.step_time_s * job.layout.world_size
        return StepRecord(
            step=plan.step,
            epoch=plan.epoch + plan.samples_seen_in_epoch / per_epoch,
            train_loss=result.loss_sum / result.supervised_tokens,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            supervised_tokens=result.supervised_tokens,
            total_tokens=plan.total_tokens,
            total_tokens_including_padding=plan.total_tokens_including_padding,
            per_device_tps=plan.total_tokens / seconds,
            per_device_tps_including_padding=plan.total_tokens_including_padding / seconds,
            step_time_s=result.step_time_s,
            data_wait_s=result.data_wait_s,
            mfu=self._mfu(plan, seconds),
            peak_memory_gib=result.peak_memory_gib,
            dp_imbalance=plan.dp_imbalance,
            pack_fill=plan.fill,
            sample_ids_sha256=hashlib.sha256("\n".join(names).encode()).hexdigest(),
        )

    def _mfu(self, plan: StepPlan, device_seconds: float) -> float | None:
        peak = metrics.peak_flops(self.device_name)
        if peak is None:
            return None
        shape, share = self._job.source.shape, 1.0
        if self._job.config.trains_part:
            from roll_sft.job.trained import share_of_flops

            share = share_of_flops(self._job.config, shape)
        flops = metrics.flops_per_step(
            num_matmul_parameters=shape.num_matmul_parameters * share,
            num_layers=shape.num_layers,
            attention_width=shape.attention_width,
            lengths=self._job.data.train.lengths[list(plan.sample_ids)].tolist(),
            windows=shape.windows,
        )
        return flops / device_seconds / peak


class BadSteps:
    """Records steps and tells bad ones from sound ones, in a run that goes on after `step`.

    The loss or the norm of a bad step is not finite, or is a spike: above the mean of the last
    WINDOW steps and `train.spike_sigma` standard deviations, as in OLMo-core. The workers decide
    before the update, on numbers that all of them have. A skipped step is a step of the run all the
    same: its samples are used, the learning rate goes on, and Adam's count does not. The limits of
    a step depend on the steps before it alone, also after a resume.
    """

    def __init__(self, job: Job, records: Records, group: WorkerGroup, *, step: int) -> None:
        self._job, self._records = job, records
        self._stragglers: Any = None  # where several ranks can be compared
        if job.layout.data_size > 1 and job.config.cluster.straggler_factor is not None:
            from roll_sft.training.stragglers import Stragglers

            self._stragglers = Stragglers(job, records, group)
        self._window = deque[tuple[float, float]](maxlen=WINDOW)  # loss and norm
        self._waiting = deque[tuple[int, float, float]]()  # of the last BEHIND steps, with the step
        self._limits: dict[int, tuple[float, float] | None] = {}
        self._num_skipped = 0
        if step:
            from roll_sft.training.bad_batches import earlier_steps

            self._num_skipped, sound = earlier_steps(records.folder, WINDOW + BEHIND)
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
            from roll_sft.training.bad_batches import take_bad

            num = self._num_skipped
            skipped = take_bad(self._job, self._records, plan, result, num_skipped=num)
        self._records.step(plan, result, skipped=skipped)
        if skipped is None:
            self._waiting.append((plan.step, loss, norm))
        else:
            self._num_skipped += 1
        if self._stragglers is not None:
            self._stragglers.look(plan.step)
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


@contextlib.contextmanager
def open_records(job: Job, folder: Path, *, first_step: int = 1) -> Iterator[Records]:
    """The records of a run that begins at `first_step`; closed after the block."""
    steps, every = job.total_steps, job.config.train.logging_steps
    with step_display(steps, logging_steps=every, first_step=first_step) as display:
        records = Records(job, folder, display=display)
        try:
            yield records
        finally:
            records.close()
