"""Qwen2 and Qwen2.5 dense models, tied and untied.

What the configuration may ask for and this file does not build is refused by name, never ignored:
sliding windows, scaled or partial rotary embeddings, attention dropout, other activations,
quantized weights.
"""

from typing import TYPE_CHECKING, Any

import torch

from roll_sft.errors import ConfigError
from roll_sft.models.spec import (
    QKV,
    Family,
    GatedMLP,
    ModelShape,
    Replicated,
    RowSplit,
    TiedHead,
    VocabSplit,
    WeightTable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, Qwen2Config

_ARCHITECTURE = "Qwen2ForCausalLM"


def qwen2_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Qwen2 model; `ConfigError` lists all that `config` asks for in vain."""
    from transformers import Qwen2Config  # slow: paid by whoever opens a model, not on import

    if not isinstance(config, Qwen2Config):
        raise ConfigError(
            f"model.path: {_ARCHITECTURE} comes with configuration class {type(config).__name__}; "
            "only transformers' own Qwen2Config is available; remove auto_map from config.json"
        )
    problems = _problems(config)
    if problems:
        raise ConfigError(
            f"model.path: config.json of {_ARCHITECTURE} asks for what this version does not "
            f"implement: {'; '.join(problems)}; choose another model or correct config.json"
        )
    return ModelShape(
        architecture=_ARCHITECTURE,
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
        qkv_bias=True,
        rotary_inv_freq=_rotary_inv_freq(config),
        initializer_range=config.initializer_range,
    )


def qwen2_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    hidden_size = shape.hidden_size
    embedding = VocabSplit("model.embed_tokens.weight", shape.vocab_size, hidden_size)
    table: WeightTable = {"embedding.word_embeddings.weight": embedding}
    for layer in range(shape.num_layers):
        table |= _layer_weights(shape, layer=layer)
    table["decoder.final_layernorm.weight"] = Replicated("model.norm.weight", (hidden_size,))
    table["output_layer.weight"] = (
        TiedHead("lm_head.weight", embedding)
        if shape.tie_word_embeddings
        else VocabSplit("lm_head.weight", shape.vocab_size, hidden_size)
    )
    return table


def _layer_weights(shape: ModelShape, *, layer: int) -> WeightTable:
    """The parameters of one layer."""
    hf, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
    hidden_size, ffn_hidden_size = shape.hidden_size, shape.ffn_hidden_size
    attention_width = shape.num_attention_heads * shape.head_dim

    def qkv(kind: str, columns: tuple[int, ...]) -> QKV:
        return QKV(
            query=f"{hf}.self_attn.q_proj.{kind}",
            key=f"{hf}.self_attn.k_proj.{kind}",
            value=f"{hf}.self_attn.v_proj.{kind}",
            num_heads=shape.num_attention_heads,
            num_groups=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            columns=columns,
        )

    return {
        f"{ours}.input_layernorm.weight": Replicated(
            f"{hf}.input_layernorm.weight", (hidden_size,)
        ),
        f"{ours}.self_attention.linear_qkv.weight": qkv("weight", (hidden_size,)),
        f"{ours}.self_attention.linear_qkv.bias": qkv("bias", ()),
        f"{ours}.self_attention.linear_proj.weight": RowSplit(
            f"{hf}.self_attn.o_proj.weight", (hidden_size, attention_width)
        ),
        f"{ours}.pre_mlp_layernorm.weight": Replicated(
            f"{hf}.post_attention_layernorm.weight", (hidden_size,)
        ),
        f"{ours}.mlp.linear_fc1.weight": GatedMLP(
            gate=f"{hf}.mlp.gate_proj.weight",
            up=f"{hf}.mlp.up_proj.weight",
            ffn_hidden_size=ffn_hidden_size,
            hidden_size=hidden_size,
        ),
        f"{ours}.mlp.linear_fc2.weight": RowSplit(
            f"{hf}.mlp.down_proj.weight", (hidden_size, ffn_hidden_size)
        ),
    }


QWEN2 = Family(architecture=_ARCHITECTURE, shape=qwen2_shape, weights=qwen2_weights)


def _num_key_value_heads(config: "Qwen2Config") -> int:
    """Key-value groups; transformers fills in an absent value with the number of heads."""
    assert config.num_key_value_heads is not None, "Qwen2Config leaves num_key_value_heads unset"
    return config.num_key_value_heads


def _head_dim(config: "Qwen2Config") -> int:
    """Width of a head. No field of Qwen2Config, but transformers obeys it if the file has it."""
    head_dim: int | None = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def _problems(config: "Qwen2Config") -> list[str]:
    """What in `config` cannot be built: value and rule of each."""
    problems = []
    layer_types = sorted(set(config.layer_types or ()))
    if config.use_sliding_window:
        problems.append("use_sliding_window true (only false)")
    elif layer_types not in ([], ["full_attention"]):
        problems.append(f"layer_types {layer_types} (only full_attention)")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act} (only silu)")
    if config.attention_dropout > 0:
        problems.append(f"attention_dropout {config.attention_dropout} (only 0)")
    if getattr(config, "quantization_config", None) is not None:
        problems.append("quantization_config (only unquantized weights)")
    num_heads, num_groups = config.num_attention_heads, _num_key_value_heads(config)
    if num_heads % num_groups:
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
    return problems + _rotary_problems(config)


def _rotary_problems(config: "Qwen2Config") -> list[str]:
    """What in `rope_parameters` cannot be built.

    transformers 5 moves the `rope_theta` and `rope_scaling` of older files in there at load.
    """
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    if "rope_type" not in rope:
        return [f"rope_parameters {rope} (only one flat dictionary with rope_type and rope_theta)"]
    problems = []
    if rope["rope_type"] != "default":
        problems.append(f"rope_type {rope['rope_type']} (only default)")
    if not isinstance(rope.get("rope_theta"), int | float):
        problems.append(f"rope_theta {rope.get('rope_theta')} (must be a number)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor {rope['partial_rotary_factor']} (only 1)")
    return problems


def _rotary_inv_freq(config: "Qwen2Config") -> tuple[float, ...]:
    """Inverse frequencies from transformers' own function, so that both sides round alike."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    frequencies, attention_factor = Qwen2RotaryEmbedding.compute_default_rope_parameters(config)
    # Megatron has no place for a factor on cos and sin: one other than 1 would be lost in silence.
    assert attention_factor == 1.0, f"rotary attention factor {attention_factor} is not 1"
    assert frequencies.dtype == torch.float32, f"rotary frequencies are {frequencies.dtype}"
    return tuple(frequencies.tolist())
