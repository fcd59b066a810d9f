"""Makes a shape of a HuggingFace configuration, for the decoders that families build.

Promise: a setting that no family builds is refused by name, never ignored. These are other
activations, attention dropout, quantized weights, layers that differ from each other, and rotary
scalings other than Llama 3's. The rotary frequencies are transformers' to the last bit: Megatron
derives them from a base, and fixes parts of Llama 3's scaling, its original length among them.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from roll_sft.base.errors import ConfigError
from roll_sft.base.text import shown
from roll_sft.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        Glm4Config,
        GraniteConfig,
        LlamaConfig,
        MistralConfig,
        Olmo2Config,
        Olmo3Config,
        Phi3Config,
        PreTrainedConfig,
        Qwen2Config,
        Qwen3Config,
        SmolLM3Config,
    )

    DecoderConfig: TypeAlias = (
        Gemma2Config | Gemma3TextConfig | Glm4Config | GraniteConfig | LlamaConfig | MistralConfig
        | Olmo2Config | Olmo3Config | Phi3Config | Qwen2Config | Qwen3Config | SmolLM3Config
    )  # fmt: skip
    Config = TypeVar("Config", bound=PreTrainedConfig)


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
    config: "DecoderConfig",
    *,
    architecture: str,
    problems: Sequence[str] = (),
    own: Collection[str] = (),
) -> ModelShape:
    """The shape of a decoder with norms before attention and MLP, and without biases.

    The family reads the settings in `own` itself: of hidden_act, layer_types, rope_parameters,
    quantization_config.
    Raises `ConfigError` that lists the family's own `problems`, each a value and its rule, and
    those that this function finds.
    """
    rotary, frequencies = ([], ()) if "rope_parameters" in own else _rotary(config)
    problems = [*problems, *_problems(config, own), *rotary]
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
        rotary_inv_freq=frequencies,
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


def _problems(config: "DecoderConfig", own: Collection[str]) -> list[str]:
    """Value and rule of each setting that no family builds, but for those in `own`."""
    problems = []
    layer_types = getattr(config, "layer_types", None) or []
    if "layer_types" not in own and any(each != "full_attention" for each in layer_types):
        problems.append(f"layer_types {shown(layer_types)} (only full_attention)")
    pad = config.pad_token_id
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        problems.append(f"pad_token_id {pad} (must be one of the {config.vocab_size} tokens)")
    activation = getattr(config, "hidden_act", None)  # of Gemma it is hidden_activation
    if "hidden_act" not in own and activation != "silu":
        problems.append(f"hidden_act {activation} (only silu)")
    if config.attention_dropout:
        problems.append(f"attention_dropout {config.attention_dropout} (only 0)")
    is_quantized = getattr(config, "quantization_config", None) is not None
    if is_quantized and "quantization_config" not in own:
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


def _rotary(config: "PreTrainedConfig") -> tuple[list[str], tuple[float, ...]]:
    """Value and rule of each setting that is not built; else K/2 frequencies, exact float32."""
    rope = dict(config.rope_parameters or {})
    theta = rope.get("rope_theta")
    is_default = rope.keys() == {"rope_type", "rope_theta"} and rope["rope_type"] == "default"
    if is_default and isinstance(theta, int | float) and 0 < theta < 1e38:
        return [], default_frequencies(theta, _head_dim(cast("DecoderConfig", config)))
    from roll_sft.models.rotary import rotary_problems, rotary_table  # where it is scaled alone

    if problems := rotary_problems(rope):
        return problems, ()
    frequencies, factor = rotary_table(config)
    # A plain decoder has no factor on cos and sin, so one other than 1 would be ignored.
    assert factor == 1.0, f"rotary attention factor {factor} of {rope['rope_type']} is not 1"
    return [], frequencies


def default_frequencies(theta: float, width: int) -> tuple[float, ...]:
    """Inverse frequencies of a rotation of `width` columns without a scaling, exact float32 values.

    By the operations of transformers, whose function lies in files that take seconds to import.
    """
    import torch  # a reader of shapes needs it here alone

    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return tuple((1.0 / theta**exponents).tolist())
