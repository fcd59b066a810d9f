"""The table at the end of a run, and the commands that come next.

Its numbers come from `steps.jsonl` and `eval.jsonl`, so they cover the whole of a resumed run. Only
`duration` is that of this command.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from roll_sft.base.console import stdout_console
from roll_sft.base.files import json_lines
from roll_sft.base.metrics import format_seconds
from roll_sft.config.schema import RunConfig
from roll_sft.training import run_folder


def show_summary(config: RunConfig, folder: Path, *, elapsed_s: float) -> None:
    """Print the summary of the run in `folder`; nothing if it has no step."""
    rows = list(_rows(folder, elapsed_s=elapsed_s))
    if not rows:
        return
    console = stdout_console()
    title = f"Summary of {config.run_name}"
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for what, value in rows:
        table.add_row(what, value)
    console.print()
    console.print(table)
    commands = list(_next_commands(config, folder))
    if commands:
        console.print("\nNext", style="bold")
    for command in commands:
        console.print(f"  {command}", soft_wrap=True)
    console.print()


class _Totals:
    """Sums over the steps of a run, in one pass, because a long run has millions of lines."""

    def __init__(self, path: Path) -> None:
        self.num_steps = self.num_skipped = self.tokens = self.supervised_tokens = 0
        self.seconds = self.device_seconds = self.peak_memory_gib = 0.0
        self.loss = _Loss()
        for step in json_lines(path):
            self.num_steps += 1
            self.tokens += step["total_tokens"]
            self.supervised_tokens += step["supervised_tokens"]
            self.seconds += step["step_time_s"]
            self.device_seconds += step["total_tokens"] / step["per_device_tps"]
            self.peak_memory_gib = max(self.peak_memory_gib, step["peak_memory_gib"])
            self.num_skipped += "skipped" in step
            if step["train_loss"] is not None:
                self.loss.add(step["step"], step["train_loss"])


class _Loss:
    """The last and the lowest value of a loss, with their steps."""

    def __init__(self) -> None:
        self.last = self.best = (0, float("inf"))  # (step, loss)

    def add(self, step: int, loss: float) -> None:
        self.last = (step, loss)
        self.best = min(self.best, self.last, key=lambda each: each[1])

    def __str__(self) -> str:
        (step, loss), (best_step, best) = self.last, self.best
        return f"{loss:.4f} at step {step:,}; best {best:.4f} at step {best_step:,}"


def _rows(folder: Path, *, elapsed_s: float) -> Iterator[tuple[str, str]]:
    totals = _Totals(folder / "steps.jsonl")
    if not totals.num_steps:
        return
    evaluations: dict[str, _Loss] = {}
    for line in json_lines(folder / "eval.jsonl"):
        if "loss" in line:  # not of generated answers
            evaluations.setdefault(line["name"], _Loss()).add(line["step"], line["loss"])
    per_device = totals.tokens / totals.device_seconds
    yield "duration", format_seconds(elapsed_s)
    yield "steps", f"{totals.num_steps:,} in {format_seconds(totals.seconds)}"
    if totals.num_skipped:
        yield "skipped steps", f"{totals.num_skipped:,}, see bad_batches.jsonl"
    yield "tokens", f"{totals.tokens:,}, of which {totals.supervised_tokens:,} supervised"
    speed = totals.tokens / totals.seconds
    yield "mean speed", f"{speed:,.0f} tokens/s, {per_device:,.0f} tokens/s/device"
    yield "train loss", str(totals.loss)
    for name, loss in evaluations.items():
        yield f"eval/{name} loss", str(loss)
    yield "peak memory", f"{totals.peak_memory_gib:.2f} GiB per worker"
    yield from _files(folder)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """The model, the newest checkpoint, and the names of all files."""
    for what, name in (("model", run_folder.MODEL), ("adapter", run_folder.ADAPTER)):
        exported = folder / name
        if exported.is_dir():
            yield what, f"{_shown(exported)} ({_size(exported)})"
    steps = sorted(folder.glob(f"{run_folder.CHECKPOINTS}/step_*"))
    if steps:
        yield "newest checkpoint", f"{_shown(steps[-1])} ({_size(steps[-1])})"
    if (report := folder / "report.html").exists():
        yield "report", _shown(report)
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    names = [f"{path.name}/" if path.is_dir() else path.name for path in visible]
    yield "all files", f"{_shown(folder)}: {', '.join(names)}"


def _next_commands(config: RunConfig, folder: Path) -> Iterator[str]:
    if "mlflow" in config.tracking.backends:
        from roll_sft.tracking.mlflow_pages import pages

        yield from pages(config, folder, database=_shown(folder.parent / "mlflow.db"))
    if (folder / "tensorboard").is_dir():
        yield f"tensorboard --logdir {shlex.quote(_shown(folder.parent))}"
    offline = sorted(folder.glob("wandb/offline-run-*"))
    if offline:
        yield f"wandb sync {' '.join(shlex.quote(_shown(each)) for each in offline)}"
    steps = sorted(folder.glob(f"{run_folder.CHECKPOINTS}/step_*"))
    if steps and not (folder / run_folder.MODEL).is_dir():
        yield f"roll-sft convert {shlex.quote(_shown(steps[-1]))} --output my_model"


def _shown(path: Path) -> str:
    """`path`, relative to the current folder if it lies there."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
