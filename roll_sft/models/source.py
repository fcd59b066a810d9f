"""`ModelSource`: the shape of the model to train, and the place of its weights.

The driver sends it to the workers, which open the weights where they read them. So the driver needs
neither torch nor the files.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from roll_sft.base.errors import ConfigError
from roll_sft.models.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from roll_sft.models.family import Family
    from roll_sft.models.files.hub import HubModel
    from roll_sft.models.files.safetensors_in import TensorSource


_PLACES = {  # architecture -> module of this folder, and the name in it
    "DeepseekV3ForCausalLM": ("deepseek_v3", "DEEPSEEK_V3"),
    "Gemma2ForCausalLM": ("gemma", "GEMMA2"),
    "Gemma3ForCausalLM": ("gemma", "GEMMA3"),
    "Glm4ForCausalLM": ("glm4", "GLM4"),
    "Glm4MoeForCausalLM": ("glm4_moe", "GLM4_MOE"),
    "GptOssForCausalLM": ("gpt_oss", "GPT_OSS"),
    "GraniteForCausalLM": ("granite", "GRANITE"),
    "LlamaForCausalLM": ("llama", "LLAMA"),
    "MistralForCausalLM": ("mistral", "MISTRAL"),
    "MixtralForCausalLM": ("mixtral", "MIXTRAL"),
    "Olmo2ForCausalLM": ("olmo2", "OLMO2"),
    "Olmo3ForCausalLM": ("olmo3", "OLMO3"),
    "OlmoeForCausalLM": ("olmoe", "OLMOE"),
    "Phi3ForCausalLM": ("phi3", "PHI3"),
    "Qwen2ForCausalLM": ("qwen", "QWEN2"),
    "Qwen2MoeForCausalLM": ("qwen_moe", "QWEN2_MOE"),
    "Qwen3ForCausalLM": ("qwen", "QWEN3"),
    "Qwen3MoeForCausalLM": ("qwen_moe", "QWEN3_MOE"),
    "SmolLM3ForCausalLM": ("smollm3", "SMOLLM3"),
}
ARCHITECTURES = tuple(_PLACES)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's shape and one of: a local `folder`, a model on the `hub`, random weights by `seed`.

    `opened` are weights that are open already, in place of these.
    """

    shape: ModelShape
    folder: str | None = None
    hub: "HubModel | None" = None
    seed: int | None = None
    opened: "TensorSource | None" = None

    @property
    def family(self) -> "Family":
        """The family of the model."""
        return family_named(self.shape.architecture)

    @property
    def tensors(self) -> "TensorSource":
        """The weights, opened. Raises what `SafetensorsSource` raises."""
        from roll_sft.models.files.safetensors_in import SafetensorsSource

        if self.opened is not None:
            return self.opened
        if self.seed is not None:
            from roll_sft.models.random_weights import RandomSource

            return RandomSource(
                self.family.hf_shapes(self.shape),
                seed=self.seed,
                initializer_range=self.shape.initializer_range,
            )
        if self.hub is not None:
            return self.family.opened(SafetensorsSource(self.hub.folder()))
        assert self.folder is not None, "a model without weights"
        return self.family.opened(SafetensorsSource(self.folder))


def family_named(architecture: str) -> "Family":
    """The family of one of `ARCHITECTURES`."""
    module, name = _PLACES[architecture]
    family: Family = getattr(import_module(f"roll_sft.models.families.{module}"), name)
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
