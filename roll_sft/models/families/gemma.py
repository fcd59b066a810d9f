"""Gemma 2 and Gemma 3 text models, tied and untied.

Norms stand before and behind attention and MLP, and multiply by 1 + weight. Layers with a window
alternate with layers without; Gemma 3 rotates the two kinds by bases of their own, and norms each
query and key head; Gemma 2 caps the attention scores. Embeddings are scaled by the root of the
hidden size, and logits may be capped. Refused by name, beside what no family builds: biases in
attention, attention in both directions, and attention soft-caps of Gemma 3, which transformers
ignores.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from roll_sft.models.family import (
    Family,
    attention,
    decoder_weights,
    head_norms,
    mlp,
    pre_attention_norm,
)
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import Variation
from roll_sft.models.weight_map import SingleTensor, WeightTable

if TYPE_CHECKING:
    from transformers import Gemma2Config, Gemma3TextConfig, PreTrainedConfig

_GEMMA2 = "Gemma2ForCausalLM"
_GEMMA3 = "Gemma3ForCausalLM"
_ACTIVATION = "gelu_pytorch_tanh"


def gemma2_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Gemma 2 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Gemma2Config  # slow to import

    from roll_sft.models.decoder_shape import own_config

    config = own_config(config, Gemma2Config, architecture=_GEMMA2)
    shape = _shape(config, architecture=_GEMMA2, problems=[])
    assert shape.variation is not None, "of _shape"
    softcap = config.attn_logit_softcapping
    return replace(shape, variation=replace(shape.variation, attention_softcap=softcap))


def gemma3_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Gemma 3 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Gemma3TextConfig  # slow to import

    from roll_sft.models.decoder_shape import own_config

    config = own_config(config, Gemma3TextConfig, architecture=_GEMMA3)
    cap, problems = config.attn_logit_softcapping, []
    if cap is not None:
        problems.append(f"attn_logit_softcapping {cap} (only null)")
    return replace(_shape(config, architecture=_GEMMA3, problems=problems), qk_norm="head")


def _shape(
    config: "Gemma2Config | Gemma3TextConfig", *, architecture: str, problems: list[str]
) -> ModelShape:
    """What both have in common."""
    from roll_sft.models.decoder_shape import decoder_shape
    from roll_sft.models.layer_kinds import kind_problems, with_kinds

    nested, types = architecture == _GEMMA3, ("default", "linear", "llama3")
    problems = [*problems, *kind_problems(config, types=types, nested=nested)]
    if config.hidden_activation != _ACTIVATION:
        problems.append(f"hidden_activation {config.hidden_activation} (only {_ACTIVATION})")
    if config.attention_bias:  # it would bias the output projection too
        problems.append("attention_bias true (only false)")
    if config.use_bidirectional_attention:
        problems.append("use_bidirectional_attention true (only false)")
    shape = decoder_shape(
        config,
        architecture=architecture,
        problems=problems,
        own=("hidden_act", "layer_types", "rope_parameters"),
    )
    variation = Variation(
        (),
        softmax_scale=config.query_pre_attn_scalar**-0.5,
        norm_adds_one=True,
        activation="gelu_tanh",
        embedding_multiplier=config.hidden_size**0.5,
        rounds_embedding_multiplier=True,
        logits_softcap=config.final_logit_softcapping,
    )
    shape = replace(shape, norm_placement="both", variation=variation)
    return with_kinds(shape, config, nested=nested)


def gemma2_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, attention, _post_attention_norm, _mlp_norms, mlp)
    return decoder_weights(shape, layer_parts=parts)


def gemma3_weights(shape: ModelShape) -> WeightTable:
    """The same with the norms of queries and keys."""
    norms = (_post_attention_norm, _mlp_norms)
    parts = (pre_attention_norm, attention, head_norms, *norms, mlp)
    return decoder_weights(shape, layer_parts=parts)


def _post_attention_norm(shape: ModelShape, *, layer: int) -> WeightTable:
    """The norm behind attention, before the residual addition."""
    name = f"model.layers.{layer}.post_attention_layernorm.weight"
    ours = f"decoder.layers.{layer}.self_attention.post_layernorm.weight"
    return {ours: SingleTensor(name, (shape.hidden_size,))}


def _mlp_norms(shape: ModelShape, *, layer: int) -> WeightTable:
    """The norms before and behind the MLP."""
    hf, ours = f"model.layers.{layer}", f"decoder.layers.{layer}"
    sizes = (shape.hidden_size,)
    return {
        f"{ours}.pre_mlp_layernorm.weight": SingleTensor(
            f"{hf}.pre_feedforward_layernorm.weight", sizes
        ),
        f"{ours}.mlp.post_layernorm.weight": SingleTensor(
            f"{hf}.post_feedforward_layernorm.weight", sizes
        ),
    }


GEMMA2 = Family(architecture=_GEMMA2, shape=gemma2_shape, weights=gemma2_weights)
GEMMA3 = Family(architecture=_GEMMA3, shape=gemma3_shape, weights=gemma3_weights)
