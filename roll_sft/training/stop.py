"""A request to end a run before its last step, and what the command brings to a run.

Who asks may be a signal (`roll_sft/signals.py`), the clock (`train.max_duration`) or a node that
leaves. Before and after training a request interrupts the command. During training it is noted, and
the driver finishes the step, saves it and leaves the block of `deferred`, which raises.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roll_sft.base.errors import PreemptedError
from roll_sft.config.schema import RunConfig
from roll_sft.training.terminal import StartUp


class Stop:
    """Whether a run has to end, and why. `outlook` says what the same command does then.

    `deadline` is on the monotonic clock; `limit` is where `train.max_duration` asks. `changed` is
    called when somebody asks and where `deferred` ends.
    """

    def __init__(self, config: RunConfig, *, grace_s: float) -> None:
        self.reason: str | None = None
        self.outlook = "nothing was begun: the same command begins the run"
        self.grace_s, self.deadline = grace_s, 0.0
        seconds = config.train.duration_s
        self.limit = None if seconds is None else time.monotonic() + seconds - grace_s
        self.is_deferred = self.is_late = False
        self.second: int | None = None  # a signal after the first one
        self.changed: Callable[[], None] = lambda: None

    def ask(self, reason: str) -> None:
        """Request the end of the run, from any thread."""
        if self.reason is None:
            self.reason, self.deadline = reason, time.monotonic() + self.grace_s
            self.changed()

    def is_asked(self) -> bool:
        """Whether the run has to end."""
        if self.limit is not None and time.monotonic() >= self.limit:
            self.ask("train.max_duration ends")
        return self.reason is not None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """The block looks at `is_asked` where it can end. Raises `PreemptedError` after it."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
            self.changed()
        if self.reason is not None:
            raise PreemptedError(self.last_line())

    def last_line(self) -> str:
        """Why the run ends, and what the same command does then."""
        short = f"cluster.grace_s={self.grace_s:g} was too short for a step and a save; "
        return f"{self.reason}: {short if self.is_late else ''}{self.outlook}"


@dataclass(frozen=True, slots=True)
class Command:
    """What the command brings to a run beside its job.

    `composed_yaml` is kept with the results. `as_guest` is for a user's own program.
    """

    composed_yaml: str
    clock: StartUp
    stop: Stop
    as_guest: bool = False
    metric_fn: Callable[..., Any] | None = None  # of a user's own program


def kept(checkpoint: Path | None) -> str:
    """What the same command does where `checkpoint` is the newest there is."""
    if checkpoint is None:
        return "no checkpoint was made yet: the same command begins again with step 1"
    return f"{checkpoint} is kept: the same command goes on from it"
