"""The supported architectures; the module of a family is imported when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING

from roll_sft.base.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from roll_sft.models.family import Family

_PLACES = {  # architecture -> module of this folder, and the name in it
    "LlamaForCausalLM": ("llama", "LLAMA"),
    "MistralForCausalLM": ("mistral", "MISTRAL"),
    "Olmo2ForCausalLM": ("olmo2", "OLMO2"),
    "Qwen2ForCausalLM": ("qwen", "QWEN2"),
    "Qwen3ForCausalLM": ("qwen", "QWEN3"),
}
ARCHITECTURES = tuple(_PLACES)


def family_named(architecture: str) -> "Family":
    """The family of one of `ARCHITECTURES`."""
    module, name = _PLACES[architecture]
    family: Family = getattr(import_module(f"roll_sft.models.{module}"), name)
    return family


def family_of(config: "PreTrainedConfig") -> "Family":
    """The family that implements `config`; raises `ConfigError` that lists the supported ones."""
    architectures = config.architectures or []
    if len(architectures) == 1 and architectures[0] in _PLACES:
        return family_named(architectures[0])
    raise ConfigError(
        f"model.path: config.json names architectures {architectures}; this version supports one "
        f"of: {', '.join(ARCHITECTURES)}; choose such a model"
    )
