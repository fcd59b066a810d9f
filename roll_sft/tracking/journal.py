"""Reads the metrics and generated samples of a run from its files, for its trackers.

A tracker reads `steps.jsonl`, `eval.jsonl` and `generations.jsonl` while the driver appends to
them. So the files are the queue: nothing is kept in memory, a tracker that lost its server
continues where it stopped, and the tracker of a resumed run reads from the start.

Assumes that the files grow, or are cut to their own beginning where the workers of a run are
restarted, and that the lines of an evaluation after step N are written before the line of step
N + 1. Promises: every complete line is read once, also where a restart writes it again; steps never
go back; MLflow accepts every name, and validation sets with different names keep different names.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from roll_sft.data.steps.objective import TOLD

LINES_AT_ONCE = 30  # of each file: fewer metrics than MLflow takes in one request
MAX_NAME_LENGTH = 200  # MLflow's limit is 250 for a whole key, such as eval/<name>/perplexity
_ACCEPTED = re.compile(r"[\w.\-: ]+(/[\w.\-: ]+)*")

# Field of StepRecord -> its name in a tracker, whose pages group names by their first part.
STEP_NAMES = {
    "train_loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "epoch": "train/epoch",
    "per_device_tps": "perf/per_device_tps",
    "per_device_tps_including_padding": "perf/per_device_tps_including_padding",
    "mfu": "perf/mfu",
    "step_time_s": "perf/step_time_s",
    "data_wait_s": "perf/data_wait_s",
    "dp_imbalance": "perf/dp_imbalance",
    "pack_fill": "perf/pack_fill",
    "peak_memory_gib": "perf/peak_memory_gib",
    "supervised_tokens": "data/supervised_tokens",
    "total_tokens": "data/total_tokens",
    "total_tokens_including_padding": "data/total_tokens_including_padding",
}
# What a recipe's loss tells beside these; see data/steps/objective.py.
RECIPE_NAMES = {name: f"train/{name}" for name in TOLD}
EXPERT_NAMES = {  # field of ExpertLoad, likewise
    "expert_aux_loss": "experts/aux_loss",
    "expert_z_loss": "experts/z_loss",
    "expert_max_over_mean": "experts/max_over_mean",
    "dropped_tokens": "experts/dropped_tokens",
}
# Also recorded under these names of their own: dashboards of other SFT trainers look for them.
DOCUMENTED_NAMES = (
    "train_loss",
    "learning_rate",
    "total_tokens",
    "total_tokens_including_padding",
    "per_device_tps",
    "per_device_tps_including_padding",
)
# Field of EvalRecord -> its name in a tracker, {} standing for the validation set. Other numbers of
# a line are recorded as eval/<set>/<key>.
EVAL_NAMES = {
    "loss": "eval/{}/loss",
    "perplexity": "eval/{}/perplexity",
    "token_accuracy": "eval/{}/token_accuracy",
    "best_loss": "eval/{}/best_loss",
    "best_step": "eval/{}/best_step",
}
NOT_RECORDED = ("step", "supervised_tokens", "time_s")  # of an evaluation


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    step: int


class Record(NamedTuple):
    """What the files hold of one step: metrics, and lines of `generations.jsonl`."""

    step: int
    points: list[Point]
    samples: list[dict[str, Any]]


class Journal:
    """Reads the metrics of the run in `folder`.

    Of the steps it takes every `logging_steps`-th and the last of `total_steps`.
    """

    def __init__(self, folder: Path, *, logging_steps: int, total_steps: int) -> None:
        self._logging_steps, self._total_steps = logging_steps, total_steps
        self._steps, self._evals, self._generations = (
            _Lines(folder / name) for name in ("steps.jsonl", "eval.jsonl", "generations.jsonl")
        )
        self._step = 0  # of the last line of steps.jsonl that was read

    def batches(self, *, is_last: bool = False) -> Iterator[list[Record]]:
        """What was written since the last call, by step, in lists that fit one request.

        A step may come twice: evaluations follow the step. Samples of the newest step are held back
        until a later step is there, or the last call: some of their lines may not be written yet.
        """
        while True:
            steps = self._steps.next(LINES_AT_ONCE)
            is_end = len(steps) < LINES_AT_ONCE
            self._step = steps[-1]["step"] if steps else self._step
            # After the steps, so that evaluations before the last of these are there.
            evals = self._evals.until(None if is_end else self._step)
            samples = self._generations.until(None if is_end and is_last else self._step - 1)
            found = [
                *(Record(each["step"], [*_step(each)], []) for each in steps if self._is_due(each)),
                *(Record(each["step"], [*_evaluation(each)], []) for each in evals),
                *(Record(step, [], [*rows]) for step, rows in groupby(samples, itemgetter("step"))),
            ]
            if found:
                yield sorted(found, key=itemgetter(0))  # stable: a step, then what follows it
            if is_end:
                return

    def _is_due(self, line: Mapping[str, Any]) -> bool:
        step = int(line["step"])
        return step % self._logging_steps == 0 or step == self._total_steps


class _Lines:
    """The complete lines of a file that grows, each given once; none while it does not exist."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0  # bytes
        self._file = (0, 0)  # device and inode of the file that was read
        self._step, self._names = 0, set[Any]()  # of the last lines that were read
        self._ahead = deque[dict[str, Any]]()  # read, and not given yet

    def next(self, most: int) -> list[dict[str, Any]]:
        """At most `most` further lines."""
        found = list[dict[str, Any]]()
        try:
            with self._path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if (stat.st_dev, stat.st_ino) != self._file or stat.st_size < self._read:
                    self._file, self._read = (stat.st_dev, stat.st_ino), 0
                file.seek(self._read)
                while len(found) < most and (line := file.readline()).endswith(b"\n"):
                    self._read += len(line)
                    with contextlib.suppress(ValueError):  # half a line, left by a full disk
                        record = json.loads(line)
                        if self._is_new(record):
                            found.append(record)
        except FileNotFoundError:
            pass
        return found

    def until(self, step: int | None) -> list[dict[str, Any]]:
        """Further lines up to `step`; all that there are where it is None."""
        found = list[dict[str, Any]]()
        while True:
            if not self._ahead:
                self._ahead.extend(self.next(LINES_AT_ONCE))
            if not self._ahead or (step is not None and self._ahead[0]["step"] > step):
                return found
            found.append(self._ahead.popleft())

    def _is_new(self, line: Mapping[str, Any]) -> bool:
        """Whether the line was not read before; in a file that was cut, it may have been."""
        step, name = line["step"], line.get("name", line.get("index"))
        if step < self._step or (step == self._step and name in self._names):
            return False
        self._names = self._names | {name} if step == self._step else {name}
        self._step = step
        return True


