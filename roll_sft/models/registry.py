"""Which architectures there are, and how a model's configuration is opened."""

from pathlib import Path
from typing import TYPE_CHECKING

from roll_sft.base.errors import ConfigError
from roll_sft.models.config_file import value_problems
from roll_sft.models.family import Family
from roll_sft.models.llama import LLAMA
from roll_sft.models.mistral import MISTRAL
from roll_sft.models.olmo2 import OLMO2
from roll_sft.models.qwen import QWEN2, QWEN3
from roll_sft.models.safetensors_in import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3)


def load_hf_config(path: str, *, trust_remote_code: bool) -> "PreTrainedConfig":
    """Configuration of the model in the local folder `path`; never touches the network.

    Raises `ConfigError` if the folder or its config.json is missing, or if transformers refuses it.
    """
    if not Path(path).is_dir():
        raise ConfigError(
            f"model.path: '{path}' is neither a folder nor a hub id such as Qwen/Qwen2.5-7B; "
            "give the local folder of a model, or its name on the hub"
        )
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"model.path: '{path}' has no config.json; give the folder of a Hugging Face model"
        )
    if problems := value_problems(read_json(Path(path) / "config.json")):
        raise ConfigError(
            f"model.path: '{path}/config.json': {'; '.join(problems)}; correct the file, or"
            " download it again"
        )
    from transformers import AutoConfig  # slow: paid by whoever opens a model, not on import

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # transformers and what it calls raise many kinds for a file that is not as they expect.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"model.path: transformers cannot read '{path}/config.json': {reason}; correct the file"
        ) from error
    return config


def family_of(config: "PreTrainedConfig") -> Family:
    """The family that implements `config`; `ConfigError` lists what there is if none does."""
    architectures = config.architectures or []
    for family in FAMILIES:
        if architectures == [family.architecture]:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise ConfigError(
        f"model.path: config.json names architectures {architectures}; this version supports one "
        f"of: {supported}; choose such a model"
    )
