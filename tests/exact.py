"""What two runs of the same samples on the same layout have alike to the last bit."""

from collections.abc import Iterable, Mapping
from typing import Any

EXACT = (
    "step",
    "epoch",
    "train_loss",
    "grad_norm",
    "learning_rate",
    "supervised_tokens",
    "total_tokens",
    "sample_ids_sha256",
)


def exact(lines: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """The values of `EXACT` in each of `lines` of steps.jsonl."""
    return [[line[key] for key in EXACT] for line in lines]
