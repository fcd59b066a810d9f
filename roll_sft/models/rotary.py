"""Rotary frequencies of every family, computed by transformers' own functions.

Megatron derives frequencies from a base and fixes parts of Llama 3's scaling (its original length
among them), so it is given the frequencies instead. What it has no place for is refused by name:
other scalings, a factor on cos and sin, heads that are rotated in part.
"""

from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rotary_problems(rope: dict[str, Any]) -> list[str]:
    """What in a configuration's `rope_parameters` cannot be built: value and rule of each.

    transformers 5 moves the `rope_theta` and `rope_scaling` of older files in there at load.
    """
    if "rope_type" not in rope:  # or one dictionary for each kind of layer
        return [f"rope_parameters {rope} (only one flat dictionary with rope_type and rope_theta)"]
    problems = []
    if rope["rope_type"] not in ("default", "llama3"):
        problems.append(f"rope_type {rope['rope_type']} (only default and llama3)")
    if not _is_positive(rope.get("rope_theta")):
        problems.append(f"rope_theta {rope.get('rope_theta')} (must be a positive number)")
    for key in ("partial_rotary_factor", "attention_factor"):
        if rope.get(key, 1.0) != 1.0:
            problems.append(f"{key} {rope[key]} (only 1)")
    if rope["rope_type"] == "llama3":
        problems += _llama3_problems(rope)
    return problems


def rotary_inv_freq(config: "PreTrainedConfig") -> tuple[float, ...]:
    """K/2 inverse frequencies of a `config` without `rotary_problems`, exact float32 values."""
    # Slow: paid by whoever opens a model, not on import.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":  # in no table, and every family's own copy equals Llama's
        default = LlamaRotaryEmbedding.compute_default_rope_parameters
        frequencies, factor = default(cast("LlamaConfig", config))
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    # Megatron has no place for a factor on cos and sin: one other than 1 would be lost in silence.
    assert factor == 1.0, f"rotary attention factor {factor} of {rope_type} is not 1"
    assert frequencies.dtype == torch.float32, f"rotary frequencies are {frequencies.dtype}"
    return tuple(frequencies.tolist())


def _llama3_problems(rope: dict[str, Any]) -> list[str]:
    """Values that transformers only warns of, and then fails on or divides by."""
    problems = [
        f"{key} {rope.get(key)} (must be a positive number)"
        for key in _LLAMA3_KEYS
        if not _is_positive(rope.get(key))
    ]
    if not problems and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        problems.append(
            f"high_freq_factor {rope['high_freq_factor']} (must exceed low_freq_factor "
            f"{rope['low_freq_factor']})"
        )
    return problems


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < 1e38
