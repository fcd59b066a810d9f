"""Qwen2, Qwen2.5 and Qwen3 dense models, tied and untied.

Qwen2 adds biases to query, key and value; Qwen3 has none, and a norm over each query and key head.
Refused by name, beside what no family builds: sliding windows, and biases in Qwen3's attention.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from roll_sft.models.family import (
    Family,
    attention,
    decoder_weights,
    head_norms,
    mlp,
    pre_attention_norm,
    pre_mlp_norm,
    pre_norm_weights,
)
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_QWEN2 = "Qwen2ForCausalLM"
_QWEN3 = "Qwen3ForCausalLM"


def qwen2_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Qwen2 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Qwen2Config  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config

    config = own_config(config, Qwen2Config, architecture=_QWEN2)
    problems = ["use_sliding_window true (only false)"] if config.use_sliding_window else []
    shape = decoder_shape(config, architecture=_QWEN2, problems=problems)
    return replace(shape, qkv_bias=True)


def qwen3_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Qwen3 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Qwen3Config  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config

    config = own_config(config, Qwen3Config, architecture=_QWEN3)
    problems = ["use_sliding_window true (only false)"] if config.use_sliding_window else []
    if config.attention_bias:  # it would bias the output projection too
        problems.append("attention_bias true (only false)")
    shape = decoder_shape(config, architecture=_QWEN3, problems=problems)
    return replace(shape, qk_norm="head")


def qwen3_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, attention, head_norms, pre_mlp_norm, mlp)
    return decoder_weights(shape, layer_parts=parts)


QWEN2 = Family(architecture=_QWEN2, shape=qwen2_shape, weights=pre_norm_weights)
QWEN3 = Family(architecture=_QWEN3, shape=qwen3_shape, weights=qwen3_weights)
