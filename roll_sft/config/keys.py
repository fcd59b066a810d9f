"""How the schema declares a key: a dataclass field with a default, one sentence, a unit, bounds."""

from dataclasses import field
from typing import TypeVar

T = TypeVar("T")


def key(
    default: T,
    sentence: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> T:
    """A dataclass field with a default, one sentence, a unit and bounds; `above` is exclusive."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    about = {"sentence": sentence, "unit": unit, **bounds}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=about)  # type: ignore[return-value]
    return field(default=default, metadata=about)
