"""Reads the parts of a `ModelShape` that JSON holds as objects."""

from collections.abc import Mapping
from typing import Any

from roll_sft.models.moe.experts import ExpertShape
from roll_sft.models.variation import Variation


def parts_of(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The variation and the experts of `shape`, the fields of a `ModelShape`."""
    variation, experts = shape["variation"], shape["experts"]
    return {
        "variation": None if variation is None else Variation.of(variation),
        "experts": None if experts is None else ExpertShape(**experts),
    }
