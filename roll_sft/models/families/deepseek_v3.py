"""DeepSeek-V3 models: latent attention, and routers and layers as in `models/families/glm4_moe.py`.

Refused by name: biases in attention, fewer key heads than heads, and what no family builds.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from roll_sft.models.families.glm4_moe import mlp_or_experts, opened, sigmoid_experts
from roll_sft.models.family import Family, decoder_weights, pre_attention_norm, pre_mlp_norm
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import LatentHeads, LayerAttention, Variation
from roll_sft.models.weight_map import SingleTensor, WeightTable

if TYPE_CHECKING:
    from transformers import DeepseekV3Config, PreTrainedConfig

    from roll_sft.models.decoder_shape import DecoderConfig

_ARCHITECTURE = "DeepseekV3ForCausalLM"
_WIDEST = 2**17  # far above the values of every published model


def deepseek_v3_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a DeepSeek-V3 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import DeepseekV3Config  # slow to import
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    from roll_sft.models.decoder_shape import decoder_shape, own_config
    from roll_sft.models.moe.expert_config import sigmoid_problems
    from roll_sft.models.rotary import rotary_problems, rotary_table

    config = own_config(config, DeepseekV3Config, architecture=_ARCHITECTURE)
    problems = sigmoid_problems(config)
    problems += rotary_problems(dict(config.rope_parameters or {}), types=("default", "yarn"))
    problems += _latent_problems(config)
    shape = decoder_shape(
        cast("DecoderConfig", config),
        architecture=_ARCHITECTURE,
        problems=problems,
        own=("rope_parameters",),
    )
    frequencies, scaling = rotary_table(config)
    assert config.v_head_dim is not None, "`_latent_problems` refuses none"
    latent = LatentHeads(
        key_value_rank=config.kv_lora_rank,
        rotated=config.qk_rope_head_dim,
        plain=config.qk_nope_head_dim,
        value=config.v_head_dim,
        query_rank=config.q_lora_rank,
    )
    width = latent.rotated + latent.plain
    scaled: Any = modeling_deepseek_v3.yarn_apply_mscale
    layer = LayerAttention(0, len(frequencies), rotary_scaling=scaling)
    variation = Variation(
        (layer,) * shape.num_layers,
        is_interleaved=bool(config.rope_interleave),
        softmax_scale=scaled(config.rope_parameters, width**-0.5),
        latent=latent,
    )
    return replace(
        shape,
        head_dim=width,
        rotary_inv_freq=frequencies,
        variation=variation,
        experts=sigmoid_experts(config),
    )


def _latent_problems(config: "DeepseekV3Config") -> list[str]:
    """Value and rule of each setting of latent attention that cannot be built."""
    problems = [
        f"{key} {value} (must be from 1 to {_WIDEST})"
        for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        if not 1 <= ((value := getattr(config, key)) or 0) <= _WIDEST
    ]
    rank = config.q_lora_rank
    if rank is not None and not 1 <= rank <= _WIDEST:
        problems.append(f"q_lora_rank {rank} (must be null, or from 1 to {_WIDEST})")
    if config.v_head_dim and config.v_head_dim > config.qk_head_dim:
        problems.append(
            f"v_head_dim {config.v_head_dim} (must be at most the {config.qk_head_dim} columns of"
            " a key)"
        )
    if config.num_key_value_heads != config.num_attention_heads:
        problems.append(
            f"num_key_value_heads {config.num_key_value_heads} (must be num_attention_heads"
            f" {config.num_attention_heads})"
        )
    if config.attention_bias:
        problems.append("attention_bias true (only false)")
    return problems


def deepseek_v3_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, _latent_attention, pre_mlp_norm, mlp_or_experts)
    return decoder_weights(shape, layer_parts=parts)


def _latent_attention(shape: ModelShape, *, layer: int) -> WeightTable:
    """Down projections and norms, whole on every tensor rank; up projections, cut by heads."""
    assert shape.variation is not None, "of a variation"
    latent = shape.variation.latent
    assert latent is not None, "with latent attention"
    hf, ours = f"model.layers.{layer}.self_attn", f"decoder.layers.{layer}.self_attention"
    hidden, heads, rank = shape.hidden_size, shape.num_attention_heads, latent.query_rank

    def by_heads(name: str, width: int, inputs: int) -> SingleTensor:
        return SingleTensor(f"{hf}.{name}.weight", (heads * width, inputs), split_dim=0, unit=width)

    if rank is None:
        query: WeightTable = {
            f"{ours}.linear_q_proj.weight": by_heads("q_proj", shape.head_dim, hidden)
        }
    else:
        query = {
            f"{ours}.linear_q_down_proj.weight": SingleTensor(
                f"{hf}.q_a_proj.weight", (rank, hidden)
            ),
            f"{ours}.q_layernorm.weight": SingleTensor(f"{hf}.q_a_layernorm.weight", (rank,)),
            f"{ours}.linear_q_up_proj.weight": by_heads("q_b_proj", shape.head_dim, rank),
        }
    rank = latent.key_value_rank
    return query | {
        f"{ours}.linear_kv_down_proj.weight": SingleTensor(
            f"{hf}.kv_a_proj_with_mqa.weight", (rank + latent.rotated, hidden)
        ),
        f"{ours}.kv_layernorm.weight": SingleTensor(f"{hf}.kv_a_layernorm.weight", (rank,)),
        f"{ours}.linear_kv_up_proj.weight": by_heads(
            "kv_b_proj", latent.plain + latent.value, rank
        ),
        f"{ours}.linear_proj.weight": SingleTensor(
            f"{hf}.o_proj.weight", (hidden, heads * latent.value), split_dim=1
        ),
    }


DEEPSEEK_V3 = Family(
    architecture=_ARCHITECTURE,
    shape=deepseek_v3_shape,
    weights=deepseek_v3_weights,
    opened=opened,
)
