"""Llama: rotary scaling, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.llama import LLAMA
from tests.models.helpers import LLAMA3_ROPE, SIZES, config_from_disk

ON_DISK = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}


def scaled(**changes: Any) -> dict[str, Any]:
    """Llama 3's scaling as files of transformers 4 write it."""
    return {"rope_scaling": {**LLAMA3_ROPE, **changes}}


def test_megatron_names_carry_the_global_layer_index(tmp_path: Path):
    names = list(LLAMA.weights(LLAMA.shape(config_from_disk(tmp_path, ON_DISK))))
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    assert [name for name in names if ".3." in name] == [
        "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
        "decoder.layers.3.self_attention.linear_proj.weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.layers.3.mlp.linear_fc2.weight",
    ]


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 1e4},
        scaled(original_max_position_embeddings=8192),
        scaled(original_max_position_embeddings=32),
        scaled(factor=32.0, high_freq_factor=2.0),
        {"rope_parameters": LLAMA3_ROPE},
        {**scaled(), "original_max_position_embeddings": 64},
    ],
    ids=["Llama 2", "Llama 3.1", "short", "other factors", "transformers 5", "length outside"],
)
def test_frequencies_are_transformers_own(tmp_path: Path, written: dict[str, Any]):
    config = config_from_disk(tmp_path, {**ON_DISK, **written})
    shape = LLAMA.shape(config)
    assert torch.equal(torch.tensor(shape.rotary_inv_freq), LlamaRotaryEmbedding(config).inv_freq)


def test_the_original_length_changes_the_frequencies(tmp_path: Path):
    shapes = [
        LLAMA.shape(
            config_from_disk(
                tmp_path, {**ON_DISK, **scaled(original_max_position_embeddings=length)}
            )
        )
        for length in (32, 64, 8192)
    ]
    assert len({shape.rotary_inv_freq for shape in shapes}) == 3


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"attention_dropout": 0.1}, r"attention_dropout 0\.1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 3}, "head_dim 3"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
        (scaled(attention_factor=1.2), r"attention_factor 1\.2"),
        (scaled(partial_rotary_factor=0.5), r"partial_rotary_factor 0\.5"),
        (scaled(factor="8"), "factor '8'"),
        (scaled(factor=0), "factor 0"),
        (scaled(original_max_position_embeddings=0), "original_max_position_embeddings 0"),
        (scaled(high_freq_factor=1.0), r"high_freq_factor 1\.0 .must exceed low_freq_factor 1\.0"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    with pytest.raises(ConfigError, match=named):
        LLAMA.shape(config_from_disk(tmp_path, {**ON_DISK, **written}))
