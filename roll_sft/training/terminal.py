"""What the driver shows while it runs: log lines, a line for each logged step, and a live line.

On a terminal the prefix of a line is the time of day, and a live line below the log carries step,
bar, loss and time left. Elsewhere each line is plain, with its date. Nothing here is read by
programs: they read `steps.jsonl`.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
from rich.progress import BarColumn, Progress, TextColumn

from roll_sft.base.console import CLOCK, CONSOLE
from roll_sft.base.metrics import StepRecord, format_seconds

if TYPE_CHECKING:
    from roll_sft.training.notebook import NotebookProgress

LOG = logging.getLogger(__name__)
BAR_WIDTH = 40  # columns at most; a narrow terminal has fewer


class StepDisplay:
    """Shows finished steps; `progress` is the live line, None in a file."""

    def __init__(
        self,
        progress: "Progress | NotebookProgress | None",
        total_steps: int,
        *,
        logging_steps: int,
        first_step: int,
    ) -> None:
        self._progress, self._logging_steps = progress, logging_steps
        self._total = total_steps
        self._first: tuple[int, float] | None = None  # the first finished step, and when it was
        if progress is not None:
            done = first_step - 1
            self._task: Any = progress.add_task(
                "", total=total_steps, completed=done, text="starting workers"
            )

    def show(self, record: StepRecord) -> None:
        """Report one finished step; a line each `logging_steps` and on the last."""
        loss, eta = f"loss {record.train_loss:.4f}", f"ETA {self._time_left(record)}"
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, text=f"{loss}  {eta}")
        if record.step % self._logging_steps and record.step != self._total:
            return
        if CONSOLE.is_jupyter:  # whose output would keep a line of each
            return
        # In the order of importance: a narrow terminal shows the first ones.
        fields = [
            f"step {record.step}/{self._total}",
            loss,
            eta,
            f"{record.per_device_tps:,.0f} tok/s/device",
            f"lr {record.learning_rate:.2e}",
            f"grad {record.grad_norm:.3f}",
            f"{record.step_time_s:.2f} s",
            f"packs {100 * record.pack_fill:.0f} % full",
        ]
        LOG.info("%s", "  ".join(fields if self._progress is None else _fitting(fields)))

    def _time_left(self, record: StepRecord) -> str:
        """From the mean time of this process's steps, with its evaluations and saves."""
        now = time.monotonic()
        if self._first is None:
            self._first = (record.step, now)
        step, then = self._first
        per_step = (now - then) / (record.step - step) if record.step > step else record.step_time_s
        return format_seconds(per_step * (self._total - record.step))


@contextmanager
def step_display(
    total_steps: int, *, logging_steps: int, first_step: int = 1
) -> Iterator[StepDisplay]:
    """The run's only progress display."""
    if CONSOLE.is_jupyter:
        from roll_sft.training.notebook import NotebookProgress

        bar = NotebookProgress()
        yield StepDisplay(bar, total_steps, logging_steps=logging_steps, first_step=first_step)
        return
    if not CONSOLE.is_terminal:
        yield StepDisplay(None, total_steps, logging_steps=logging_steps, first_step=first_step)
        return
    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(BAR_WIDTH),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=CONSOLE, transient=True, refresh_per_second=2) as progress:
        yield StepDisplay(progress, total_steps, logging_steps=logging_steps, first_step=first_step)


def _fitting(fields: list[str]) -> list[str]:
    """The first `fields` that fit into a line of the terminal; the first three always."""
    room = CONSOLE.width - len(time.strftime(CLOCK))
    fits = [len("  ".join(fields[: n + 1])) <= room for n in range(len(fields))]
    return [field for n, field in enumerate(fields) if n < 3 or fits[n]]


class StartUp:
    """A clock that began with this process or, `as_guest` in a program of a user, now."""

    def __init__(self, *, as_guest: bool = False) -> None:
        self._began = self._last = time.time() if as_guest else psutil.Process().create_time()
        self._parts: list[str] = []

    def passed(self, name: str) -> None:
        """What took the time since the last call, or since the beginning."""
        now = time.time()
        self._parts.append(f"{name} {now - self._last:.1f}")
        self._last = now

    def elapsed_s(self) -> float:
        """Seconds since the clock began."""
        return float(time.time() - self._began)

    def __str__(self) -> str:
        return f"{self._last - self._began:.1f} s after the command: {', '.join(self._parts)}"
