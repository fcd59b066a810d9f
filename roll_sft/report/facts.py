"""The tables of a report: what each run came to, its configuration, samples, data and ends."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from roll_sft.base.metrics import format_seconds
from roll_sft.base.text import printable
from roll_sft.report.run_files import RunFiles, evaluations
from roll_sft.report.state import State
from roll_sft.report.tail import number

MAX_PROMPTS, MAX_TIMES = 8, 4  # of generated samples: prompts, and steps beside each other
MAX_TEXT = 3_000  # characters of a sample
MAX_LINES = 50  # of a table of bad batches, or of starts
# Where a run writes and what it is called is no difference between two runs.
_NOT_COMPARED = ("output_dir", "run_name")


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` under `columns`; a row that `is_marked` tells is shown so."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """What was generated for one prompt: a heading, the text and the metrics of each column."""

    prompt: str
    reference: str
    outputs: list[tuple[str, str, str]]


def summary(runs: Sequence[RunFiles], states: Sequence[State]) -> Table:
    """A row for each fact, a column for each run."""
    found: dict[str, list[str]] = {}
    for at, (run, state) in enumerate(zip(runs, states, strict=True)):
        for name, value in _facts(run, state).items():
            found.setdefault(name, [""] * len(runs))[at] = value
    rows = [[name, *values] for name, values in found.items()]
    return Table("Summary", ["", *(run.name for run in runs)], rows)


def _facts(run: RunFiles, state: State) -> dict[str, str]:
    """Name -> value, as far as the files tell."""
    code = "" if state.exit_code is None else f" (exit code {state.exit_code})"
    facts = {"state": f"{state.kind}{code}"}
    if len(run.step):
        seconds = run.column("step_time_s")
        facts["steps"] = f"{int(run.step[-1]):,} in {format_seconds(float(np.nansum(seconds)))}"
        tokens, supervised = run.column("total_tokens"), run.column("supervised_tokens")
        facts["tokens"] = f"{np.nansum(tokens):,.0f}, {np.nansum(supervised):,.0f} supervised"
        facts["train loss"] = _last_and_best(run.step, run.column("train_loss"))
        facts |= _speed(run)
    for name, (steps, losses) in evaluations(run).items():
        facts[f"eval/{name} loss"] = _last_and_best(steps, losses)
    facts["bad batches"] = str(len(run.bad_batches)) if run.bad_batches else ""
    return {name: value for name, value in facts.items() if value}


def _speed(run: RunFiles) -> dict[str, str]:
    facts, device = {}, run.column("per_device_tps")
    if np.isfinite(device).any():
        facts["median speed"] = f"{np.nanmedian(device):,.0f} tokens/s per device"
    if np.isfinite(run.column("mfu")).any():
        facts["median MFU"] = f"{100 * np.nanmedian(run.column('mfu')):.1f} %"
    if np.isfinite(run.column("peak_memory_gib")).any():
        facts["peak memory"] = f"{np.nanmax(run.column('peak_memory_gib')):.2f} GiB per worker"
    return facts


def _last_and_best(steps: Any, values: Any) -> str:
    is_known = np.isfinite(values)
    if not is_known.any():
        return ""
    steps, values = steps[is_known], values[is_known]
    best = int(values.argmin())
    return (
        f"{values[-1]:.4f} at step {steps[-1]:,.0f}; best {values[best]:.4f} at {steps[best]:,.0f}"
    )


def parts(runs: Sequence[RunFiles]) -> list[Table]:
    """The last evaluation of each validation set by part, with its best."""
    tables = []
    for run in runs:
        last = {str(line.get("name")): line for line in run.evals}
        rows = []
        for name, line in last.items():
            found = line.get("parts")
            parts_ = found if isinstance(found, dict) else {}
            if not math.isfinite(number(line.get("loss"))):
                continue
            rows.append(_part_row(name, line))
            rows += [_part_row(f"- {part}", v) for part, v in parts_.items() if isinstance(v, dict)]
        title = f"Last evaluation of {run.name}" if len(runs) > 1 else "Last evaluation"
        columns = ["set", "loss", "perplexity", "token accuracy", "supervised tokens", "best loss"]
        if rows:
            tables.append(Table(title, columns, rows))
    return tables


def _part_row(name: str, line: dict[str, Any]) -> list[str]:
    best, accuracy = number(line.get("best_loss")), number(line.get("token_accuracy"))
    step = number(line.get("best_step"))
    return [
        name,
        _shown(line.get("loss"), ".4f"),
        _shown(line.get("perplexity"), ",.2f"),
        f"{accuracy:.1%}" if math.isfinite(accuracy) else "",
        _shown(line.get("supervised_tokens"), ",.0f"),
        f"{best:.4f} at step {step:,.0f}" if math.isfinite(best) else "",
    ]


def _shown(value: object, form: str) -> str:
    found = number(value)
    return format(found, form) if math.isfinite(found) else ""


def samples(runs: Sequence[RunFiles]) -> list[Sample]:
    """Of one run each prompt over time, of several the last output of each."""
    prompts: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        steps = sorted({int(number(line["step"])) for line in run.generations})
        if len(runs) > 1:
            steps = steps[-1:]
        places = np.linspace(0, len(steps) - 1, min(MAX_TIMES, len(steps)))
        chosen = {steps[round(place)] for place in places}
        for line in run.generations:
            step = int(number(line["step"]))
            if step in chosen:
                head = f"step {step:,}" if len(runs) == 1 else f"{run.name}, step {step:,}"
                prompts.setdefault(_text(line.get("prompt")), {})[head] = line
    found = []
    for prompt, lines in [*prompts.items()][:MAX_PROMPTS]:
        outputs = [
            (head, _text(line.get("output")), _metrics(line)) for head, line in lines.items()
        ]
        reference = next(
            (_text(each["reference"]) for each in lines.values() if each.get("reference")), ""
        )
        found.append(Sample(prompt, reference, outputs))
    return found


def _metrics(line: dict[str, Any]) -> str:
    found = line.get("metrics")
    values = found.items() if isinstance(found, dict) else ()
    known = [(name, number(value)) for name, value in values]
    return ", ".join(f"{name} {value:.3g}" for name, value in known if math.isfinite(value))


def _text(value: object) -> str:
    """A prompt or an output: a text, or messages."""
    if isinstance(value, list):
        turns = [each if isinstance(each, dict) else {"content": each} for each in value]
        value = "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ...")


def configuration(runs: Sequence[RunFiles]) -> Table | None:
    """Of several runs the keys that differ; of one run all of them."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    if len(runs) > 1:
        keys = dict.fromkeys(
            key
            for key in keys
            if key not in _NOT_COMPARED and len({run.config.get(key) for run in runs}) > 1
        )
    title = "Configuration" if len(runs) == 1 else "Configuration, where the runs differ"
    rows = [[key, *(run.config.get(key, "") for run in runs)] for key in keys]
    if not rows and len(runs) > 1:
        rows = [["(no key differs)", *("" for _ in runs)]]
    return Table(title, ["key", *(run.name for run in runs)], rows) if rows else None


