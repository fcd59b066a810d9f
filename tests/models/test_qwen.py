"""Qwen2 and Qwen3: biases and norms, files of both generations, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.qwen import QWEN2, QWEN3
from roll_sft.models.source import family_of
from tests.models.helpers import SIZES, config_from_disk, tiny_model

ON_DISK = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}


def test_qwen2_adds_biases_to_query_key_and_value():
    shape = QWEN2.shape(Qwen2Config(**SIZES))
    names = list(QWEN2.weights(shape))
    assert [name for name in names if ".3." in name] == [
        "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
        "decoder.layers.3.self_attention.linear_qkv.bias",
        "decoder.layers.3.self_attention.linear_proj.weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.layers.3.mlp.linear_fc2.weight",
    ]


def test_qwen3_norms_each_query_and_key_head():
    shape = QWEN3.shape(Qwen3Config(**SIZES, head_dim=24))
    assert (shape.qk_norm, shape.norm_placement, shape.qkv_bias) == ("head", "pre", False)
    table = QWEN3.weights(shape)
    assert [name for name in table if ".3." in name] == [
        "decoder.layers.3.input_layernorm.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
        "decoder.layers.3.self_attention.linear_proj.weight",
        "decoder.layers.3.self_attention.q_layernorm.weight",
        "decoder.layers.3.self_attention.k_layernorm.weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
        "decoder.layers.3.mlp.linear_fc1.weight",
        "decoder.layers.3.mlp.linear_fc2.weight",
    ]


def test_a_head_dimension_of_its_own_is_kept():
    model = tiny_model(Qwen2Config(**SIZES, head_dim=24))
    shape = QWEN2.shape(model.config)
    assert shape.head_dim == 24
    assert QWEN2.hf_shapes(shape) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert len(shape.rotary_inv_freq) == 12


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=["transformers 4", "transformers 4 with null", "transformers 5"],
)
def test_files_of_both_generations_give_transformers_own_frequencies(
    tmp_path: Path, written: dict[str, Any]
):
    config = config_from_disk(tmp_path, {**ON_DISK, **written})
    shape = family_of(config).shape(config)
    frequencies = torch.tensor(shape.rotary_inv_freq)
    assert torch.equal(frequencies, Qwen2RotaryEmbedding(config).inv_freq)
    assert frequencies[1].item() == pytest.approx(5e5 ** (-1 / 8))
    assert (shape.num_layers, shape.head_dim, shape.qkv_bias) == (4, 16, True)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window true"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
        ({"rope_parameters": {"rope_type": "new", "rope_theta": 1e6}}, "rope_type new"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one flat"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_theta": None}, "rope_theta None"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 6}, "must divide hidden_size 64"),
        ({"head_dim": 3}, "head_dim 3"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    config = config_from_disk(tmp_path, {**ON_DISK, **written})
    with pytest.raises(ConfigError, match=named):
        family_of(config).shape(config)


def test_all_refusals_come_in_one_message():
    config = Qwen2Config(**{**SIZES, "hidden_act": "gelu", "attention_dropout": 0.5})
    with pytest.raises(ConfigError, match=r"hidden_act gelu.*; attention_dropout 0\.5"):
        QWEN2.shape(config)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"attention_bias": True}, "attention_bias true"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
        ({"attention_dropout": 0.1}, r"attention_dropout 0\.1"),
    ],
)
def test_what_qwen3_may_ask_for_in_vain_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    on_disk = {**ON_DISK, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    config = config_from_disk(tmp_path, {**on_disk, **written})
    with pytest.raises(ConfigError, match=named):
        family_of(config).shape(config)
