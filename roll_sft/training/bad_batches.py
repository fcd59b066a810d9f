"""What becomes of a bad step: its line in `bad_batches.jsonl`, and the end of a run that must end.

Also what a run that goes on reads of the steps before it. Loaded where there is either.
"""

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from roll_sft.base.errors import DivergedError
from roll_sft.base.files import json_lines
from roll_sft.base.metrics import StepMetrics
from roll_sft.data.steps.plan import StepPlan
from roll_sft.job.job import Job
from roll_sft.training.records import Records

LOG = logging.getLogger(__name__)
LINE_BYTES = 2048  # more than a line of steps.jsonl has


def take_bad(
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


def earlier_steps(folder: Path, count: int) -> tuple[int, list[tuple[int, float, float]]]:
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
