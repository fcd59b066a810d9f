"""Charts as SVG inside a page, drawn by matplotlib; the page's style sheet colours them.

matplotlib writes colours as numbers. Here each is a stand-in that becomes a variable of the style
sheet, so that one picture suits light and dark. Promises: no text of a file reaches the SVG; ids
of one SVG are not those of another; a chart has a title and a description.
"""

import functools
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from roll_sft.report.curves import Curve

NUM_COLORS = 8
WIDTH, HEIGHT = 4.4, 2.3  # inches of 72 units
LABEL_TOP = 0.17  # inches
# Stand-in -> variable of the style sheet.
_COLORS = {f"#0102{number:02x}": f"var(--c{number})" for number in range(NUM_COLORS)}
_LINE, _INK, _BAD = "#030100", "#030101", "#030102"
_VARIABLES = {**_COLORS, _LINE: "var(--line)", _INK: "var(--soft)", _BAD: "var(--bad)"}
_DASHES = ("solid", "dashed", "dotted", "dashdot")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.xmargin": 0.01,
    "axes.ymargin": 0.06,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.major.size": 0,  # else room is left for the marks
    "ytick.major.size": 0,
    "path.simplify": True,
    "text.parse_math": False,
}


def lines(
    curves: Sequence[Curve],
    *,
    name: str,
    bad: Sequence[float] = (),
    restarts: Sequence[float] = (),
    span: Sequence[float] = (),
    is_log: bool = False,
) -> str:
    """The SVG of `curves` over steps, with the steps `bad` and `restarts` marked.

    The steps in `span` are on the axis, too, so that charts above each other have one axis.
    """

    def plot(axes: Any) -> None:
        if len(span):
            axes.update_datalim([(step, 0) for step in span], updatey=False)
        if not any(each.y.any() for each in curves):  # else the axis would have negative numbers
            axes.set_ylim(-0.06, 1.06)
        for each in curves:
            _line(axes, each)
        for step in restarts:
            axes.axvline(step - 0.5, color=_INK, linewidth=0.9, linestyle=(0, (3, 3)))
        for step in bad:
            axes.axvline(step, color=_BAD, linewidth=1.4)
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_tick)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step", labelpad=1)

    return _svg(plot, name=name, height=HEIGHT)


def bars(values: Sequence[tuple[Sequence[float], Sequence[float]]], *, name: str, x: str) -> str:
    """The SVG of histograms over `x`: each its edges [n + 1] and counts [n]."""

    def plot(axes: Any) -> None:
        for color, (edges, counts) in enumerate(values):
            # The first one filled, the others as outlines above it.
            style = {"alpha": 0.45} if color == 0 else {"linewidth": 1.6}
            axes.stairs(counts, edges, fill=color == 0, color=_color(color), **style)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(x, labelpad=1)

    return _svg(plot, name=name, height=HEIGHT)


def packs(ranks: Sequence[Sequence[Sequence[float]]], *, capacity: float, name: str) -> str:
    """The SVG of one step's packs: a row for each pack, a block for each sample, by data rank."""
    num_rows = sum(map(len, ranks)) + len(ranks) - 1

    def plot(axes: Any) -> None:
        row, places = 0.0, []
        for color, rank in enumerate(ranks):
            places.append(row + (len(rank) - 1) / 2)
            for pack in rank:
                starts = np.concatenate([[0.0], np.cumsum(pack)])[:-1]
                for parity, alpha in ((0, 0.9), (1, 0.55)):
                    blocks = [*zip(starts[parity::2], pack[parity::2], strict=True)]
                    axes.broken_barh(
                        blocks,
                        (row - 0.4, 0.8),
                        facecolor=_color(color % 2),
                        alpha=alpha,
                        linewidth=0,
                    )
                row += 1
            row += 0.6
        axes.axvline(capacity, color=_BAD, linewidth=1)
        axes.set_xlim(0, capacity * 1.01)
        axes.set_ylim(row - 0.9, -0.7)
        axes.set_yticks(places, [f"rank {number}" for number in range(len(ranks))])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("tokens", labelpad=1)

    return _svg(plot, name=name, height=min(9.0, max(1.2, 0.5 + 0.14 * num_rows)))


def _line(axes: Any, each: Curve) -> None:
    color, is_dot = _color(each.color), each.is_marked or len(each.x) < 2
    if each.low is not None and each.high is not None:
        alpha = 0.22 if each.is_faint else 0.28
        axes.fill_between(each.x, each.low, each.high, color=color, alpha=alpha, linewidth=0)
    axes.plot(
        each.x,
        each.y,
        color=color,
        alpha=0.35 if each.is_faint else 1,
        linewidth=0.8 if each.is_faint else 1.5,
        linestyle=_DASHES[each.dash % len(_DASHES)],
        marker="o" if is_dot else None,
        markersize=3.2,
    )


def _color(number: int) -> str:
    return [*_COLORS][number % NUM_COLORS]


def _tick(value: float, _place: object = None) -> str:
    return f"{value:,.0f}" if 1_000 <= abs(value) < 1e7 else f"{value:.4g}"


def _svg(plot: Callable[[Any], None], *, name: str, height: float) -> str:
    """What `plot` draws, without ids but those that the SVG itself refers to."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        axes = _cleared(height)
        plot(axes)
        buffer = io.StringIO()
        canvas: Any = axes.figure.canvas
        canvas.print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    # The page's own font. matplotlib writes one property, newer versions size and family apart.
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*; ", "", text)
    referred = set(re.findall(r'(?:url\(|href=")#(\w+)', text))
    text = re.sub(r' id="([^"]*)"', lambda got: got[0] if got[1] in referred else "", text)
    text = re.sub(r"#0[123]0[12]\w\w", lambda found: _VARIABLES.get(found[0], found[0]), text)
    text = re.sub(r"\n\s*", "\n", text)
    return re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1">', text, count=1)


def _cleared(height: float) -> Any:
    """The one axes of all charts, empty: making its parts takes longer than to draw a chart."""
    axes, bottom = _axes(), 0.36 / height
    for artist in [*axes.lines, *axes.collections, *axes.patches]:
        artist.remove()
    axes.set_prop_cycle(None)
    axes.set_yscale("linear")
    axes.set_ylim(0, 1)  # upwards: the axis of packs is inverted
    axes.relim()
    axes.autoscale(enable=True)
    axes.figure.set_size_inches(WIDTH, height)
    axes.set_position((0.125, bottom, 0.835, 1 - bottom - 0.08 / height))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_tick)
    return axes


@functools.cache
def _axes() -> Any:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.125, 0.2, 0.8, 0.7))
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    # A fixed place, in inches, saves a second layout of all tick labels.
    place = blended_transform_factory(axes.transAxes, figure.dpi_scale_trans)
    axes.xaxis.set_label_coords(0.5, LABEL_TOP, place)
    axes.yaxis.set_label_coords(0, 0.5)
    return axes


def titled(svg: str, *, name: str, title: str, text: str) -> str:
    """`svg` as an image with an accessible name and description; ids begin with `name`."""
    svg = re.sub(r'(url\(#|href="#| id=")(?=\w)', rf"\g<1>{name}-", svg)
    labels = f'role="img" aria-labelledby="{name}-t {name}-d"'
    told = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(text)}</desc>'
    return svg.replace("<svg ", f"<svg {labels} ", 1).replace(">", f">{told}", 1)
