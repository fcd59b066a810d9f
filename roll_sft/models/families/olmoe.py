"""OLMoE models: norms before attention and experts, and one norm over each projection of heads.

Refused by name, beside what no family builds: biases in attention, and clipped projections.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from roll_sft.models.families.olmo2 import projection_norms
from roll_sft.models.family import (
    Family,
    attention,
    decoder_weights,
    pre_attention_norm,
    pre_mlp_norm,
)
from roll_sft.models.moe.expert_weights import router_and_experts
from roll_sft.models.moe.experts import ExpertShape
from roll_sft.models.moe.fused_experts import split_experts
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from roll_sft.models.decoder_shape import DecoderConfig

_ARCHITECTURE = "OlmoeForCausalLM"


def olmoe_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of an OLMoE model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import OlmoeConfig  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config
    from roll_sft.models.moe.expert_config import expert_problems

    config = own_config(config, OlmoeConfig, architecture=_ARCHITECTURE)
    problems = expert_problems(config, num_experts=config.num_experts)
    if config.attention_bias:  # it would bias the output projection too
        problems.append("attention_bias true (only false)")
    if config.clip_qkv is not None:
        problems.append(f"clip_qkv {config.clip_qkv} (only null)")
    shape = decoder_shape(
        cast("DecoderConfig", config), architecture=_ARCHITECTURE, problems=problems
    )
    experts = ExpertShape(
        num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok,
        ffn_hidden_size=config.intermediate_size,
        is_normalized=config.norm_topk_prob,
        aux_loss_coef=config.router_aux_loss_coef,
    )
    return replace(shape, experts=experts, qk_norm="projection")


def olmoe_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, attention, projection_norms, pre_mlp_norm, router_and_experts)
    return decoder_weights(shape, layer_parts=parts)


OLMOE = Family(
    architecture=_ARCHITECTURE, shape=olmoe_shape, weights=olmoe_weights, opened=split_experts
)
