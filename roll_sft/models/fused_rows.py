"""Weights that Hugging Face fuses as well: their rows one projection after the other."""

from dataclasses import dataclass

import torch

from roll_sft.models.family import attention, mlp
from roll_sft.models.files.safetensors_in import Shape, TensorSource
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import QKV, GatedMLP, WeightTable


@dataclass(frozen=True, slots=True)
class FusedRows:
    """One tensor that holds the rows of each tensor of `parts`, in their order."""

    name: str
    parts: QKV | GatedMLP

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """The one tensor."""
        shapes = list(self.parts.hf_shapes.values())
        return {self.name: (sum(shape[0] for shape in shapes), *shapes[0][1:])}

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """As `parts` cut it."""
        parts = _Parts(source, self)
        return self.parts.local(parts, tensor_rank=tensor_rank, tensor_size=tensor_size)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts, joined."""
        return {self.name: torch.cat(list(self.parts.to_hf(full).values()))}


class _Parts:
    """The tensors that a fused one would be, as a source."""

    def __init__(self, source: TensorSource, fused: FusedRows) -> None:
        self._source, self._fused = source, fused

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> frozenset[str]:
        return frozenset(self._fused.parts.hf_shapes)

    def shape(self, name: str) -> Shape:
        return self._fused.parts.hf_shapes[name]

    def read(self, name: str) -> torch.Tensor:
        return self.read_slice(name, start=0, stop=self.shape(name)[0], dim=0)

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        assert dim == 0, f"{name} is cut along its rows"
        first = 0
        for part, shape in self._fused.parts.hf_shapes.items():
            if part == name:
                break
            first += shape[0]
        fused = self._fused.name
        return self._source.read_slice(fused, start=first + start, stop=first + stop, dim=0)


def fused_attention(shape: ModelShape, *, layer: int) -> WeightTable:
    """The projections of attention, with query, key and value in one tensor, without biases."""
    hf, ours = f"model.layers.{layer}.self_attn", f"decoder.layers.{layer}.self_attention"
    table = attention(shape, layer=layer)
    parts = table[f"{ours}.linear_qkv.weight"]
    assert isinstance(parts, QKV), "query, key and value are one parameter"
    return table | {f"{ours}.linear_qkv.weight": FusedRows(f"{hf}.qkv_proj.weight", parts)}


def fused_mlp(shape: ModelShape, *, layer: int) -> WeightTable:
    """The gated MLP, with gate and up in one tensor."""
    hf, ours = f"model.layers.{layer}.mlp", f"decoder.layers.{layer}.mlp"
    table = mlp(shape, layer=layer)
    parts = table[f"{ours}.linear_fc1.weight"]
    assert isinstance(parts, GatedMLP), "gate and up are one parameter"
    return table | {f"{ours}.linear_fc1.weight": FusedRows(f"{hf}.gate_up_proj.weight", parts)}
