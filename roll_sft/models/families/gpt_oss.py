"""gpt-oss models: attention with sinks, every other layer with a window, and experts with biases.

Refused by name, beside what no family builds: attention without biases, and quantized weights other
than MXFP4, which `models/moe/mxfp4.py` reads.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from roll_sft.base.text import shown
from roll_sft.models.family import (
    Family,
    attention,
    decoder_weights,
    pre_attention_norm,
    pre_mlp_norm,
)
from roll_sft.models.moe.expert_weights import experts_of
from roll_sft.models.moe.experts import ExpertShape
from roll_sft.models.moe.mxfp4 import is_mxfp4, unpacked
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import Variation
from roll_sft.models.weight_map import SingleTensor, WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from roll_sft.models.decoder_shape import DecoderConfig
    from roll_sft.models.layer_kinds import KindConfig

_ARCHITECTURE = "GptOssForCausalLM"


def gpt_oss_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a gpt-oss model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import GptOssConfig  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config
    from roll_sft.models.layer_kinds import kind_problems, with_kinds
    from roll_sft.models.moe.expert_config import expert_problems

    config = own_config(config, GptOssConfig, architecture=_ARCHITECTURE)
    kinds = cast("KindConfig", config)
    problems = expert_problems(config, num_experts=config.num_local_experts)
    problems += kind_problems(kinds, types=("default", "yarn"), nested=False)
    if not config.attention_bias:
        problems.append("attention_bias false (only true)")
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is not None and not is_mxfp4(quantization):
        problems.append(f"quantization_config {shown(quantization)} (only of quant_method mxfp4)")
    shape = decoder_shape(
        cast("DecoderConfig", config),
        architecture=_ARCHITECTURE,
        problems=problems,
        own=("layer_types", "rope_parameters", "quantization_config"),
    )
    experts = ExpertShape(
        num_experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        ffn_hidden_size=config.intermediate_size,
        is_normalized=True,  # as a softmax over the chosen
        aux_loss_coef=config.router_aux_loss_coef,
        has_biases=True,
        # Releases of transformers whose configuration has neither write these into the code.
        gate_limit=getattr(config, "swiglu_limit", 7.0),
        gate_slope=getattr(config, "swiglu_alpha", 1.702),
    )
    variation = Variation((), has_sinks=True, has_output_bias=True)
    shape = replace(shape, qkv_bias=True, experts=experts, variation=variation)
    return with_kinds(shape, kinds, nested=False)


def gpt_oss_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    parts = (pre_attention_norm, attention, _biases_and_sinks, pre_mlp_norm, _router_and_experts)
    return decoder_weights(shape, layer_parts=parts)


def _biases_and_sinks(shape: ModelShape, *, layer: int) -> WeightTable:
    hf, ours = f"model.layers.{layer}.self_attn", f"decoder.layers.{layer}.self_attention"
    heads = (shape.num_attention_heads,)
    return {
        f"{ours}.linear_proj.bias": SingleTensor(f"{hf}.o_proj.bias", (shape.hidden_size,)),
        f"{ours}.core_attention.softmax_offset": SingleTensor(f"{hf}.sinks", heads, split_dim=0),
    }


def _router_and_experts(shape: ModelShape, *, layer: int) -> WeightTable:
    """The router [E, D], gate and up projection in turn [E, D, 2F], down projection [E, F, D].

    Expert ranks cut their first dim.
    """
    experts, hf = experts_of(shape), f"model.layers.{layer}.mlp"
    number, hidden, width = experts.num_experts, shape.hidden_size, experts.ffn_hidden_size
    shapes = {
        "gate_up.weight": ("gate_up_proj", (number, hidden, 2 * width)),
        "gate_up.bias": ("gate_up_proj_bias", (number, 2 * width)),
        "down.weight": ("down_proj", (number, width, hidden)),
        "down.bias": ("down_proj_bias", (number, hidden)),
    }
    ours = f"decoder.layers.{layer}.mlp"
    table: WeightTable = {
        f"{ours}.router.weight": SingleTensor(f"{hf}.router.weight", (number, hidden)),
        f"{ours}.router.bias": SingleTensor(f"{hf}.router.bias", (number,)),
    }
    for name, (theirs, size) in shapes.items():
        mapping = SingleTensor(f"{hf}.experts.{theirs}", size, split_dim=0)
        table[f"{ours}.experts.{name}"] = mapping
    return table


GPT_OSS = Family(
    architecture=_ARCHITECTURE, shape=gpt_oss_shape, weights=gpt_oss_weights, opened=unpacked
)
