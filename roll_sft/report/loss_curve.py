"""`loss.png`: the losses of a run over its steps, drawn from `steps.jsonl` and `eval.jsonl`."""

import logging
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.errors import first_line
from roll_sft.base.text import printable
from roll_sft.report.run_files import records
from roll_sft.report.tail import number

LOG = logging.getLogger(__name__)
CURVE = "loss.png"
MAX_POINTS = 1000  # of the train loss; in longer runs a point is the mean of several steps
SMOOTHED_FROM = 50  # points; a shorter curve has no moving average


def draw_losses(folder: Path) -> None:
    """Draw the train loss and each validation loss of the run in `folder`; logs a failure."""
    lines = records(folder / "steps.jsonl")
    train = [(number(each.get("step")), number(each.get("train_loss"))) for each in lines]
    points = np.array([point for point in train if np.isfinite(point).all()], dtype=float)
    if not len(points):
        return
    try:
        # Takes a second to import.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5))
        figure.subplots_adjust(left=0.09, right=0.985, bottom=0.115, top=0.975)
        _plot(figure.add_subplot(), _thinned(points), _evaluations(folder))
        staging = folder / f".{CURVE}.tmp"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # characters that the font does not have
            figure.savefig(staging, dpi=120, format="png")
        staging.replace(folder / CURVE)
    except (ImportError, OSError) as error:
        LOG.warning("cannot draw %s: %s", folder / CURVE, first_line(error))


def _plot(axes: Any, train: NDArray[np.float64], evaluations: dict[str, list[Any]]) -> None:
    steps, losses = train.T
    is_long = len(train) >= SMOOTHED_FROM
    axes.plot(steps, losses, linewidth=1, alpha=0.35 if is_long else 1, color="C0", label="train")
    if is_long:
        width = len(train) // 20
        kernel = np.full(width, 1 / width)
        middle = steps[(width - 1) // 2 :][: len(train) - width + 1]
        mean = np.convolve(losses, kernel, mode="valid")
        axes.plot(middle, mean, linewidth=1.8, color="C0", label="train, moving average")
    for index, (name, points) in enumerate(evaluations.items(), start=1):
        label = f"eval/{printable(name)}"[:60]
        axes.plot(*zip(*points, strict=True), marker="o", color=f"C{index % 10}", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)  # "$" in a name does not begin a formula


def _thinned(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """`points`, float64 [n, 2], as at most MAX_POINTS means of neighbouring points."""
    size = -(-len(points) // MAX_POINTS)
    whole = points[: len(points) // size * size]
    means: NDArray[np.float64] = whole.reshape(-1, size, 2).mean(axis=1)
    return means


def _evaluations(folder: Path) -> dict[str, list[Any]]:
    """Validation set -> list of (step, loss)."""
    found = defaultdict(list)
    for each in records(folder / "eval.jsonl"):
        point = number(each.get("step")), number(each.get("loss"))
        if np.isfinite(point).all():
            found[str(each.get("name"))].append(point)
    return found
