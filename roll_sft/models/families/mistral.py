"""Mistral dense text models: Llama's layer, with a sliding window in the first release."""

from dataclasses import replace
from typing import TYPE_CHECKING

from roll_sft.models.family import Family, pre_norm_weights
from roll_sft.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ARCHITECTURE = "MistralForCausalLM"


def mistral_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Mistral model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import MistralConfig  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config

    config = own_config(config, MistralConfig, architecture=_ARCHITECTURE)
    shape = decoder_shape(config, architecture=_ARCHITECTURE)
    return with_window(shape, config.sliding_window)


def with_window(shape: ModelShape, window: int | None) -> ModelShape:
    """`shape` with `window` in every layer, where a sample can outgrow it."""
    if window is None or window >= shape.max_position_embeddings:
        return shape
    from roll_sft.models.variation import LayerAttention, Variation  # where there is one alone

    layer = LayerAttention(0, len(shape.rotary_inv_freq), window=window)
    return replace(shape, variation=Variation((layer,) * shape.num_layers))


MISTRAL = Family(architecture=_ARCHITECTURE, shape=mistral_shape, weights=pre_norm_weights)
