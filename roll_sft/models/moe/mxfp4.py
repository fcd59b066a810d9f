"""Reads weights in MXFP4: blocks of 32 numbers of 4 bits with one power of two each.

Legend: E experts, O outputs, I inputs of a matrix of an expert.

A tensor NAME [E, I, O] is stored as NAME_blocks uint8 [E, O, I / 32, 16], two numbers a byte with
the first in the low bits, and NAME_scales uint8 [E, O, I / 32], exponents from -127 on. See the OCP
Microscaling Formats specification 1.0. Every number of it is a bf16 number, so reading loses none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from roll_sft.models.files.safetensors_in import SafetensorsSource, Shape, StoredSource

_BLOCKS, _SCALES = "_blocks", "_scales"
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the three low bits; the fourth is the sign
_PER_BLOCK = 32
_BIAS = 127


def is_mxfp4(quantization: Any) -> bool:
    """Whether a `quantization_config`, an object or a dictionary, is of MXFP4."""
    if isinstance(quantization, Mapping):
        return quantization.get("quant_method") == "mxfp4"
    return getattr(quantization, "quant_method", None) == "mxfp4"


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the same model with its weights in bf16; others as they are."""
    if not is_mxfp4(config.get("quantization_config")):
        return config
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**kept, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def unpacked(source: SafetensorsSource) -> StoredSource:
    """`source`, with the tensors that are stored in MXFP4 in bf16."""
    packed = frozenset(
        name.removesuffix(_BLOCKS) for name in source.names() if name.endswith(_BLOCKS)
    )
    return Mxfp4Source(source, packed) if packed else source


@dataclass(frozen=True, slots=True)
class Mxfp4Source:
    """`source`, of which the tensors `packed` are stored in MXFP4."""

    source: SafetensorsSource
    packed: frozenset[str]

    def __str__(self) -> str:
        return str(self.source)

    def names(self) -> frozenset[str]:
        """Every tensor there is, none of blocks or scales."""
        halves = {name + end for name in self.packed for end in (_BLOCKS, _SCALES)}
        return self.source.names() - halves | self.packed

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, without reading it."""
        if name not in self.packed:
            return self.source.shape(name)
        experts, outputs, blocks, size = self.source.read_bytes(name + _BLOCKS).shape
        return experts, blocks * size * 2, outputs

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is read in."""
        return torch.bfloat16 if name in self.packed else self.source.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        if name not in self.packed:
            return self.source.read(name)
        return self.read_slice(name, start=0, stop=self.shape(name)[0], dim=0)

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        """Entries `start` to `stop` along `dim`; of a packed tensor along its experts."""
        if name not in self.packed:
            return self.source.read_slice(name, start=start, stop=stop, dim=dim)
        assert dim == 0, f"{name} is cut along its experts"
        parts = (self.source.read_bytes(name + end) for end in (_BLOCKS, _SCALES))
        blocks, scales = (part[start:stop] for part in parts)
        # One expert at a time: what is indexed by needs four times the memory of the result.
        experts = [_numbers(*each).transpose(0, 1) for each in zip(blocks, scales, strict=True)]
        return torch.stack(experts)


def _numbers(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 [O, I] of `blocks` uint8 [O, I / 32, 16] and `scales` uint8 [O, I / 32]."""
    signed = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)], dtype=torch.bfloat16)
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    numbers = torch.ldexp(signed[pairs.int()], scales[..., None].int() - _BIAS)
    return numbers.flatten(1)
