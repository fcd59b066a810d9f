"""Granite 3 and 4 dense models: Llama's layer with four multipliers, tied and untied.

Refused by name, beside what no family builds: biases in attention or MLP.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from roll_sft.models.family import Family, pre_norm_weights
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import LayerAttention, Variation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ARCHITECTURE = "GraniteForCausalLM"


def granite_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Granite model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import GraniteConfig  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config

    config = own_config(config, GraniteConfig, architecture=_ARCHITECTURE)
    problems = [
        f"{key} true (only false)" for key in ("attention_bias", "mlp_bias") if getattr(config, key)
    ]
    shape = decoder_shape(config, architecture=_ARCHITECTURE, problems=problems)
    layers = (LayerAttention(0, len(shape.rotary_inv_freq)),) * shape.num_layers
    variation = Variation(
        layers,
        softmax_scale=float(config.attention_multiplier),
        embedding_multiplier=float(config.embedding_multiplier),
        residual_multiplier=float(config.residual_multiplier),
        logits_divisor=float(config.logits_scaling),
    )
    return replace(shape, variation=variation)


GRANITE = Family(architecture=_ARCHITECTURE, shape=granite_shape, weights=pre_norm_weights)
