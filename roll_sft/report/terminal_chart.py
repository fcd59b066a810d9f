"""A curve in the terminal: braille characters, each two dots wide and four high."""

import numpy as np

from roll_sft.report.run_files import Array

# Bit of the dot in column 0 or 1 of a character, from its top row to its bottom one.
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_FIRST = 0x2800  # the character without a dot


def braille(x: Array, y: Array, *, width: int, height: int) -> list[str]:
    """`height` lines of `width` characters with the curve of `y` over `x`, both float64 [n].

    Columns with several points have dots from the least to the greatest. Points that are not finite
    are left out.
    """
    is_known = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_known], y[is_known]
    cells = np.zeros((height, width), dtype=np.int64)
    if len(x):
        columns = _places(x, 2 * width)
        rows = 4 * height - 1 - _places(y, 4 * height)
        for column in np.unique(columns):
            own = rows[columns == column]
            for row in range(int(own.min()), int(own.max()) + 1):
                cells[row // 4, column // 2] |= _BITS[column % 2][row % 4]
    return ["".join(chr(_FIRST + cell) for cell in line) for line in cells.tolist()]


def chart(name: str, x: Array, y: Array, *, width: int, height: int) -> list[str]:
    """The curve with its name, last value and least and greatest values beside it."""
    finite = y[np.isfinite(y)]
    if not len(finite):
        return []
    labels = [f"{finite.max():.4g}", *[""] * (height - 2), f"{finite.min():.4g}"]
    room = max(map(len, labels))
    lines = braille(x, y, width=max(4, width - room - 1), height=height)
    body = [f"{label:>{room}} {line}" for label, line in zip(labels, lines, strict=True)]
    return [f"{name}  {finite[-1]:.4g}"[:width], *body]


def _places(values: Array, count: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """The place of each value among `count` between the least and the greatest, int64 [n]."""
    low, high = values.min(), values.max()
    share = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    return np.minimum((share * count).astype(np.int64), count - 1)
