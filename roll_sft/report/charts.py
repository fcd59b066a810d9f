"""Which charts a report has, of one run or of several over each other."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

import numpy as np

from roll_sft.report import drawing
from roll_sft.report.curves import Curve, curve, smoothed
from roll_sft.report.run_files import Array, RunFiles, evaluations, restarts
from roll_sft.report.tail import number

MAX_ROWS = 12  # of the table behind a chart
MAX_GROUPS = 8  # of a validation set, and of colours
LOG_FROM = 50.0  # greatest over least value of what is drawn on a logarithmic axis
MAX_PACKS = 80  # in the picture of a step
FILLED = -1  # style of a histogram that is no outline
MAX_MARKS = 50  # of bad batches, and of restarts


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture, its words, and the numbers behind it."""

    key: str
    title: str
    unit: str
    text: str  # what the chart says, and what to look for
    svg: str
    legend: list[tuple[int, str, int]]  # colour, name, style of the line
    columns: list[str]
    rows: list[list[str]]
    marks: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Series:
    """A chart of keys of steps.jsonl: a name and the values of each."""

    key: str
    title: str
    unit: str
    text: str
    values: tuple[tuple[str, Callable[[RunFiles], Array]], ...]
    may_be_log: bool = False


def _of(key: str) -> Callable[[RunFiles], Array]:
    return lambda run: run.column(key)


def _padding(run: RunFiles) -> Array:
    with np.errstate(all="ignore"):
        share = run.column("total_tokens") / run.column("total_tokens_including_padding")
    return 100 * (1 - share)


def _wait(run: RunFiles) -> Array:
    with np.errstate(all="ignore"):
        return 100 * run.column("data_wait_s") / run.column("step_time_s")


_SERIES = (
    _Series(
        "learning_rate",
        "Learning rate",
        "",
        "As the plan's schedule: warm-up, then decay.",
        (("", _of("learning_rate")),),
    ),
    _Series(
        "grad_norm",
        "Gradient norm",
        "before clipping",
        "Settles early. Spikes point at samples; growth with the loss at a learning rate that is"
        " too high.",
        (("", _of("grad_norm")),),
        may_be_log=True,
    ),
    _Series(
        "tokens",
        "Speed",
        "tokens/s per device",
        "Tokens without padding. Steady is good; the range of a point shows slow steps.",
        (("", _of("per_device_tps")),),
    ),
    _Series(
        "mfu",
        "Model FLOPs utilisation",
        "% of the bf16 peak",
        "35 to 55 % of the peak is usual with full packs.",
        (("", lambda run: 100 * run.column("mfu")),),
    ),
    _Series(
        "packs",
        "Packs",
        "%",
        "How full packs are, and the share of computed tokens that is padding.",
        (
            ("full", lambda run: 100 * run.column("pack_fill")),
            ("padding", _padding),
        ),
    ),
    _Series(
        "wait",
        "Waiting for data",
        "% of the step",
        "Below 1 %: batches are built while the step before runs.",
        (("", _wait),),
    ),
    _Series(
        "imbalance",
        "Imbalance of data ranks",
        "max / mean cost",
        "1 where all data-parallel ranks have equal work; the others wait for the busiest.",
        (("", _of("dp_imbalance")),),
    ),
    _Series(
        "memory",
        "Peak memory",
        "GiB",
        "The most that the reporting worker held in a step.",
        (("", _of("peak_memory_gib")),),
    ),
    _Series(
        "experts",
        "Imbalance of experts",
        "max / mean tokens",
        "Of the layer whose busiest expert gets the most; 1 where all get equal tokens.",
        (("", _of("expert_max_over_mean")),),
    ),
)


def charts_of(runs: Sequence[RunFiles]) -> list[Chart]:
    """The charts that the files of `runs` have numbers for, the loss first."""
    found = [_loss(runs)]
    if len(runs) == 1:
        found += [*_broken_down(runs[0]), *_answers(runs[0])]
    found += [_series(runs, series) for series in _SERIES]
    found += [_lengths(runs)]
    for run in runs:
        found += [_packs(run, prefix=f"{run.name}: " if len(runs) > 1 else ""), _experts(run)]
    numbers = count(1)
    return [replace(each, key=f"c{next(numbers)}-{each.key}") for each in found if each is not None]


