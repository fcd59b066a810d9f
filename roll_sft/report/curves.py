"""Curves made small enough to draw: means of neighbouring points, with the range that they hide."""

from dataclasses import dataclass

import numpy as np

from roll_sft.report.run_files import Array

MAX_POINTS = 400  # of a curve: more than a chart has columns on most screens
SMOOTHED_FROM = 50  # points; a shorter curve has no moving average


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart, float64 [n]; `low` and `high` bound the points that `y` is the mean of.

    `color` counts the colours of the page, from 0.
    """

    label: str
    x: Array
    y: Array
    color: int
    low: Array | None = None
    high: Array | None = None
    is_faint: bool = False
    is_marked: bool = False  # a marker on each point
    dash: int = 0  # of the styles of lines, 0 for a solid one


def thinned(x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """At most MAX_POINTS points: middles of `x`, means of `y`, least and greatest of `y`.

    Points whose `y` is not finite are left out.
    """
    is_known = np.isfinite(y)
    x, y = x[is_known], y[is_known]
    size = max(1, -(-len(x) // MAX_POINTS))
    starts = np.arange(0, len(x), size)
    if not len(starts):
        return x, y, y, y
    counts = np.diff([*starts, len(x)])
    mean_x, mean_y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def curve(label: str, x: Array, y: Array, *, color: int, dash: int = 0) -> Curve:
    """The curve of `y` over `x`, with its range where points were put together."""
    mean_x, mean_y, low, high = thinned(x, y)
    is_whole = len(mean_x) == np.isfinite(y).sum()
    return Curve(
        label,
        mean_x,
        mean_y,
        color,
        None if is_whole else low,
        None if is_whole else high,
        dash=dash,
    )


def smoothed(label: str, x: Array, y: Array, *, color: int) -> list[Curve]:
    """The curve, faint, and its moving average over a twentieth of it; short ones as they are."""
    plain = curve(label, x, y, color=color)
    is_known = np.isfinite(y)
    x, y = x[is_known], y[is_known]
    if len(x) < SMOOTHED_FROM:
        return [plain]
    width = len(x) // 20
    sums = np.cumsum([0.0, *y])
    mean = (sums[width:] - sums[:-width]) / width
    middle = x[(width - 1) // 2 :][: len(mean)]
    line_x, line_y, _, _ = thinned(middle, mean)
    faint = Curve("", plain.x, plain.y, color, plain.low, plain.high, is_faint=True)
    return [faint, Curve(label, line_x, line_y, color)]
