"""`roll-sft watch RUN`: how a run goes, from its files, on any machine that sees its folder.

On a terminal one view is drawn again and again, with state, time left, curves and the last samples.
Elsewhere each new step is a line. It ends when the run does, or with Ctrl-C; Ray is not needed.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from roll_sft.base.console import stdout_console
from roll_sft.base.errors import RollSftError, report
from roll_sft.base.metrics import format_seconds
from roll_sft.base.text import printable
from roll_sft.report import terminal_chart
from roll_sft.report.facts import samples
from roll_sft.report.run_files import RunFiles, RunReader, evaluations, read_run
from roll_sft.report.state import State, current_state
from roll_sft.report.tail import number

EVERY_S = 2.0
FIRST_LINES = 10  # steps of before that are shown where there is no terminal
CHART_HEIGHT = 6  # lines
NUM_SAMPLES, SAMPLE_LENGTH = 2, 400  # of the last generation
_COLORS = {"running": "green", "finished": "green", "failed": "bold red", "quiet": "bold yellow"}
# Key of steps.jsonl -> name of its curve.
_CURVES = {
    "train_loss": "train loss",
    "grad_norm": "gradient norm",
    "per_device_tps": "tokens/s per device",
    "learning_rate": "learning rate",
}


def main(arguments: Sequence[str] | None = None, *, program: str = "roll-sft watch") -> int:
    """Follow the run that `arguments` name; returns the exit code, 0 also after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Follows a run from its files: state, curves, last samples. Ends with the run,"
        " or with Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--once", action="store_true", help="print one view, and end")
    options = parser.parse_args(arguments)
    console = stdout_console()
    try:
        run = read_run(options.run)
        if options.once:
            console.print(view(run, current_state(run), width=console.width))
        elif console.is_terminal:
            _follow(options.run, console)
        else:
            _follow_plainly(options.run)
    except RollSftError as error:
        return report(error)
    except KeyboardInterrupt:
        pass
    return 0


def view(run: RunFiles, state: State, *, width: int) -> Group:
    """Everything about `run` in lines of at most `width` columns."""
    head = Text.assemble(
        (printable(run.name), "bold"), "  ", (state.kind, _COLORS.get(state.kind, "yellow"))
    )
    if state.exit_code is not None:
        head.append(f" (exit code {state.exit_code})")
    parts = [head, Text(printable(state.text), "dim")]
    parts += [Text(line) for line in _standing(run)]
    for row in _charts(run, width=width):
        parts += [Text(), *map(Text, row)]
    for each in samples([_last_generation(run)])[:NUM_SAMPLES]:
        for name, text, metrics in each.outputs:
            parts += [Text(), Text(f"{name}  {metrics}".rstrip(), "dim")]
            parts += [Text(f"> {_cut(each.prompt)}", "dim"), Text(_cut(text))]
    return Group(*parts)


def _follow(folder: Path, console: Console) -> None:
    """Draw the view again until the run has ended."""
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        for run, state in _looks(folder):
            live.update(view(run, state, width=console.width), refresh=True)


def _follow_plainly(folder: Path) -> None:
    """A line for each new step, and one for each change of the state."""
    shown, kind = 0.0, ""
    for run, state in _looks(folder):
        if not shown and len(run.step) > FIRST_LINES:
            shown = run.step[-FIRST_LINES - 1]
        for step, loss in zip(run.step, run.column("train_loss"), strict=True):
            if step > shown:
                sys.stdout.write(f"step {step:.0f}  loss {loss:.4f}\n")
                shown = step
        if state.kind != kind:
            sys.stdout.write(f"{state.kind}: {printable(state.text)}\n")
            kind = state.kind
        sys.stdout.flush()


def _looks(folder: Path) -> Iterator[tuple[RunFiles, State]]:
    """The run again and again until it has ended; less often where it takes long to read."""
    reader = RunReader(folder)
    while True:
        began = time.monotonic()
        run = reader.read()
        state = current_state(run)
        yield run, state
        if state.is_over:
            return
        time.sleep(max(EVERY_S, 10 * (time.monotonic() - began)))


def _standing(run: RunFiles) -> list[str]:
    """The last step with the time left, and the last value of each validation set."""
    if not len(run.step):
        return []
    last, total = run.step[-1], total_steps(run)
    times = run.column("step_time_s")[-50:]
    typical = float(np.median(times[np.isfinite(times)])) if np.isfinite(times).any() else 0.0
    of_all = f"/{total:,.0f}" if total else ""
    left = f"  about {format_seconds(typical * (total - last))} left" if total > last else ""
    lines = [f"step {last:,.0f}{of_all}  {typical:.2f} s per step{left}"]
    for name, (steps, losses) in evaluations(run).items():
        best = int(losses.argmin())
        lines.append(
            f"eval/{printable(name)} loss {losses[-1]:.4f} at step {steps[-1]:,.0f}, best"
            f" {losses[best]:.4f} at {steps[best]:,.0f}"
        )
    if run.bad_batches:
        lines.append(f"bad batches: {len(run.bad_batches)}")
    for line in run.stragglers[-3:]:
        rank, host, device = (printable(str(line.get(key))) for key in ("rank", "host", "device"))
        lines.append(f"slow: rank {rank} on {host} ({device})")
    return lines


def total_steps(run: RunFiles) -> float:
    """Steps of the whole run, as its last start has them; 0 where none says so."""
    found = [number(line.get("total_steps")) for line in run.starts]
    known = [each for each in found if each > 0]
    return known[-1] if known else 0.0


def _charts(run: RunFiles, *, width: int) -> list[list[str]]:
    """The curves, two beside each other where the terminal is wide enough."""
    across = 2 if width >= 90 else 1
    room = (width - 3 * (across - 1)) // across
    charts = [
        terminal_chart.chart(name, run.step, run.column(key), width=room, height=CHART_HEIGHT)
        for key, name in _CURVES.items()
    ]
    charts = [each for each in charts if each]
    rows = []
    for first in range(0, len(charts), across):
        beside = charts[first : first + across]
        lines = zip(*([line.ljust(room) for line in each] for each in beside), strict=True)
        rows.append(["   ".join(line).rstrip() for line in lines])
    return rows


def _last_generation(run: RunFiles) -> RunFiles:
    steps = [number(line["step"]) for line in run.generations]
    last = [line for line in run.generations if number(line["step"]) == max(steps)]
    return replace(run, generations=last)


def _cut(text: str) -> str:
    return text if len(text) <= SAMPLE_LENGTH else f"{text[:SAMPLE_LENGTH]} ..."
