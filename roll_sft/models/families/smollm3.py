"""SmolLM3: Llama's layer, with layers that do not rotate queries and keys (NoPE), tied.

Refused by name, beside what no family builds: sliding windows, and biases in attention or MLP.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from roll_sft.models.family import Family, pre_norm_weights
from roll_sft.models.shape import ModelShape
from roll_sft.models.variation import LayerAttention, Variation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ARCHITECTURE = "SmolLM3ForCausalLM"


def smollm3_shape(config: "PreTrainedConfig") -> ModelShape:
    """Shape of a SmolLM3 model. Raises `ConfigError` that lists every unsupported setting."""
    from transformers import SmolLM3Config  # slow to import

    from roll_sft.models.decoder_shape import decoder_shape, own_config

    config = own_config(config, SmolLM3Config, architecture=_ARCHITECTURE)
    problems = ["use_sliding_window true (only false)"] if config.use_sliding_window else []
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key):
            problems.append(f"{key} true (only false)")
    rotates = config.no_rope_layers or []
    if len(rotates) < config.num_hidden_layers or not set(rotates) <= {0, 1}:
        problems.append(
            f"no_rope_layers {rotates} (must be 0 or 1 for each of the"
            f" {config.num_hidden_layers} layers)"
        )
    shape = decoder_shape(config, architecture=_ARCHITECTURE, problems=problems)
    num_frequencies = len(shape.rotary_inv_freq)
    layers = [LayerAttention(0, num_frequencies * rotates[i]) for i in range(shape.num_layers)]
    return replace(shape, variation=Variation(tuple(layers)))


SMOLLM3 = Family(architecture=_ARCHITECTURE, shape=smollm3_shape, weights=pre_norm_weights)
