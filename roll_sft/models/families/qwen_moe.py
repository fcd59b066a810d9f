"""Qwen2-MoE and Qwen3-MoE models, tied and untied.

Their layers are those of `qwen.py` with experts in place of the MLP; Qwen2-MoE has a shared expert
with a gate beside them. Refused by name, beside what no family builds: sliding windows, biases in
Qwen3's attention, and layers without experts.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from roll_sft.models.family import (
    Family,
    attention,
    decoder_weights,
    head_norms,
    pre_attention_norm,
    pre_mlp_norm,
)
from roll_sft.models.moe.expert_weights import router_and_experts, shared_expert
from roll_sft.models.moe.experts import ExpertShape
from roll_sft.models.moe.fused_experts import split_experts
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

    from roll_sft.models.decoder_shape import DecoderConfig

_QWEN2 = "Qwen2MoeForCausalLM"
_QWEN3 = "Qwen3MoeForCausalLM"


def qwen2_moe_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Qwen2-MoE model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Qwen2MoeConfig  # slow to import

    from roll_sft.models.decoder_shape import own_config

    config = own_config(config, Qwen2MoeConfig, architecture=_QWEN2)
    shape = _shape(config, _QWEN2, [])
    assert shape.experts is not None, "every Qwen2-MoE has experts"
    width = config.shared_expert_intermediate_size
    experts = replace(shape.experts, shared_ffn_hidden_size=width, has_shared_gate=True)
    return replace(shape, qkv_bias=config.qkv_bias, experts=experts)


def qwen3_moe_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Qwen3-MoE model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Qwen3MoeConfig  # slow to import

    from roll_sft.models.decoder_shape import own_config

    config = own_config(config, Qwen3MoeConfig, architecture=_QWEN3)
    problems = ["attention_bias true (only false)"] if config.attention_bias else []
    return replace(_shape(config, _QWEN3, problems), qk_norm="head")


def qwen2_moe_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, attention, pre_mlp_norm, router_and_experts, shared_expert)
    return decoder_weights(shape, layer_parts=parts)


def qwen3_moe_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, attention, head_norms, pre_mlp_norm, router_and_experts)
    return decoder_weights(shape, layer_parts=parts)


def _shape(
    config: "Qwen2MoeConfig | Qwen3MoeConfig", architecture: str, problems: list[str]
) -> ModelShape:
    from roll_sft.models.decoder_shape import decoder_shape
    from roll_sft.models.moe.expert_config import expert_problems

    problems = [*problems, *expert_problems(config, num_experts=config.num_experts)]
    if config.use_sliding_window:
        problems.append("use_sliding_window true (only false)")
    shape = decoder_shape(
        cast("DecoderConfig", config), architecture=architecture, problems=problems
    )
    experts = ExpertShape(
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        ffn_hidden_size=config.moe_intermediate_size,
        is_normalized=config.norm_topk_prob,
        aux_loss_coef=config.router_aux_loss_coef,
    )
    return replace(shape, experts=experts)


QWEN2_MOE = Family(
    architecture=_QWEN2, shape=qwen2_moe_shape, weights=qwen2_moe_weights, opened=split_experts
)
QWEN3_MOE = Family(
    architecture=_QWEN3, shape=qwen3_moe_shape, weights=qwen3_moe_weights, opened=split_experts
)
