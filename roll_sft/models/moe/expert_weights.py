"""The weights of routers and experts, as parts of a layer and as mappings.

Experts are whole on every rank that holds them: a rank holds some of the experts, and no tensor
rank a part of one. In HuggingFace files each expert has tensors of its own.

Shape letters as in `models/weight_map.py`, and E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from roll_sft.models.files.safetensors_in import Shape, TensorSource
from roll_sft.models.moe.experts import ExpertShape
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import GatedMLP, SingleTensor, WeightTable


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family calls its modules, inside `model.layers.N`."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class StackedRows:
    """Tensors of equal columns, one below the other, whole on every rank."""

    parts: Mapping[str, Shape]

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """The parts, in their order."""
        return dict(self.parts)

    def local(self, source: TensorSource, *, tensor_rank: int, tensor_size: int) -> torch.Tensor:
        """All rows, whatever the tensor rank."""
        return torch.cat([source.read(name) for name in self.parts])

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows of each part."""
        rows = [shape[0] for shape in self.parts.values()]
        return dict(zip(self.parts, torch.split(full, rows), strict=True))


def experts_of(shape: ModelShape) -> ExpertShape:
    """The experts of a `shape` that has some."""
    assert shape.experts is not None, f"{shape.architecture} has no experts"
    return shape.experts


def router_and_experts(
    shape: ModelShape, *, layer: int, names: ExpertNames | None = None
) -> WeightTable:
    """The router, then every expert: gate and up projection [2F, D], down projection [D, F]."""
    names, experts = names or ExpertNames(), experts_of(shape)
    hf, ours = f"model.layers.{layer}.{names.module}", f"decoder.layers.{layer}.mlp"
    router = SingleTensor(f"{hf}.gate.weight", (experts.num_experts, shape.hidden_size))
    table: WeightTable = {f"{ours}.router.weight": router}
    if experts.has_sigmoid:
        table[f"{ours}.router.score_bias"] = SingleTensor(
            f"{hf}.gate.e_score_correction_bias", (experts.num_experts,), is_fp32=True
        )
    inner = (experts.ffn_hidden_size, shape.hidden_size)
    for index in range(experts.num_experts):
        theirs, mine = f"{hf}.experts.{index}", f"{ours}.experts.local_experts.{index}"
        table[f"{mine}.linear_fc1.weight"] = StackedRows(
            {f"{theirs}.{each}.weight": inner for each in (names.gate, names.up)}
        )
        table[f"{mine}.linear_fc2.weight"] = SingleTensor(
            f"{theirs}.{names.down}.weight", inner[::-1]
        )
    return table


def shared_expert(shape: ModelShape, *, layer: int, module: str = "shared_expert") -> WeightTable:
    """The MLP `module` that every token goes through, and its gate [1, D] if it has one."""
    experts, hf = experts_of(shape), f"model.layers.{layer}.mlp"
    ours = f"decoder.layers.{layer}.mlp.shared_experts"
    width, name = experts.shared_ffn_hidden_size, f"{hf}.{module}"
    table: WeightTable = {
        f"{ours}.linear_fc1.weight": GatedMLP(
            gate=f"{name}.gate_proj.weight",
            up=f"{name}.up_proj.weight",
            ffn_hidden_size=width,
            hidden_size=shape.hidden_size,
        ),
        f"{ours}.linear_fc2.weight": SingleTensor(
            f"{name}.down_proj.weight", (shape.hidden_size, width), split_dim=1
        ),
    }
    if experts.has_shared_gate:
        table[f"{ours}.gate_weight"] = SingleTensor(f"{name}_gate.weight", (1, shape.hidden_size))
    return table