def safe_name(name: str) -> str:
    """`name` if MLflow accepts it in a key; otherwise a readable form of it with a hash.

    MLflow takes letters, digits and `_-.: /`, and no `..` or empty part between slashes.
    """
    parts_are_names = not {".", ".."}.intersection(name.split("/"))
    if len(name) <= MAX_NAME_LENGTH and _ACCEPTED.fullmatch(name) and parts_are_names:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    readable = re.sub(r"[^\w\-]+", "_", name)[: MAX_NAME_LENGTH - 9].strip("_")
    return f"{readable}-{digest}"


def _step(line: Mapping[str, Any]) -> Iterator[Point]:
    names = [
        *STEP_NAMES.items(),
        *RECIPE_NAMES.items(),
        *EXPERT_NAMES.items(),
        *((name, name) for name in DOCUMENTED_NAMES),
    ]
    return _numbers(line, names)


def _evaluation(line: Mapping[str, Any]) -> Iterator[Point]:
    prefix = f"eval/{safe_name(line['name'])}"
    for key, value in _flat(line):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key.rpartition("/")[2] not in NOT_RECORDED and is_number and math.isfinite(value):
            yield Point(f"{prefix}/{safe_name(key)}", float(value), line["step"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of `values` and of the mappings in it, their keys joined by slashes."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _numbers(line: Mapping[str, Any], names: list[tuple[str, str]]) -> Iterator[Point]:
    """The values of `line` under their names, without those that are None."""
    for key, name in names:
        value = line.get(key)
        if value is not None:
            yield Point(name, float(value), line["step"])
