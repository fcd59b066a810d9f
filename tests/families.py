"""Tiny configurations of the families that are no plain decoders, every multiplier away from 1."""

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    SmolLM3Config,
)

TIED = {"tie_word_embeddings": True}
SHORT = [1.0, 1.1, 1.3, 1.7, 1.2, 1.4]
LONG = [2.0, 2.5, 3.0, 3.5, 4.0, 4.5]


def smollm3(**shared: Any) -> PreTrainedConfig:
    """Every other layer without rotation."""
    return SmolLM3Config(**shared | TIED, no_rope_layer_interval=2)


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


def olmo3(**shared: Any) -> PreTrainedConfig:
    """Three of four layers with a window shorter than most samples, the fourth scaled by yarn."""
    theta = shared["rope_parameters"]["rope_theta"]
    yarn = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
    }
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        "full_attention": yarn,
    }
    return Olmo3Config(**{**shared, "rope_parameters": rope}, sliding_window=24)


def gemma2(**shared: Any) -> PreTrainedConfig:
    """Every other layer with a window; both soft-caps where they bend."""
    return Gemma2Config(
        **shared | TIED,
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    )


def gemma3(**shared: Any) -> PreTrainedConfig:
    """Three layers with a window and a base of their own, a fourth without, scaled."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 70_000.0, "factor": 4.0},
    }
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    return Gemma3TextConfig(
        **shared | TIED | {"rope_parameters": rope},
        layer_types=[kinds[i % 4] for i in range(shared["num_hidden_layers"])],
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=24,
    )


def glm4(**shared: Any) -> PreTrainedConfig:
    """Half of each head rotated, neighbouring columns together; biases."""
    rope = {**shared["rope_parameters"], "partial_rotary_factor": 0.5}
    return Glm4Config(**{**shared, "rope_parameters": rope}, head_dim=16, attention_bias=True)


def mistral_window(**shared: Any) -> PreTrainedConfig:
    """As Mistral's first release: a window in every layer."""
    return MistralConfig(**shared, sliding_window=24)


FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "smollm3": smollm3,
    "phi3": phi3,
    "phi3_partial": phi3_partial,
    "granite": granite,
    "mistral_window": mistral_window,
    "olmo3": olmo3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "glm4": glm4,
}
