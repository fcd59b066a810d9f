"""The line that a benchmark prints for each measure."""

import json
import statistics
from collections.abc import Sequence
from importlib.metadata import version


def show(
    name: str, ratios: Sequence[float], *, goal: str, denominator: str, packages: Sequence[str]
) -> None:
    """Print the median of `ratios` beside `goal`, which is such as "<= 2" or ">= 0.7"."""
    ratio, (sign, bound) = statistics.median(ratios), goal.split()
    line = {
        "name": name,
        "ratio": round(ratio, 5),
        "low": round(min(ratios), 5),
        "high": round(max(ratios), 5),
        "pairs": len(ratios),
        "goal": goal,
        "holds": ratio <= float(bound) if sign == "<=" else ratio >= float(bound),
        "denominator": denominator,
        "device": "cpu",
        "versions": {package: version(package) for package in packages},
    }
    print(json.dumps(line), flush=True)
