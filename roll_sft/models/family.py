"""What a model family is: how its configuration becomes a shape, and the table of its weights.

A family maps a Hugging Face configuration to a `ModelShape` and declares one mapping of
`models/weight_map.py` for each parameter of Megatron's `GPTModel` (local spec).

Invariant: each Hugging Face tensor of the family belongs to exactly one mapping of the table.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from roll_sft.base.errors import ConfigError
from roll_sft.models.safetensors_in import Shape, TensorSource
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import TiedHead, WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NAMES_SHOWN = 3
_ROWS_COMPARED_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. A new one is a file that holds these two functions.

    `shape` raises `ConfigError` for anything in the configuration that is not implemented.
    """

    architecture: str
    shape: Callable[["PreTrainedConfig"], ModelShape]
    weights: Callable[[ModelShape], WeightTable]

    def hf_shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Every Hugging Face tensor of the family, in the order an export writes them."""
        shapes: dict[str, Shape] = {}
        for mapping in self.weights(shape).values():
            assert shapes.keys().isdisjoint(mapping.hf_shapes), f"{mapping} has a tensor of another"
            shapes |= mapping.hf_shapes
        return shapes

    def hf_names(self, shape: ModelShape) -> frozenset[str]:
        """Names of every Hugging Face tensor of the family."""
        return frozenset(self.hf_shapes(shape))

    def check_source(self, shape: ModelShape, *, source: TensorSource) -> None:
        """Raise `ConfigError` for a source that is not exactly this model.

        Reads headers only, except where a tied model stores its head as well: then both are
        compared, because transformers unties two that differ, and we would train another model
        than it serves.
        """
        expected = self.hf_shapes(shape)
        heads = [
            mapping for mapping in self.weights(shape).values() if isinstance(mapping, TiedHead)
        ]
        # Old exports store rotary buffers; they are computed, never trained.
        found = {name for name in source.names() if not name.endswith("rotary_emb.inv_freq")}
        missing = [name for name in expected if name not in found]
        unexpected = sorted(found - expected.keys() - {head.name for head in heads})
        if missing or unexpected:
            raise ConfigError(
                f"model.path: {source} does not hold the {len(expected)} tensors that its "
                f"config.json describes for {self.architecture}: "
                f"{_count_and_first('missing', missing)}, "
                f"{_count_and_first('unexpected', unexpected)}; give a complete, unquantized "
                "checkpoint and the config.json that belongs to it"
            )
        for name, wanted in expected.items():
            if source.shape(name) != wanted:
                raise ConfigError(
                    f"model.path: {source}: {name} has shape {list(source.shape(name))} but "
                    f"config.json gives {list(wanted)}; use the config.json of this checkpoint"
                )
        for head in heads:
            if head.name in found and not _equal(source, head.name, head.embedding.name):
                raise ConfigError(
                    f"model.path: {source}: tie_word_embeddings is true but {head.name} and "
                    f"{head.embedding.name} differ; set tie_word_embeddings to false in config.json"
                )


def _count_and_first(label: str, names: Iterable[str]) -> str:
    """`2 missing (a, b)`, with at most the first few names."""
    names = list(names)
    if not names:
        return f"0 {label}"
    dots = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {label} ({', '.join(names[:_NAMES_SHOWN])}{dots})"


def _equal(source: TensorSource, first: str, second: str) -> bool:
    """Whether two tensors are equal, in blocks of rows: vocabulary matrices reach several GB."""
    if source.shape(first) != source.shape(second):
        return False
    num_rows = source.shape(first)[0]
    for block in range(math.ceil(num_rows / _ROWS_COMPARED_AT_ONCE)):
        start = block * _ROWS_COMPARED_AT_ONCE
        stop = min(start + _ROWS_COMPARED_AT_ONCE, num_rows)
        rows = [source.read_slice(n, start=start, stop=stop, dim=0) for n in (first, second)]
        if not torch.equal(*rows):
            return False
    return True
