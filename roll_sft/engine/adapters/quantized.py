"""A base whose linear layers are held in NF4 (QLoRA), on a rank.

Megatron builds `QuantizedColumns` and `QuantizedRows` in place of its linear layers, so that their
weights are never allocated; `quantize` reads and quantises one at a time. Forward and backward
dequantise a weight where they need it, and keep nothing of it.

Legend: N tokens, I inputs and O outputs of a weight on this tensor rank.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec

from roll_sft.base.errors import ConfigError
from roll_sft.config.lora import LoraConfig
from roll_sft.engine.adapters.adapted_linear import linear_layers
from roll_sft.engine.build import not_finite, unusable
from roll_sft.engine.layers import LayerConfig
from roll_sft.models.adapters.adapter import AdaptedWeight
from roll_sft.models.adapters.nf4 import (
    QuantizedWeight,
    library_problem,
    quantized_part,
    quantized_weights,
)
from roll_sft.models.files.safetensors_in import TensorSource
from roll_sft.models.source import ModelSource


class QuantizedLinear(torch.nn.Module):
    """What Megatron asks of a linear layer, its weight quantised; see the two kinds."""

    cuts_inputs: ClassVar[bool]

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: LayerConfig,
        bias: bool,
        skip_bias_add: bool,
        **_: Any,
    ) -> None:
        super().__init__()
        tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        inputs, outputs = input_size, output_size
        if self.cuts_inputs:
            inputs //= tensor_size
        else:
            outputs //= tensor_size
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.skip_bias_add = skip_bias_add
        # The shape, dtype and device of the weight, in the memory of one number.
        self.weight = torch.empty((), dtype=dtype, device=device).expand(outputs, inputs)
        self.bias: torch.nn.Parameter | None = None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(outputs, dtype=dtype, device=device))
        self._quantized: QuantizedWeight | None = None

    def fill(self, weight: AdaptedWeight, source: TensorSource) -> None:
        """Quantise the part of `weight` in `source` that this rank holds.

        Raises `CheckpointError` that names a tensor which is not finite.
        """
        for name in weight.mapping.hf_shapes:
            if found := not_finite([(name, source.read(name))]):
                raise unusable(source, *found)
        self._quantized = quantized_part(
            weight,
            source,
            like=self.weight,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        )

    @property
    def frozen(self) -> "FrozenNF4":
        """The layer without what Megatron asks of it."""
        assert self._quantized is not None, "fill comes first"
        return FrozenNF4(self._quantized, self.bias)


class QuantizedColumns(QuantizedLinear):
    """Cut along its outputs."""

    cuts_inputs = False


class QuantizedRows(QuantizedLinear):
    """Cut along its inputs."""

    cuts_inputs = True


def use_quantized_linears(layer: ModuleSpec) -> None:
    """Have Megatron build quantised linear layers in each `layer`."""
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp
    # megatron-core 0.19 gives the MLP's own builder, older ones a ModuleSpec.
    has_builder = isinstance(mlp, functools.partial)
    mlp = mlp.keywords["submodules"] if has_builder else mlp.submodules
    attention.linear_qkv = mlp.linear_fc1 = QuantizedColumns
    attention.linear_proj = mlp.linear_fc2 = QuantizedRows


def quantize(chunks: Sequence[GPTModel], source: ModelSource, lora: LoraConfig) -> None:
    """Fill the quantised linear layers of `chunks`.

    Raises `ConfigError` without bitsandbytes, `CheckpointError` that names a tensor which is not
    finite.
    """
    if problem := library_problem():  # the driver's machine may have what this one lacks
        raise ConfigError(problem)
    weights, tensors = quantized_weights(source.family, source.shape, lora), source.tensors
    for name, owner, leaf in linear_layers(chunks):
        getattr(owner, leaf).fill(weights[name], tensors)


@dataclass(frozen=True, slots=True)
class FrozenNF4:
    """A layer whose weight [O, I] is dequantised where it is needed."""

    weight: QuantizedWeight
    bias: torch.Tensor | None

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, I] -> [N, O], in memory of its own."""
        outputs: torch.Tensor = _Product.apply(rows, self)
        return outputs

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """[N, O] -> [N, I], in memory of its own."""
        return gradient @ self.weight.dequantized()


class _Product(torch.autograd.Function):
    """The linear layer of a quantised weight, and the gradient of its inputs alone."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layer: FrozenNF4) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(rows, layer.weight.dequantized(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.input_gradient(gradient), None
