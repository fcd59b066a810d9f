"""What became of the rows of a source: an entry of `data_report.json`.

A module of its own without heavy imports: training shows reports that preparing has written.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceReport:
    """Counts of the rows, samples and tokens of one source.

    `rows`: rows read; `kept` and the values of `dropped` add up to it.
    `dropped_places`: the first places ("file:line") for each reason in `dropped`.
    `samples`: a row can give several. `dropped_samples` counts samples left out of kept rows, by
    reason; `truncated` counts samples that were cut to `data.sequence_length`.
    `supervised_share`: supervised tokens / tokens.
    `length`: tokens per sample as min, p50, p90, p99 and max; empty in an estimate.
    `columns_left_aside`: columns, and keys of messages, that samples are not made of.
    `cached`: every shard was already in the token cache.
    """

    name: str
    path: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    dropped_places: Mapping[str, list[str]]
    truncated: int
    samples: int
    dropped_samples: Mapping[str, int]
    tokens: int
    supervised_tokens: int
    supervised_share: float
    length: Mapping[str, int]
    columns_left_aside: list[str]
    cached: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the report as an entry of `data_report.json`."""
        return asdict(self)
