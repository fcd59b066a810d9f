"""Mixtral models: Mistral's layer with experts in place of the MLP.

Refused by name, beside what no family builds: noise on the router's inputs.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from roll_sft.models.families.mistral import with_window
from roll_sft.models.family import (
    Family,
    attention,
    decoder_weights,
    pre_attention_norm,
    pre_mlp_norm,
)
from roll_sft.models.moe.expert_weights import ExpertNames, router_and_experts
from roll_sft.models.moe.experts import ExpertShape
from roll_sft.models.moe.fused_experts import split_experts
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from roll_sft.models.decoder_shape import DecoderConfig

_ARCHITECTURE = "MixtralForCausalLM"
_NAMES = ExpertNames(module="block_sparse_moe", gate="w1", up="w3", down="w2")


def mixtral_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Mixtral model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import MixtralConfig  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config
    from roll_sft.models.moe.expert_config import expert_problems

    config = own_config(config, MixtralConfig, architecture=_ARCHITECTURE)
    problems = expert_problems(config, num_experts=config.num_local_experts)
    if config.router_jitter_noise:
        problems.append(f"router_jitter_noise {config.router_jitter_noise} (only 0)")
    shape = decoder_shape(
        cast("DecoderConfig", config), architecture=_ARCHITECTURE, problems=problems
    )
    experts = ExpertShape(
        num_experts=config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
        ffn_hidden_size=config.intermediate_size,
        is_normalized=True,
        aux_loss_coef=config.router_aux_loss_coef,
    )
    return with_window(replace(shape, experts=experts), config.sliding_window)


def mixtral_weights(shape: ModelShape) -> WeightTable:
    """Every parameter of Megatron's GPTModel for `shape`, with the layer's global index."""
    experts = partial(router_and_experts, names=_NAMES)
    parts = (pre_attention_norm, attention, pre_mlp_norm, experts)
    return decoder_weights(shape, layer_parts=parts)


MIXTRAL = Family(
    architecture=_ARCHITECTURE,
    shape=mixtral_shape,
    weights=mixtral_weights,
    opened=partial(split_experts, names=_NAMES),
)
