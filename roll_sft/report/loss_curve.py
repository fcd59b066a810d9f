"""`loss.png`: the losses of a run over its steps, drawn from `steps.jsonl` and `eval.jsonl`."""

import logging
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.errors import first_line
from roll_sft.base.text import printable
from roll_sft.report.run_files import Array, RunFiles, evaluations

LOG = logging.getLogger(__name__)
CURVE = "loss.png"
MAX_POINTS = 1000  # of the train loss; in longer runs a point is the mean of several steps
SMOOTHED_FROM = 50  # points; a shorter curve has no moving average


def draw_losses(run: RunFiles) -> None:
    """Draw the train loss and each validation loss of `run` into its folder; logs a failure."""
    points = np.stack([run.step, run.column("train_loss")], axis=1)
    points, folder = points[np.isfinite(points).all(axis=1)], run.folder
    if not len(points):
        return
    try:
        # Takes a second to import.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5))
        figure.subplots_adjust(left=0.09, right=0.985, bottom=0.115, top=0.975)
        _plot(figure.add_subplot(), _thinned(points), evaluations(run))
        staging = folder / f".{CURVE}.tmp"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # characters that the font does not have
            figure.savefig(staging, dpi=120, format="png")
        staging.replace(folder / CURVE)
    except (ImportError, OSError) as error:
        LOG.warning("cannot draw %s: %s", folder / CURVE, first_line(error))


def _plot(axes: Any, train: NDArray[np.float64], losses_of: dict[str, tuple[Array, Array]]) -> None:
    steps, losses = train.T
    is_long = len(train) >= SMOOTHED_FROM
    axes.plot(steps, losses, linewidth=1, alpha=0.35 if is_long else 1, color="C0", label="train")
    if is_long:
        width = len(train) // 20
        kernel = np.full(width, 1 / width)
        middle = steps[(width - 1) // 2 :][: len(train) - width + 1]
        mean = np.convolve(losses, kernel, mode="valid")
        axes.plot(middle, mean, linewidth=1.8, color="C0", label="train, moving average")
    for index, (name, (at, values)) in enumerate(losses_of.items(), start=1):
        label = f"eval/{printable(name)}"[:60]
        axes.plot(at, values, marker="o", color=f"C{index % 10}", label=label)
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