def _loss(runs: Sequence[RunFiles]) -> Chart | None:
    curves, legend, color = list[Curve](), list[tuple[int, str, int]](), count()
    for run in runs:
        prefix, of_run = (f"{run.name}: " if len(runs) > 1 else ""), next(color)
        losses = smoothed(f"{prefix}train", run.step, run.column("train_loss"), color=of_run)
        if len(losses[-1].x):
            curves += losses
            legend.append((of_run, losses[-1].label, 0))
        for of_set, (name, (steps, values)) in enumerate(evaluations(run).items(), start=1):
            own, dash = (of_run, 1 + (of_set - 1) % 3) if len(runs) > 1 else (of_set, 1)
            line = curve(f"{prefix}{name}", steps, values, color=own, dash=dash)
            curves.append(replace(line, is_marked=len(line.x) <= 40))
            legend.append((own, line.label, dash))
    return _chart(
        (
            "loss",
            "Loss",
            "nats per supervised token",
            "Train loss of each step with its moving average, and validation losses, dashed."
            " Validation that rises while training falls: too many epochs, or a learning rate that"
            " is too high.",
        ),
        curves,
        legend=legend,
        runs=runs,
    )


def _series(runs: Sequence[RunFiles], series: _Series) -> Chart | None:
    curves, is_alone = list[Curve](), len(runs) == 1
    for of_run, run in enumerate(runs):
        for of_value, (name, values) in enumerate(series.values):
            label = ", ".join(filter(None, ["" if is_alone else run.name, name]))
            # A run has one colour in all charts.
            color, dash = (of_value, 0) if is_alone else (of_run, of_value)
            line = curve(label, run.step, values(run), color=color, dash=dash)
            if len(line.x):
                curves.append(line)
    legend = [(each.color, each.label, each.dash) for each in curves if each.label]
    y = np.concatenate([each.y for each in curves]) if curves else np.empty(0)
    is_log = series.may_be_log and len(y) > 0 and y.min() > 0 and y.max() / y.min() > LOG_FROM
    unit = ", ".join(filter(None, [series.unit, "logarithmic" if is_log else ""]))
    words = series.key, series.title, unit, series.text
    return _chart(words, curves, legend=legend, runs=runs, is_log=bool(is_log))


def _broken_down(run: RunFiles) -> Iterator[Chart | None]:
    """The losses of parts of each validation set."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in run.evals:
        parts = line.get("parts")
        for part, values in parts.items() if isinstance(parts, dict) else ():
            loss = number(values.get("loss")) if isinstance(values, dict) else math.nan
            if math.isfinite(loss):
                of_set = found.setdefault(str(line.get("name")), {})
                of_set.setdefault(part, []).append((number(line["step"]), loss))
    for name, of_set in found.items():
        curves = []
        for color, (part, points) in enumerate([*of_set.items()][:MAX_GROUPS]):
            steps, values = np.array(points).T
            line_ = curve(part, steps, values, color=color)
            curves.append(replace(line_, is_marked=len(line_.x) <= 40))
        yield _chart(
            (
                "parts",
                f"{name}, by part",
                "nats per supervised token",
                "The validation loss by the place of an answer in its conversation, and of tool"
                " calls apart.",
            ),
            curves,
            legend=[(each.color, each.label, 0) for each in curves],
            runs=[run],
        )


def _answers(run: RunFiles) -> Iterator[Chart | None]:
    """A chart for each metric of generated answers, of the lines of eval.jsonl that have some."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in run.evals:
        metrics = line.get("metrics")
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            if math.isfinite(number(value)):
                found.setdefault(name, []).append((number(line["step"]), number(value)))
    for name, points in [*found.items()][:MAX_GROUPS]:
        steps, values = np.array(points).T
        line_ = replace(curve("", steps, values, color=0), is_marked=len(steps) <= 40)
        words = ("answers", name, "generated answers", "The mean over all prompts.")
        yield _chart(words, [line_], legend=[], runs=[run])


def _chart(
    words: tuple[str, str, str, str],
    curves: list[Curve],
    *,
    legend: list[tuple[int, str, int]],
    runs: Sequence[RunFiles],
    is_log: bool = False,
) -> Chart | None:
    """The chart of `words`: key, title, unit and text. None without a point."""
    if not any(len(each.x) for each in curves):
        return None
    bad = [number(line["step"]) for run in runs for line in run.bad_batches][:MAX_MARKS]
    # Of several runs nobody could tell whose restart a line is.
    again = restarts(runs[0])[:MAX_MARKS] if len(runs) == 1 else []
    marks = ["bad batch"] * bool(bad) + ["restart"] * bool(again)
    named = [each for each in curves if not each.is_faint]
    columns, rows = _table(named)
    key, title, unit, text = words
    span = [step for run in runs for step in (*run.step[:1], *run.step[-1:])]
    svg = drawing.lines(curves, name=key, bad=bad, restarts=again, span=span, is_log=is_log)
    return Chart(key, title, unit, text, svg, legend, columns, rows, marks)


