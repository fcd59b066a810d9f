"""Makes a shape of a HuggingFace configuration, for the decoders that families build.

Promise: a setting that no family builds is refused by name, never ignored. These are other
activations, attention dropout, quantized weights, layers that differ from each other, and rotary
scalings other than Llama 3's. transformers' own functions compute the rotary frequencies: Megatron
derives them from a base, and fixes parts of Llama 3's scaling, its original length among them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch

from roll_sft.base.errors import ConfigError
from roll_sft.base.text import shown
from roll_sft.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import (
        LlamaConfig,
        MistralConfig,
        Olmo2Config,
        PreTrainedConfig,
        Qwen2Config,
        Qwen3Config,
    )

    DecoderConfig: TypeAlias = LlamaConfig | MistralConfig | Olmo2Config | Qwen2Config | Qwen3Config
    Config = TypeVar("Config", bound=PreTrainedConfig)

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def own_config(
    config: "PreTrainedConfig", expected: "type[Config]", *, architecture: str
) -> "Config":
    """`config` as transformers' own class; a class from the model's folder is refused."""
    if not isinstance(config, expected):
        raise ConfigError(
            f"model.path: {architecture} comes with configuration class {type(config).__name__}; "
            f"only transformers' own {expected.__name__} is available; choose another model, or "
            "correct model_type and auto_map in config.json"
        )
    return config


def decoder_shape(
    config: "DecoderConfig", *, architecture: str, problems: Sequence[str] = ()
) -> ModelShape:
    """The shape of a decoder with norms before attention and MLP, and without biases.

    Raises `ConfigError` that lists the family's own `problems`, each a value and its rule, and
    those that this function finds.
    """
    problems = [
        *problems,
        *_problems(config),
        *_rotary_problems(dict(config.rope_parameters or {})),
    ]
    if problems:
        raise ConfigError(
            f"model.path: config.json of {architecture} has settings that this version does not "
            f"implement: {'; '.join(problems)}; choose another model or correct config.json"
        )
    return ModelShape(
        architecture=architecture,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=_num_key_value_heads(config),
        head_dim=_head_dim(config),
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=False,
        rotary_inv_freq=_rotary_inv_freq(config),
        initializer_range=config.initializer_range,
    )


def _num_key_value_heads(config: "DecoderConfig") -> int:
    """Key-value groups; transformers fills in an absent value with the number of heads."""
    assert config.num_key_value_heads is not None, f"{config.model_type}: num_key_value_heads unset"
    return config.num_key_value_heads


def _head_dim(config: "DecoderConfig") -> int:
    """Width of a head. Not a field of every class, but transformers obeys it if the file has it."""
    head_dim: int | None = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def _problems(config: "DecoderConfig") -> list[str]:
    """Value and rule of each setting that no family builds."""
    problems = []
    layer_types = getattr(config, "layer_types", None) or []
    if any(each != "full_attention" for each in layer_types):
        problems.append(f"layer_types {shown(layer_types)} (only full_attention)")
    pad = config.pad_token_id
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        problems.append(f"pad_token_id {pad} (must be one of the {config.vocab_size} tokens)")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act} (only silu)")
    if config.attention_dropout:
        problems.append(f"attention_dropout {config.attention_dropout} (only 0)")
    if getattr(config, "quantization_config", None) is not None:
        problems.append("quantization_config (only unquantized weights)")
    num_heads, num_groups = config.num_attention_heads, _num_key_value_heads(config)
    if num_groups < 1 or num_heads % num_groups:
        problems.append(
            f"num_key_value_heads {num_groups} (must divide num_attention_heads {num_heads})"
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % num_heads:
        problems.append(
            f"num_attention_heads {num_heads} (must divide hidden_size {config.hidden_size} "
            "where head_dim is absent)"
        )
    elif _head_dim(config) % 2:
        problems.append(f"head_dim {_head_dim(config)} (must be even for rotary embeddings)")
    return problems


def _rotary_problems(rope: dict[str, Any]) -> list[str]:
    """Value and rule of each setting in `rope_parameters` that cannot be built.

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


def _rotary_inv_freq(config: "PreTrainedConfig") -> tuple[float, ...]:
    """K/2 inverse frequencies of a `config` without `_rotary_problems`, exact float32 values."""
    # slow to import
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":  # in no table, and every family's own copy equals Llama's
        default = LlamaRotaryEmbedding.compute_default_rope_parameters
        frequencies, factor = default(cast("LlamaConfig", config))
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    # Megatron has no factor on cos and sin, so one other than 1 would be ignored.
    assert factor == 1.0, f"rotary attention factor {factor} of {rope_type} is not 1"
    assert frequencies.dtype == torch.float32, f"rotary frequencies are {frequencies.dtype}"
    return tuple(frequencies.tolist())


def _llama3_problems(rope: dict[str, Any]) -> list[str]:
    """Bad values for which transformers only warns, and which then make it fail or divide by 0."""
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
