"""Llama 2, 3 and later dense text models, tied and untied.

Llama 3's rotary scaling may have any original length.
Refused by name, beside what no family builds: biases in attention or MLP, and weights cut for
`pretraining_tp`.
"""

from typing import TYPE_CHECKING

from roll_sft.models.family import Family, pre_norm_weights
from roll_sft.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ARCHITECTURE = "LlamaForCausalLM"


def llama_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a Llama model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import LlamaConfig  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config

    config = own_config(config, LlamaConfig, architecture=_ARCHITECTURE)
    problems = []
    if config.attention_bias:  # it would bias the output projection too
        problems.append("attention_bias true (only false)")
    if config.mlp_bias:
        problems.append("mlp_bias true (only false)")
    if config.pretraining_tp not in (None, 1):
        problems.append(f"pretraining_tp {config.pretraining_tp} (only 1)")
    return decoder_shape(config, architecture=_ARCHITECTURE, problems=problems)


LLAMA = Family(architecture=_ARCHITECTURE, shape=llama_shape, weights=pre_norm_weights)
