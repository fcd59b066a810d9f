"""What a run records: `steps.jsonl`, `eval.jsonl`, `samples.jsonl`, the tracker, the display.

One place turns a step's plan and its metrics into the line that everything else reads.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from roll_sft import metrics
from roll_sft.data.plan import StepPlan
from roll_sft.engine.preflight import Job
from roll_sft.metrics import EvalMetrics, StepMetrics, StepRecord
from roll_sft.outputs import JsonLines, lines_of
from roll_sft.terminal import StepDisplay, step_display
from roll_sft.tracking import MlflowTracker


class Records:
    """The open files of a run and who else is told."""

    def __init__(
        self, job: Job, folder: Path, *, display: StepDisplay, first_step: int = 1
    ) -> None:
        self._job, self._folder, self._display = job, folder, display
        self._first_step = first_step
        self._files, self._all = contextlib.ExitStack(), list[JsonLines]()
        self.tracker = _tracker(job, folder, resumes=first_step > 1)
        self.device_name: str | None = None

    def begin(self) -> None:
        """Open the files, which go on after the lines that they have by now."""
        folder = self._folder
        self._steps = self._open(folder / "steps.jsonl")
        self._evals = self._open(folder / "eval.jsonl") if self._job.validation else None
        wanted = self._job.config.train.log_samples
        self._samples = self._open(folder / "samples.jsonl") if wanted else None
        if self.tracker is not None:
            for name in ("config.yaml", "data_report.json"):
                self.tracker.log_file(folder / name)
            if self._first_step > 1:
                self._track_again(folder)

    def sync(self) -> None:
        """Bring every line so far to disk, as a checkpoint that goes on after it needs."""
        for lines in self._all:
            lines.sync()

    def step(self, plan: StepPlan, result: StepMetrics) -> StepRecord:
        """Record a finished step."""
        names = [self._job.data.train.sample_name(index) for index in plan.sample_ids]
        record = self._record(plan, result, names)
        self._steps.write(record)
        if self._samples is not None:
            self._samples.write({"step": plan.step, "samples": names})
        self._display.show(record, fill=plan.fill)
        self._track(dataclasses.asdict(record))
        return record

    def evaluation(self, step: int, name: str, result: EvalMetrics, *, seconds: float) -> float:
        """Record the loss of validation set `name` after `step`; returns it."""
        assert self._evals is not None, "a run without validation sets evaluates nothing"
        loss = result.loss_sum / result.supervised_tokens
        line = {
            "step": step,
            "name": name,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # past 709 a float overflows
            "supervised_tokens": result.supervised_tokens,
            "time_s": seconds,
        }
        self._evals.write(line)
        if self.tracker is not None:
            self.tracker.log_metrics(step, {f"eval/{name}/loss": loss})
        return loss

    def _track(self, values: Mapping[str, object]) -> None:
        """Tell the tracker of a step's line, if it is one of those that it is told."""
        step = values["step"]
        assert isinstance(step, int), f"step {step!r} is no number"
        due = step % self._job.config.train.logging_steps == 0 or step == self._job.total_steps
        if self.tracker is not None and due:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self.tracker.log_metrics(step, numbers)

    def _track_again(self, folder: Path) -> None:
        """Tell the tracker what it may not have heard before the run was killed; it knows what."""
        for line in lines_of(folder / "steps.jsonl"):
            self._track(line)
        for line in lines_of(folder / "eval.jsonl"):
            if self.tracker is not None:
                self.tracker.log_metrics(line["step"], {f"eval/{line['name']}/loss": line["loss"]})

    def close(self, *, succeeded: bool) -> None:
        """Close the files and finish the tracker's run."""
        self._files.close()
        if self.tracker is not None:
            self.tracker.close(succeeded=succeeded)

    def _open(self, path: Path) -> JsonLines:
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
            sample_ids_sha256=hashlib.sha256("\n".join(names).encode()).hexdigest(),
        )

    def _mfu(self, plan: StepPlan, device_seconds: float) -> float | None:
        peak = metrics.peak_flops(self.device_name)
        if peak is None:
            return None
        shape = self._job.source.shape
        flops = metrics.flops_per_step(
            num_matmul_parameters=shape.num_matmul_parameters,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            lengths=self._job.data.train.lengths[list(plan.sample_ids)].tolist(),
        )
        return flops / device_seconds / peak


@contextlib.contextmanager
def open_records(job: Job, folder: Path, *, first_step: int = 1) -> Iterator[Records]:
    """A run's records from `first_step` on; the tracker learns whether the block ended well."""
    steps, every = job.total_steps, job.config.train.logging_steps
    with step_display(steps, logging_steps=every, first_step=first_step) as display:
        records = Records(job, folder, display=display, first_step=first_step)
        succeeded = False
        try:
            yield records
            succeeded = True
        finally:
            records.close(succeeded=succeeded)


def _tracker(job: Job, folder: Path, *, resumes: bool) -> MlflowTracker | None:
    tracking = job.config.tracking
    if "mlflow" not in tracking.backends:
        return None
    tracker = MlflowTracker(
        uri=tracking.mlflow_uri or f"sqlite:///{folder.parent / 'mlflow.db'}",
        experiment=tracking.experiment,
        run_name=job.config.run_name,
        folder=folder,
        resumes=resumes,
    )
    params = _flat(dataclasses.asdict(job.config))
    del params["tracking.mlflow_uri"]  # may hold a password, which config.yaml keeps unresolved
    tracker.log_params(params)
    return tracker


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
