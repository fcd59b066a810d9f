"""Reads the metrics of a run from its files, with the names that a tracker shows.

A tracker reads `steps.jsonl` and `eval.jsonl` while the driver appends to them. So no metric is
kept in memory: a tracker that lost its server continues where it stopped, and the tracker of a
resumed run reads from the start.

Assumes that the files only grow. Promises: every complete line is read once, in order; MLflow
accepts every name, and validation sets with different names keep different names.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
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
    "peak_memory_gib": "perf/peak_memory_gib",
    "supervised_tokens": "data/supervised_tokens",
    "total_tokens": "data/total_tokens",
    "total_tokens_including_padding": "data/total_tokens_including_padding",
}
# What a recipe's loss tells beside these; see data/steps/objective.py.
RECIPE_NAMES = {name: f"train/{name}" for name in TOLD}
EXPERT_NAMES = {  # field of ExpertLoad, likewise
    "expert_aux_loss": "experts/aux_loss",
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
# Field of EvalRecord -> its name in a tracker, {} standing for the validation set.
EVAL_NAMES = {"loss": "eval/{}/loss", "perplexity": "eval/{}/perplexity"}


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    step: int


class Journal:
    """Reads the metrics of the run in `folder`.

    Of the steps it takes every `logging_steps`-th and the last of `total_steps`.
    """

    def __init__(self, folder: Path, *, logging_steps: int, total_steps: int) -> None:
        self._folder = folder
        self._logging_steps, self._total_steps = logging_steps, total_steps
        self._read = {"steps.jsonl": 0, "eval.jsonl": 0}  # bytes

    def points(self) -> Iterator[list[Point]]:
        """The metrics written since the last call, in lists that fit one request."""
        while steps := self._lines("steps.jsonl"):
            yield [point for line in steps if self._is_due(line["step"]) for point in _step(line)]
        while evals := self._lines("eval.jsonl"):
            yield [point for line in evals for point in _evaluation(line)]

    def _is_due(self, step: int) -> bool:
        return step % self._logging_steps == 0 or step == self._total_steps

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The next complete lines of a file; none while it does not exist."""
        found = list[dict[str, Any]]()
        try:
            with (self._folder / name).open("rb") as file:
                file.seek(self._read[name])
                while len(found) < LINES_AT_ONCE and (line := file.readline()).endswith(b"\n"):
                    self._read[name] += len(line)
                    with contextlib.suppress(ValueError):  # half a line, left by a full disk
                        found.append(json.loads(line))
        except FileNotFoundError:
            pass
        return found


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
    name = safe_name(line["name"])
    return _numbers(line, [(key, pattern.format(name)) for key, pattern in EVAL_NAMES.items()])


def _numbers(line: Mapping[str, Any], names: list[tuple[str, str]]) -> Iterator[Point]:
    """The values of `line` under their names, without those that are None."""
    for key, name in names:
        value = line.get(key)
        if value is not None:
            yield Point(name, float(value), line["step"])
