"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini dense text models, tied and untied.

Query, key and value are one tensor, and so are gate and up. A part of each head may be rotated, and
longrope scales that rotation, with factors for samples up to the original length and others beyond;
the latter are not built, so longer samples are refused. Refused by name, beside what no family
builds: dropout of the residual and of the embedding.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from roll_sft.models.family import Family, decoder_weights, pre_attention_norm, pre_mlp_norm
from roll_sft.models.fused_rows import fused_attention, fused_mlp
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import LayerAttention, Variation
from roll_sft.models.weight_map import WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ARCHITECTURE = "Phi3ForCausalLM"


def phi3_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Phi-3 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Phi3Config  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config
    from roll_sft.models.rotary import partial_problems, rotary_problems, rotary_table

    config = own_config(config, Phi3Config, architecture=_ARCHITECTURE)
    rope = dict(config.rope_parameters or {})
    problems = [
        f"{key} {getattr(config, key)} (only 0)"
        for key in ("resid_pdrop", "embd_pdrop")
        if getattr(config, key)
    ]
    problems += rotary_problems(rope, types=("default", "longrope"), partial=True)
    problems += _factor_problems(rope)
    problems += partial_problems(config, config.hidden_size // config.num_attention_heads)
    shape = decoder_shape(
        config, architecture=_ARCHITECTURE, problems=problems, own=("rope_parameters",)
    )
    frequencies, scaling = rotary_table(config)
    is_scaled = rope["rope_type"] == "longrope" and rope["long_factor"] != rope["short_factor"]
    window = config.sliding_window
    if window is not None and window >= shape.max_position_embeddings:
        window = None
    layer = LayerAttention(0, len(frequencies), rotary_scaling=scaling, window=window)
    variation = Variation(
        (layer,) * shape.num_layers,
        longest=rope["original_max_position_embeddings"] if is_scaled else None,
    )
    return replace(shape, rotary_inv_freq=frequencies, variation=variation)


def phi3_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, fused_attention, pre_mlp_norm, fused_mlp)
    return decoder_weights(shape, layer_parts=parts)


def _factor_problems(rope: dict[str, Any]) -> list[str]:
    """Of longrope's factors, whose number transformers checks itself."""
    if rope.get("rope_type") != "longrope":
        return []
    return [
        f"{key} {rope.get(key)} (must be a list of positive numbers)"
        for key in ("short_factor", "long_factor")
        if not isinstance(rope.get(key), list) or not all(each > 0 for each in rope[key])
    ]


PHI3 = Family(architecture=_ARCHITECTURE, shape=phi3_shape, weights=phi3_weights)
