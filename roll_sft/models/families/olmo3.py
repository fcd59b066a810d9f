"""OLMo 3 dense models, tied and untied: OLMo 2's layer, three of four with a sliding window.

Each kind of layer has a rotary embedding of its own; yarn scales that of the layers without window.
Refused by name, beside what no family builds: biases in attention, and other kinds of layers.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from roll_sft.models.families.olmo2 import olmo2_weights
from roll_sft.models.family import Family
from roll_sft.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ARCHITECTURE = "Olmo3ForCausalLM"


def olmo3_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of an OLMo 3 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import Olmo3Config  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config
    from roll_sft.models.layer_kinds import kind_problems, with_kinds

    config = own_config(config, Olmo3Config, architecture=_ARCHITECTURE)
    types = "default", "llama3", "linear", "yarn"
    problems = kind_problems(config, types=types, nested=True)
    if config.attention_bias:  # it would bias the output projection too
        problems.append("attention_bias true (only false)")
    shape = decoder_shape(
        config,
        architecture=_ARCHITECTURE,
        problems=problems,
        own=("layer_types", "rope_parameters"),
    )
    shape = replace(shape, qk_norm="projection", norm_placement="post")
    return with_kinds(shape, config, nested=True)


OLMO3 = Family(architecture=_ARCHITECTURE, shape=olmo3_shape, weights=olmo2_weights)
