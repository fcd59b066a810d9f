"""What the folder of a run keeps for its trackers, so that `roll-sft sync` can send the run later.

`.tracking.json` holds the facts of the run, how many of its steps are recorded, and how it ended.
`.tensorboard_run` and `.wandb_run` hold a `Note` each: what the tracker has of the run.
"""

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from roll_sft.base.errors import ConfigError, first_line
from roll_sft.base.files import write_durably
from roll_sft.tracking.run_facts import DataInput, RunFacts

FILE = ".tracking.json"
NO_FACTS = RunFacts(params={}, tags={}, inputs=())


class RunRecord:
    """The file of the run in `folder`. Its methods may be called from any thread."""

    def __init__(self, folder: Path, logging_steps: int, total_steps: int) -> None:
        self._path = folder / FILE
        self.logging_steps, self.total_steps = logging_steps, total_steps
        self._facts: RunFacts | None = None
        self._lock = threading.Lock()

    def facts(self, compute: Callable[[], RunFacts]) -> RunFacts:
        """The facts of the run, which the first call computes and writes."""
        with self._lock:
            if self._facts is None:
                self._facts = compute()
                self._write("RUNNING")
            return self._facts

    def close(self, status: str) -> None:
        """Write how the run ended; nothing where no tracker was started."""
        with self._lock:
            if self._facts is not None:
                self._write(status)

    def _write(self, status: str) -> None:
        assert self._facts is not None, "there are facts to write"
        values = {
            "logging_steps": self.logging_steps,
            "total_steps": self.total_steps,
            "status": status,
            "facts": asdict(self._facts),
        }
        with contextlib.suppress(OSError):  # a full disk: the run itself says so
            write_durably(self._path, json.dumps(values, indent=1) + "\n")


def read_record(folder: Path) -> tuple[RunRecord, RunFacts, str]:
    """The record of the run in `folder`, its facts and how it ended.

    A run that was killed before the file was written has every step recorded, and no facts. Raises
    `ConfigError` for a file that is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return RunRecord(folder, 1, 0), NO_FACTS, "RUNNING"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        record = RunRecord(folder, int(values["logging_steps"]), int(values["total_steps"]))
        known = values["facts"]
        inputs = tuple(DataInput(**each) for each in known["inputs"])
        facts = RunFacts(params=dict(known["params"]), tags=dict(known["tags"]), inputs=inputs)
        return record, facts, str(values["status"])
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {first_line(error)}; delete it, and the run is sent without"
            " its parameters"
        ) from error


@dataclass(frozen=True, slots=True)
class Note:
    """What a tracker has of a run: its own id of it, the last step, and whether it is whole."""

    run_id: str
    step: int
    is_finished: bool = False

    def write(self, path: Path) -> None:
        """Replace the note at `path`."""
        write_durably(path, json.dumps(asdict(self)) + "\n")


def read_note(path: Path) -> Note | None:
    """The note at `path`; None where there is none that can be read."""
    try:
        return Note(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
