"""The files of a run, read for a report: whatever is there, and nothing that must be.

Assumes nothing of the content: a folder may come from an earlier version, a failed run, or another
machine. Promise: no file and no value in one raises; what cannot be read is left out.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from roll_sft.base.errors import ConfigError
from roll_sft.base.text import redacted
from roll_sft.report import PACKS, RESTARTS, STARTS, STRAGGLERS
from roll_sft.report.tail import Columns, Tail, number, parsed, step_of

Array = NDArray[np.float64]
STEPS, EVALS = "steps.jsonl", "eval.jsonl"
GENERATIONS, BAD_BATCHES = "generations.jsonl", "bad_batches.jsonl"
_MOST_KEYS = 2_000  # of a configuration
_MOST_BYTES = 4 << 20  # of a file that is read whole


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What the files of a run say.

    `steps`: of each key of steps.jsonl the values, float64 [n], NaN where a line has none; `step`
    ascends. `experts`: the last step that tells -> tokens of each expert. `config`: flattened, a
    value as text.
    """

    folder: Path
    name: str
    steps: dict[str, Array]
    experts: dict[int, list[float]] = field(default_factory=dict)
    evals: list[dict[str, Any]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)
    bad_batches: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)
    stragglers: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    packs: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def column(self, key: str) -> Array:
        """The values of `key` of each step, NaN where it has none."""
        return self.steps.get(key, np.full(len(self.step), np.nan))

    @property
    def step(self) -> Array:
        """The numbers of the steps, float64 [n]."""
        return self.steps.get("step", np.empty(0))


def read_run(folder: Path) -> RunFiles:
    """The run in `folder`. Raises `ConfigError` for a folder that is of no run."""
    return RunReader(folder).read()


class RunReader:
    """Reads the run in `folder` again and again; of the files that grow what is new."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._steps = Columns()
        names = (EVALS, GENERATIONS, BAD_BATCHES, STARTS, RESTARTS, STRAGGLERS)
        self._lines: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self._tails = [Tail(folder / STEPS, self._steps)]
        self._tails += [Tail(folder / name, lines) for name, lines in self._lines.items()]
        self._config = "", dict[str, str]()  # the text of config.yaml, and its keys

    def read(self) -> RunFiles:
        """The run as it is now. Raises `ConfigError` for a folder that is of no run."""
        folder = self._folder
        if not any((folder / name).is_file() for name in (STEPS, "config.yaml", STARTS)):
            what = (
                "has neither steps.jsonl nor config.yaml" if folder.is_dir() else "does not exist"
            )
            raise ConfigError(f"RUN: {str(folder)!r} {what}; give the output_dir of a run")
        for tail in self._tails:
            tail.read()
        text = _text(folder / "config.yaml")
        if text != self._config[0]:
            self._config = text, dict(islice(flat(_yaml(text)), _MOST_KEYS))
        config, starts = self._config[1], list(self._lines[STARTS])
        return RunFiles(
            folder=folder,
            name=redacted(config.get("run_name") or folder.resolve().name),
            steps=self._steps.arrays(),
            experts=self._steps.experts,
            evals=self._with_step(EVALS),
            generations=self._with_step(GENERATIONS),
            bad_batches=self._with_step(BAD_BATCHES),
            starts=[line for line in starts if line.get("event") in ("start", "end")],
            restarts=list(self._lines[RESTARTS]),
            stragglers=list(self._lines[STRAGGLERS]),
            config=config,
            data=_sources(_json(folder / "data_report.json")),
            packs=_json(folder / PACKS),
            versions=_versions(folder, starts),
        )

    def _with_step(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self._lines[name] if step_of(line) is not None]


def evaluations(run: RunFiles) -> dict[str, tuple[Array, Array]]:
    """Validation set -> steps and losses, float64 [n] each."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in run.evals:
        loss = number(line.get("loss"))
        if math.isfinite(loss):
            points.setdefault(str(line.get("name")), []).append((number(line["step"]), loss))
    arrays = {name: np.array(each) for name, each in points.items()}
    return {name: (each[:, 0], each[:, 1]) for name, each in arrays.items()}


def restarts(run: RunFiles) -> list[float]:
    """The steps with which a command, or new workers of the same command, went on."""
    found = [number(line.get("step")) for line in run.starts if line.get("event") == "start"]
    found += [number(line.get("from_step")) + 1 for line in run.restarts]
    return sorted({step for step in found if step > 1})


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of nested mappings as `section.key`, each value as text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float | list | None):
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{key}", redacted(text)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError:
        return ""
    return content.decode("utf-8", "replace") if len(content) <= _MOST_BYTES else ""


def _json(path: Path) -> dict[str, Any]:
    found = parsed(_text(path))
    return found if isinstance(found, dict) else {}


def _yaml(text: str) -> dict[str, Any]:
    try:
        found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sources(report: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for kind, title in (("sources", "train"), ("validation", "validation")):
        entries = report.get(kind)
        for each in entries if isinstance(entries, list) else []:
            if isinstance(each, dict):
                found.append({"kind": title, **each})
    return found


def _versions(folder: Path, starts: list[dict[str, Any]]) -> dict[str, str]:
    """Of the last start, or of a run that has no starts.jsonl, of its newest checkpoint."""
    found: Any = next((line.get("versions") for line in reversed(starts) if "versions" in line), {})
    if not found:
        steps = sorted(folder.glob("checkpoints/step_*"))
        found = _json(steps[-1] / "manifest.json").get("versions") if steps else {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def age_s(path: Path, now: float) -> float | None:
    """Seconds since `path` was written; None where there is no such file."""
    try:
        return max(0.0, now - os.stat(path).st_mtime)
    except OSError:
        return None