def data(runs: Sequence[RunFiles]) -> list[Table]:
    """What became of the rows of each source."""
    tables = []
    for run in runs:
        rows = []
        for each in run.data:
            dropped = each.get("dropped")
            reasons = dropped.items() if isinstance(dropped, dict) else ()
            rows.append(
                [
                    f"{each.get('name')} ({each['kind']})",
                    *(
                        _shown(each.get(key), ",.0f")
                        for key in ("rows", "kept", "samples", "tokens")
                    ),
                    _shown(100 * number(each.get("supervised_share")), ".0f"),
                    ", ".join(f"{_shown(n, ',.0f')} {reason}" for reason, n in reasons) or "none",
                ]
            )
        columns = ["source", "rows", "kept", "samples", "tokens", "% supervised", "dropped"]
        title = f"Data of {run.name}" if len(runs) > 1 else "Data"
        if rows:
            tables.append(Table(title, columns, rows))
    return tables


def environment(runs: Sequence[RunFiles]) -> Table | None:
    """Host, device and versions: a column for each run."""
    found: dict[str, list[str]] = {}
    for at, run in enumerate(runs):
        started = [line for line in run.starts if line.get("event") == "start"]
        last: dict[str, Any] = started[-1] if started else {}
        facts: dict[str, str] = {}
        facts |= {name: str(last[name]) for name in ("host", "device", "python") if name in last}
        for name, value in (facts | run.versions).items():
            found.setdefault(name, [""] * len(runs))[at] = value
    rows = [[name, *values] for name, values in found.items()]
    return Table("Environment", ["", *(run.name for run in runs)], rows) if rows else None


def starts(runs: Sequence[RunFiles]) -> list[Table]:
    """When each run was started and how it ended."""
    tables = []
    for run in runs:
        rows = []
        for line in run.starts[-MAX_LINES:]:
            seconds = number(line.get("time"))
            when = (
                ""
                if not 0 <= seconds < 1e11
                else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
            )
            if line["event"] == "start":
                what = f"starts with step {_shown(line.get('step'), ',.0f')} on {line.get('host')}"
            else:
                code, cause = _shown(line.get("exit_code"), ".0f"), line.get("cause")
                what = f"ends with exit code {code}" + (
                    f": {printable(str(cause))}" if cause else ""
                )
            rows.append([when, what])
        title = f"Starts and ends of {run.name}" if len(runs) > 1 else "Starts and ends"
        if rows:
            tables.append(Table(title, ["time", "what"], rows))
    return tables


def slow_ranks(runs: Sequence[RunFiles]) -> list[Table]:
    """The ranks that were slower than the others, and since when."""
    tables = []
    for run in runs:
        rows = [
            [
                _shown(line.get("step"), ",.0f"),
                _shown(line.get("rank"), ".0f"),
                printable(str(line.get("host"))),
                printable(str(line.get("device"))),
                _shown(line.get("times_as_long"), ".2f"),
            ]
            for line in run.stragglers[:MAX_LINES]
        ]
        title = f"Slow ranks of {run.name}" if len(runs) > 1 else "Slow ranks"
        if rows:
            columns = ["found after step", "rank", "host", "device", "times as long"]
            tables.append(Table(title, columns, rows))
    return tables


def bad_batches(runs: Sequence[RunFiles]) -> list[Table]:
    """The samples of each step whose loss or gradient was not finite."""
    tables = []
    for run in runs:
        rows = []
        for line in run.bad_batches[:MAX_LINES]:
            names = line.get("samples")
            shown = ", ".join(map(str, names[:20])) if isinstance(names, list) else ""
            more = ", ..." if isinstance(names, list) and len(names) > 20 else ""
            loss, norm = (
                _shown(line.get(key), ".4g") or "not finite" for key in ("train_loss", "grad_norm")
            )
            rows.append([_shown(line["step"], ",.0f"), loss, norm, printable(shown + more)])
        title = f"Bad batches of {run.name}" if len(runs) > 1 else "Bad batches"
        if rows:
            tables.append(Table(title, ["step", "train loss", "gradient norm", "samples"], rows))
    return tables
