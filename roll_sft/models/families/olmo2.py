"""OLMo 2 dense models, tied and untied.

Its two norms come after attention and MLP, before the residual addition, and nothing is normed
before them; queries and keys are normed over all heads of their projection at once. The post norms
have names of our own, because Megatron's layer has no such norms.
Refused by name, beside what no family builds: biases in attention, and clipped projections.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from roll_sft.models.family import Family, attention, decoder_weights, mlp
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import SingleTensor, WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ARCHITECTURE = "Olmo2ForCausalLM"


def olmo2_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of an OLMo 2 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Olmo2Config  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config

    config = own_config(config, Olmo2Config, architecture=_ARCHITECTURE)
    problems = []
    if config.attention_bias:  # it would bias the output projection too
        problems.append("attention_bias true (only false)")
    clip_qkv: float | None = getattr(config, "clip_qkv", None)  # of the first OLMo
    if clip_qkv is not None:
        problems.append(f"clip_qkv {clip_qkv} (only null)")
    shape = decoder_shape(config, architecture=_ARCHITECTURE, problems=problems)
    return replace(shape, qk_norm="projection", norm_placement="post")


def olmo2_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (attention, projection_norms, _post_attention_norm, mlp, _post_mlp_norm)
    return decoder_weights(shape, layer_parts=parts)


def projection_norms(shape: ModelShape, *, layer: int) -> WeightTable:
    """The norms over all query heads and over all key heads, cut in whole heads."""
    hf, ours = f"model.layers.{layer}.self_attn", f"decoder.layers.{layer}.self_attention"
    sizes = {"q": shape.num_attention_heads, "k": shape.num_key_value_heads}
    return {
        f"{ours}.{letter}_layernorm.weight": SingleTensor(
            f"{hf}.{letter}_norm.weight",
            (num_heads * shape.head_dim,),
            split_dim=0,
            unit=shape.head_dim,
        )
        for letter, num_heads in sizes.items()
    }


def _post_attention_norm(shape: ModelShape, *, layer: int) -> WeightTable:
    """The norm after attention, before the residual addition."""
    name = f"model.layers.{layer}.post_attention_layernorm.weight"
    ours = f"decoder.layers.{layer}.self_attention.post_layernorm.weight"
    return {ours: SingleTensor(name, (shape.hidden_size,))}


def _post_mlp_norm(shape: ModelShape, *, layer: int) -> WeightTable:
    """The norm after the MLP, before the residual addition."""
    name = f"model.layers.{layer}.post_feedforward_layernorm.weight"
    ours = f"decoder.layers.{layer}.mlp.post_layernorm.weight"
    return {ours: SingleTensor(name, (shape.hidden_size,))}


OLMO2 = Family(architecture=_ARCHITECTURE, shape=olmo2_shape, weights=olmo2_weights)
