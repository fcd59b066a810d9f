"""Megatron's linear layers, frozen, each with the adapter that `lora.py` puts beside it.

Legend: N tokens, I inputs and O outputs of a layer on this tensor rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from roll_sft.engine.layers import LayerConfig

ROW_PARALLEL = ("linear_proj", "linear_fc2")
_LINEAR_LAYERS = (
    ("self_attention", "qkv"),
    ("self_attention", "proj"),
    ("mlp", "fc1"),
    ("mlp", "fc2"),
    ("mlp.shared_experts", "fc1"),
    ("mlp.shared_experts", "fc2"),
)


def linear_layers(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Each linear layer of the layers: its weight's name, its owner, its name there.

    Those of routed experts are left out.
    """
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        modules = dict(layer.named_modules())
        for owner, name in _LINEAR_LAYERS:
            leaf = f"linear_{name}"
            if hasattr(modules.get(owner), leaf):  # a layer with experts has no MLP
                weight = f"decoder.layers.{layer.layer_number - 1}.{owner}.{leaf}.weight"
                yield weight, modules[owner], leaf


@dataclass(frozen=True, slots=True)
class FrozenDense:
    """A layer whose weight [O, I] is held in its own dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, I] -> [N, O], in memory of its own."""
        return F.linear(rows, self.weight, self.bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """[N, O] -> [N, I], in memory of its own."""
        return gradient @ self.weight


class AdaptedLinear(torch.nn.Module):
    """A linear layer of Megatron's, frozen, and its adapter. Its parameters keep their names."""

    def __init__(self, base: Any, adapter: torch.nn.Module | None, *, config: LayerConfig) -> None:
        """`adapter` is None where the base is quantised and not adapted."""
        super().__init__()
        assert base.bias is None or not base.skip_bias_add, "a bias is added here"
        self.weight, self.bias, self.adapter = base.weight, base.bias, adapter
        self._layer = base.frozen if config.quantizes_base else FrozenDense(self.weight, self.bias)
        self._is_sharded = config.sequence_parallel

    def _product(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, 1, I] -> [n, 1, O]."""
        rows = inputs.flatten(0, 1)
        if self.adapter is None:
            product = self._layer.product(rows)
        else:
            product = self.adapter(self._layer, rows)
        return product.view(*inputs.shape[:2], -1)


class AdaptedColumns(AdaptedLinear):
    """Cut along its outputs, as queries, keys and values are, and gate and up."""

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[N or N / TP, 1, I] -> [N, 1, O], and no bias that is left to add."""
        if self._is_sharded:
            inputs = gather_from_sequence_parallel_region(inputs, tensor_parallel_output_grad=True)
        elif parallel_state.get_tensor_model_parallel_world_size() > 1:
            inputs = copy_to_tensor_model_parallel_region(inputs)
        return self._product(inputs), None


class AdaptedRows(AdaptedLinear):
    """Cut along its inputs, as the output projections of attention and MLP are."""

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[N, 1, I] -> [N or N / TP, 1, O], and no bias that is left to add."""
        product = self._product(inputs)
        if self._is_sharded:
            product = reduce_scatter_to_sequence_parallel_region(product)
        elif parallel_state.get_tensor_model_parallel_world_size() > 1:
            product = reduce_from_tensor_model_parallel_region(product)
        return product, None
