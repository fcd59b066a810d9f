"""Files of JSON lines that grow, each line read once; a run may be writing the last one."""

import json
import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

MARK = 256  # bytes
NOT_NUMBERS = ("sample_ids_sha256",)


class Kept(Protocol):
    """What takes the records of a file."""

    def append(self, record: dict[str, Any], /) -> None:
        """Take one more record."""

    def clear(self) -> None:
        """Forget all of them."""


class Tail:
    """Gives `kept` each whole record of the file at `path` that has come since the last `read`.

    Where the file was cut or replaced, `kept` is cleared, and the file is read from its beginning.
    What cannot be read is left out.
    """

    def __init__(self, path: Path, kept: Kept) -> None:
        self._path, self._kept = path, kept
        self._end, self._mark = 0, b""  # what was read, and the last bytes of it

    def read(self) -> None:
        """Read on."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._end - len(self._mark))
                if file.read(len(self._mark)) != self._mark:
                    self._forget()
                    file.seek(0)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._end += len(line)
                    self._mark = (self._mark + line)[-MARK:]
                    if isinstance(found := parsed(line), dict):
                        self._kept.append(found)
        except FileNotFoundError:
            self._forget()
        except OSError:
            return

    def _forget(self) -> None:
        self._end, self._mark = 0, b""
        self._kept.clear()


class Columns:
    """The lines of steps.jsonl that have a step, as a column of numbers for each key."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all lines."""
        self._size = 0
        self._columns: dict[str, array[float]] = {}
        self._load: tuple[int, list[Any]] = -1, []  # the greatest step, tokens of each expert

    def append(self, line: dict[str, Any], /) -> None:
        """Take one more line."""
        step = step_of(line)
        if step is None:
            return
        for key, value in line.items():
            if key in NOT_NUMBERS:
                continue
            column = self._columns.get(key)
            if column is None:
                column = self._columns[key] = array("d")
            if len(column) < self._size:
                column.extend([math.nan] * (self._size - len(column)))
            column.append(value if type(value) is float else number(value))
        self._size += 1
        load = line.get("tokens_per_expert")
        if isinstance(load, list) and load and step >= self._load[0]:
            self._load = step, load

    @property
    def experts(self) -> dict[int, list[float]]:
        """The greatest step that tells it -> tokens of each expert."""
        step, load = self._load
        return {step: [number(value) for value in load]} if load else {}

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Key -> float64 [n], in the order of steps, NaN where a line has no number."""
        if not self._size:
            return {}
        for column in self._columns.values():
            column.extend([math.nan] * (self._size - len(column)))
        order = np.argsort(np.array(self._columns["step"]), kind="stable")
        return {key: np.array(column)[order] for key, column in self._columns.items()}


def parsed(text: str | bytes) -> Any:
    """The value of a text of JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def number(value: object) -> float:
    """`value` as a number, NaN for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.nan
    return math.nan


def step_of(line: Mapping[str, Any]) -> int | None:
    """The step of a line; None where it has none."""
    value = number(line.get("step"))
    return int(value) if 0 <= value < 1e12 else None
