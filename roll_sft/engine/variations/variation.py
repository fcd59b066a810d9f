"""How a model with a `Variation` is built; legend as in `engine/attention.py`."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from roll_sft.engine.attention import PackedAttention
from roll_sft.engine.attention_kernels import Kernel
from roll_sft.engine.layers import LayerConfig
from roll_sft.engine.micro_batch import Segments
from roll_sft.engine.variations.varied_kernels import style_of, styled
from roll_sft.models.variation import Variation


class VariedAttention(PackedAttention):
    """`PackedAttention` with the rotation, window, scale, soft-cap and sinks of its layer."""

    def __init__(
        self, config: LayerConfig, *, kernel: Kernel, layer_number: int, **rest: Any
    ) -> None:
        """`layer_number` counts from 1 over the whole model."""
        variation: Variation = config.variation
        self._layer = variation.layers[layer_number - 1]
        super().__init__(config, kernel=styled(kernel, variation, self._layer), **rest)
        self.style = style_of(variation, self._layer)
        if variation.has_sinks:
            num_heads = config.num_attention_heads // config.tensor_model_parallel_size
            # Megatron's name, which its checkpoints have.
            self.softmax_offset = torch.nn.Parameter(
                torch.zeros(num_heads, dtype=config.params_dtype)
            )
            set_tensor_model_parallel_attributes(
                self.softmax_offset, is_parallel=True, dim=0, stride=1
            )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """With the sinks of this rank's heads, if the model has them."""
        if not self.config.variation.has_sinks:
            return super().attend(query, key, value, segments)
        kernel: Any = self.kernel  # of `varied_kernels`
        output: torch.Tensor = kernel(query, key, value, segments, sinks=self.softmax_offset)
        return output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron's checkpoint entry: sinks are cut along the heads."""
        state, axes = self.state_dict(prefix="", keep_vars=True), {"softmax_offset": 0}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)

    def rotated(
        self, query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By this layer's columns of `angles` float32 [T, 1, 2 F], of F frequencies in all.

        Interleaved columns leave in another order, the same for queries and keys, of which the
        scores are sums.
        """
        width = 2 * (self._layer.stop - self._layer.start)
        if width == 0:
            return query, key
        angles = self._columns(angles)
        parts = [(states[..., :width], states[..., width:]) for states in (query, key)]
        if self.config.variation.is_interleaved:
            parts = [
                (torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1), rest)
                for turned, rest in parts
            ]
        turned = super().rotated(parts[0][0], parts[1][0], angles)
        if width == query.shape[-1]:
            return turned
        joined = [
            torch.cat([ours, rest], dim=-1) for ours, (_, rest) in zip(turned, parts, strict=True)
        ]
        return joined[0], joined[1]

    def _columns(self, angles: torch.Tensor) -> torch.Tensor:
        layer, all_cos_sin = self._layer, angles.chunk(2, dim=-1)
        if layer.stop - layer.start < all_cos_sin[0].shape[-1]:
            angles = torch.cat([each[..., layer.start : layer.stop] for each in all_cos_sin], -1)
        return angles if layer.rotary_scaling == 1.0 else angles * layer.rotary_scaling


def use_settings(config: LayerConfig) -> None:
    """Make `config` ask for the activation of the model's MLP, and a bias behind attention."""
    config.add_bias_linear = config.variation.has_output_bias
    if config.variation.activation == "gelu_tanh":
        config.activation_func = gelu_tanh


def gelu_tanh(gates: torch.Tensor) -> torch.Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(gates, approximate="tanh")


def use_multipliers(model: GPTModel, variation: Variation) -> None:
    """Multiply what enters the first layer, and what attention and MLP add, in `model`."""
    if variation.embedding_multiplier != 1.0 and model.pre_process:
        factor, module = variation.embedding_multiplier, model.embedding
        if variation.rounds_embedding_multiplier:
            module = model.embedding.word_embeddings
            factor = float(torch.tensor(factor, dtype=model.config.params_dtype))
        module.register_forward_hook(_multiplied(factor))
    if variation.residual_multiplier != 1.0:
        for layer in model.decoder.layers:
            for module in (layer.self_attention, layer.mlp):
                module.register_forward_hook(_multiplied(variation.residual_multiplier))


def _multiplied(factor: float) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # a layer's part gives its bias beside it: none
            return output[0] * factor, *output[1:]
        return output * factor

    return hook
