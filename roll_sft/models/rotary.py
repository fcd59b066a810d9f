"""Rotary embeddings that are scaled, partial, or of one kind for each kind of layer.

transformers' own functions compute what is scaled; here are the rules for what they are given. They
only warn of bad values, and then fail or divide by zero.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from roll_sft.base.text import shown
from roll_sft.models.decoder_shape import default_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Keys of each rope_type that must be positive numbers.
_POSITIVE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}


def rotary_problems(
    rope: Mapping[str, Any],
    *,
    types: Collection[str] = ("default", "llama3"),
    partial: bool = False,
) -> list[str]:
    """Value and rule of each setting in `rope`, flat `rope_parameters`, that cannot be built.

    `types` are the values of rope_type that the family builds; `partial` says whether it rotates a
    part of each head. transformers 5 moves the `rope_theta` and `rope_scaling` of older files in
    there at load.
    """
    if "rope_type" not in rope:  # or one dictionary for each kind of layer
        return [f"rope_parameters {rope} (only one flat dictionary with rope_type and rope_theta)"]
    kind, problems = rope["rope_type"], []
    if kind not in types:
        problems.append(f"rope_type {kind} (only {' and '.join(types)})")
    if not _is_positive(rope.get("rope_theta")):
        problems.append(f"rope_theta {rope.get('rope_theta')} (must be a positive number)")
    whole = () if partial else ("partial_rotary_factor",)
    scaled = () if kind in _OPTIONAL else ("attention_factor",)
    for key in (*whole, *scaled):
        if rope.get(key, 1.0) != 1.0:
            problems.append(f"{key} {rope[key]} (only 1)")
    if kind in types:
        problems += _scaling_problems(kind, rope)
    if kind == "llama3" and not problems and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        problems.append(
            f"high_freq_factor {rope['high_freq_factor']} (must exceed low_freq_factor "
            f"{rope['low_freq_factor']})"
        )
    return problems


def _scaling_problems(kind: str, rope: Mapping[str, Any]) -> list[str]:
    """Value and rule of each number that rope_type `kind` needs, or may have."""
    problems = [
        f"{key} {rope.get(key)} (must be a positive number)"
        for key in _POSITIVE[kind]
        if not _is_positive(rope.get(key))
    ]
    return problems + [
        f"{key} {shown(rope[key])} (must be a positive number, or null)"
        for key in _OPTIONAL.get(kind, ())
        if rope.get(key) is not None and not _is_positive(rope[key])
    ]


def partial_problems(config: "PreTrainedConfig", head_dim: int) -> list[str]:
    """Value and rule where `partial_rotary_factor` rotates no even number of columns."""
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    width = int(head_dim * factor)
    if width and width % 2 == 0:
        return []
    return [
        f"partial_rotary_factor {factor} (must rotate an even number of the {head_dim} columns of"
        f" a head, and not {width})"
    ]


def rotary_table(
    config: "PreTrainedConfig", *, layer_type: str | None = None
) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies, exact float32 values, and the factor on cosines and sines.

    Of a `config` without `rotary_problems`; `layer_type` names its entry in nested
    `rope_parameters`. The frequencies are half as many as the columns that are rotated.
    """
    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    if rope["rope_type"] == "default":
        head_dim = getattr(config, "head_dim", None)
        width = head_dim or config.hidden_size // config.num_attention_heads
        partial = rope.get("partial_rotary_factor", 1.0) if layer_type is None else 1.0
        return default_frequencies(rope["rope_theta"], int(width * partial)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # slow to import

    named = {} if layer_type is None else {"layer_type": layer_type}
    found = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), **named)
    frequencies, factor = found
    assert frequencies.dtype == torch.float32, f"rotary frequencies are {frequencies.dtype}"
    return tuple(frequencies.tolist()), float(factor)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < 1e38
