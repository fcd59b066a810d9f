"""GLM-4.5 models: sigmoid routers with a bias for the choice, shared experts, dense first layers.

Half of each head is rotated. Refused by name: what no family builds.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from roll_sft.models.family import (
    Family,
    attention,
    decoder_weights,
    head_norms,
    mlp,
    pre_attention_norm,
    pre_mlp_norm,
)
from roll_sft.models.files.safetensors_in import SafetensorsSource, StoredSource
from roll_sft.models.moe.expert_weights import experts_of, router_and_experts, shared_expert
from roll_sft.models.moe.experts import ExpertShape
from roll_sft.models.moe.fused_experts import split_experts
from roll_sft.models.prediction import without_prediction
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import LayerAttention, Variation
from roll_sft.models.weight_map import WeightTable

if TYPE_CHECKING:
    from transformers import DeepseekV3Config, Glm4MoeConfig, PreTrainedConfig

    from roll_sft.models.decoder_shape import DecoderConfig

_ARCHITECTURE = "Glm4MoeForCausalLM"


def glm4_moe_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a GLM-4.5 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Glm4MoeConfig  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config
    from roll_sft.models.moe.expert_config import sigmoid_problems
    from roll_sft.models.rotary import partial_problems, rotary_problems, rotary_table

    config = own_config(config, Glm4MoeConfig, architecture=_ARCHITECTURE)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    problems = sigmoid_problems(config)
    problems += rotary_problems(dict(config.rope_parameters or {}), partial=True)
    if not problems:
        problems += partial_problems(config, head_dim)
    shape = decoder_shape(
        cast("DecoderConfig", config),
        architecture=_ARCHITECTURE,
        problems=problems,
        own=("rope_parameters",),
    )
    frequencies, scaling = rotary_table(config)
    layer = LayerAttention(0, len(frequencies), rotary_scaling=scaling)
    return replace(
        shape,
        qkv_bias=config.attention_bias,
        qk_norm="head" if config.use_qk_norm else "none",
        rotary_inv_freq=frequencies,
        variation=Variation((layer,) * shape.num_layers),
        experts=sigmoid_experts(config),
    )


def sigmoid_experts(config: "DeepseekV3Config | Glm4MoeConfig") -> ExpertShape:
    """Experts of routers of this kind, of a `config` without problems."""
    groups: Any = config
    return ExpertShape(
        num_experts=config.n_routed_experts,
        experts_per_token=groups.num_experts_per_tok,
        ffn_hidden_size=config.moe_intermediate_size,
        is_normalized=bool(config.norm_topk_prob),
        aux_loss_coef=0.0,  # the bias balances the load
        shared_ffn_hidden_size=config.n_shared_experts * config.moe_intermediate_size,
        has_sigmoid=True,
        num_groups=groups.n_group,
        groups_per_token=groups.topk_group,
        weight_scale=config.routed_scaling_factor,
        num_dense_layers=groups.first_k_dense_replace,
    )


def glm4_moe_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    norms = (head_norms,) if shape.qk_norm == "head" else ()
    parts = (pre_attention_norm, attention, *norms, pre_mlp_norm, mlp_or_experts)
    return decoder_weights(shape, layer_parts=parts)


def mlp_or_experts(shape: ModelShape, *, layer: int) -> WeightTable:
    """The MLP of the first layers, and the experts of the others with their shared expert."""
    if layer < experts_of(shape).num_dense_layers:
        return mlp(shape, layer=layer)
    table = router_and_experts(shape, layer=layer)
    return table | shared_expert(shape, layer=layer, module="shared_experts")


def opened(source: SafetensorsSource) -> StoredSource:
    """`source` without layers for multi-token prediction, one tensor for each expert."""
    return split_experts(without_prediction(source))


GLM4_MOE = Family(
    architecture=_ARCHITECTURE,
    shape=glm4_moe_shape,
    weights=glm4_moe_weights,
    opened=opened,
)
