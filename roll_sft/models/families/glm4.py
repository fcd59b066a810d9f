"""GLM-4 (0414) dense text models, tied and untied.

Norms stand before and behind attention and MLP; a part of each head is rotated, neighbouring
columns together; gate and up are one tensor; query, key and value may have biases.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from roll_sft.models.family import (
    Family,
    attention,
    decoder_weights,
    pre_attention_norm,
    pre_mlp_norm,
)
from roll_sft.models.fused_rows import fused_mlp
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import LayerAttention, Variation
from roll_sft.models.weight_map import SingleTensor, WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ARCHITECTURE = "Glm4ForCausalLM"


def glm4_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a GLM-4 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Glm4Config  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config
    from roll_sft.models.rotary import partial_problems, rotary_problems, rotary_table

    config = own_config(config, Glm4Config, architecture=_ARCHITECTURE)
    problems = rotary_problems(dict(config.rope_parameters or {}), partial=True)
    problems += partial_problems(config, config.head_dim)
    shape = decoder_shape(
        config, architecture=_ARCHITECTURE, problems=problems, own=("rope_parameters",)
    )
    frequencies, scaling = rotary_table(config)
    layer = LayerAttention(0, len(frequencies), rotary_scaling=scaling)
    return replace(
        shape,
        qkv_bias=config.attention_bias,
        norm_placement="both",
        rotary_inv_freq=frequencies,
        variation=Variation((layer,) * shape.num_layers, is_interleaved=True),
    )


def glm4_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, attention, _post_norms, pre_mlp_norm, fused_mlp)
    return decoder_weights(shape, layer_parts=parts)


def _post_norms(shape: ModelShape, *, layer: int) -> WeightTable:
    """The norms behind attention and MLP, before the residual addition."""
    hf, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
    sizes = (shape.hidden_size,)
    return {
        f"{ours}.self_attention.post_layernorm.weight": SingleTensor(
            f"{hf}.post_self_attn_layernorm.weight", sizes
        ),
        f"{ours}.mlp.post_layernorm.weight": SingleTensor(f"{hf}.post_mlp_layernorm.weight", sizes),
    }


GLM4 = Family(architecture=_ARCHITECTURE, shape=glm4_shape, weights=glm4_weights)
