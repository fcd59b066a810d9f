"""How a model's configuration is opened, and which family it is given to."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from roll_sft.base.errors import ConfigError
from roll_sft.models.family import Family
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.source import ARCHITECTURES, family_named, family_of
from tests.models.helpers import LLAMA3_ROPE, SIZES

ON_DISK = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-7B", "/no/such/folder"])
def test_a_path_that_is_no_folder_is_refused_with_its_value(path: str):
    with pytest.raises(ConfigError, match=f"^model.path: '{path}'"):
        load_hf_config(path, trust_remote_code=False)


def test_a_folder_without_configuration_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^model\.path: .*\bconfig\.json\b"):
        load_hf_config(str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize(
    "text",
    [
        "{broken",
        json.dumps({**ON_DISK, "hidden_size": "wide"}),
        json.dumps({**ON_DISK, "model_type": "unheard_of"}),
        json.dumps({**ON_DISK, "torch_dtype": "unheard_of"}),
        json.dumps({**ON_DISK, "rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": None}}),
    ],
    ids=["json", "type", "model", "dtype", "rope"],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        load_hf_config(str(tmp_path), trust_remote_code=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], None])
def test_an_unknown_architecture_is_refused_with_what_is_supported(architectures: Any):
    supported = ", ".join(ARCHITECTURES)
    with pytest.raises(ConfigError, match=f"^model.path: .*{supported}"):
        family_of(Qwen2Config(**SIZES, architectures=architectures))


def test_each_architecture_has_one_family():
    for name in ARCHITECTURES:
        family = family_of(PreTrainedConfig(architectures=[name]))
        assert family is family_named(name)
        assert family.architecture == name


@pytest.mark.parametrize("family", map(family_named, ARCHITECTURES), ids=ARCHITECTURES)
def test_a_configuration_of_another_class_is_refused(family: Family):
    config = Qwen2Config if family.architecture.startswith("Llama") else LlamaConfig
    message = f"{family.architecture} comes with configuration class {config.__name__}; only"
    with pytest.raises(ConfigError, match=message):
        family.shape(config(**SIZES))
