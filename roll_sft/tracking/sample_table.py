"""Samples of `generations.jsonl` as the rows of a table, the same for every tracker."""

from collections.abc import Sequence
from typing import Any

COLUMNS = ("step", "index", "prompt", "output", "reference")


def table_of(samples: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of texts, the first of them the head. Each metric has a column of its own."""
    metrics = list(dict.fromkeys(name for each in samples for name in each.get("metrics") or {}))
    rows = [[*COLUMNS, *metrics]]
    for each in samples:
        scores = each.get("metrics") or {}
        rows.append(
            [_text(each.get(name)) for name in COLUMNS]
            + [_text(scores.get(name)) for name in metrics]
        )
    return rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