def _table(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    """A few steps and the value of each curve there, or at its nearest point."""
    steps = sorted({float(x) for each in curves for x in each.x})
    chosen = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(MAX_ROWS, len(steps)))]
    rows = []
    for step in dict.fromkeys(chosen):
        row = [f"{step:,.0f}"]
        for each in curves:
            nearest = int(np.abs(each.x - step).argmin()) if len(each.x) else -1
            row.append(f"{each.y[nearest]:.5g}" if nearest >= 0 else "")
        rows.append(row)
    return ["step", *(each.label or "value" for each in curves)], rows


def _lengths(runs: Sequence[RunFiles]) -> Chart | None:
    """The histogram of sample lengths; of several runs, the first that has one."""
    for run in runs:
        edges = _numbers(run.packs.get("edges"))
        pairs = [(name, _numbers(run.packs.get(name))) for name in ("tokens", "supervised")]
        values = [(name, counts) for name, counts in pairs if len(counts) == len(edges) - 1]
        if not values:
            continue
        rows = [
            [f"{low:,.0f} to {high:,.0f}", *(f"{counts[i]:,.0f}" for _, counts in values)]
            for i, (low, high) in enumerate(pairwise(edges))
        ]
        title = "Lengths of samples" + (f" of {run.name}" if len(runs) > 1 else "")
        return Chart(
            "lengths",
            title,
            "samples",
            "How many samples have so many tokens, and so many supervised ones, in the train set.",
            drawing.bars([(edges, each) for _, each in values], name="lengths", x="tokens"),
            [(color, name, 0 if color else FILLED) for color, (name, _) in enumerate(values)],
            ["tokens in all, or supervised", *(name for name, _ in values)],
            rows,
        )
    return None


def _packs(run: RunFiles, *, prefix: str) -> Chart | None:
    """The packs of one step by data rank, as the plan has them."""
    found, capacity = run.packs.get("ranks"), number(run.packs.get("capacity"))
    if not isinstance(found, list) or not found or not capacity > 0:
        return None
    ranks = [[_numbers(pack) for pack in rank] for rank in found if isinstance(rank, list)]
    shown, left = list[list[list[float]]](), MAX_PACKS
    for rank in ranks:
        shown.append(rank[:left])
        left -= len(shown[-1])
        if left <= 0:
            break
    total = sum(map(len, ranks))
    more = f" The first {MAX_PACKS} of {total} packs." if total > MAX_PACKS else ""
    rows = [
        [f"{rank_number}", f"{len(rank)}", f"{sum(map(len, rank))}", f"{sum(map(sum, rank)):,.0f}"]
        for rank_number, rank in enumerate(ranks)
    ]
    step = number(run.packs.get("step"))
    return Chart(
        "step",
        f"{prefix}{'p' if prefix else 'P'}acks of step {step:.0f}",
        "tokens",
        "A row is a pack (a micro-batch), a block is a sample; the line is the capacity of a pack."
        f" White is what padding fills.{more}",
        drawing.packs(shown, capacity=capacity, name=f"packs-{run.name}"),
        [],
        ["data rank", "packs", "samples", "tokens"],
        rows,
    )


def _experts(run: RunFiles) -> Chart | None:
    """The load of each expert in the last step that tells it."""
    if not run.experts:
        return None
    step = max(run.experts)
    load = run.experts[step]
    edges = [index - 0.5 for index in range(len(load) + 1)]
    return Chart(
        "load",
        f"Load of experts at step {step:,}",
        "tokens, over all layers",
        "How many tokens each expert got. An expert that gets next to none learns nothing.",
        drawing.bars([(edges, load)], name=f"load-{run.name}", x="expert"),
        [],
        ["expert", "tokens"],
        [[f"{index}", f"{tokens:,.0f}"] for index, tokens in enumerate(load)],
    )


def _numbers(values: object) -> list[float]:
    """Finite numbers of a list; of anything else, none."""
    found: Iterable[object] = values if isinstance(values, list) else ()
    return [each for each in map(number, found) if math.isfinite(each)]
