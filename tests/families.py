"""Tiny configurations of the families that are no plain decoders, every multiplier away from 1."""

from collections.abc import Callable
from typing import Any

from transformers import GraniteConfig, Phi3Config, PreTrainedConfig, SmolLM3Config

SHORT = [1.0, 1.1, 1.3, 1.7, 1.2, 1.4]
LONG = [2.0, 2.5, 3.0, 3.5, 4.0, 4.5]


def smollm3(**shared: Any) -> PreTrainedConfig:
    """Every other layer without rotation."""
    return SmolLM3Config(**shared, no_rope_layer_interval=2)


def phi3(**shared: Any) -> PreTrainedConfig:
    """As Phi-4."""
    return Phi3Config(**shared)


def phi3_partial(**shared: Any) -> PreTrainedConfig:
    """As Phi-4-mini: three quarters of each head rotated, scaled by longrope."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": shared["rope_parameters"]["rope_theta"],
        "partial_rotary_factor": 0.75,
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 256,
    }
    options = {**shared, "rope_parameters": rope}
    return Phi3Config(**options, original_max_position_embeddings=256)


def granite(**shared: Any) -> PreTrainedConfig:
    """Four multipliers."""
    return GraniteConfig(
        **shared,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.4,
        logits_scaling=2.5,
    )


FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "smollm3": smollm3,
    "phi3": phi3,
    "phi3_partial": phi3_partial,
    "granite": granite,
}
