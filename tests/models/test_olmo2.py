"""OLMo 2: its norms, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.olmo2 import OLMO2
from tests.models.helpers import SIZES, MemorySource, config_from_disk

ON_DISK = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", **SIZES}


def test_norms_follow_attention_and_mlp_and_nothing_is_normed_before_them(tmp_path: Path):
    shape = OLMO2.shape(config_from_disk(tmp_path, ON_DISK))
    assert (shape.qk_norm, shape.norm_placement, shape.qkv_bias) == ("projection", "post", False)
    table = OLMO2.weights(shape)
    assert {name: list(word.hf_shapes) for name, word in table.items() if ".3." in name} == {
        "decoder.layers.3.self_attention.linear_qkv.weight": [
            "model.layers.3.self_attn.q_proj.weight",
            "model.layers.3.self_attn.k_proj.weight",
            "model.layers.3.self_attn.v_proj.weight",
        ],
        "decoder.layers.3.self_attention.linear_proj.weight": [
            "model.layers.3.self_attn.o_proj.weight"
        ],
        "decoder.layers.3.self_attention.q_layernorm.weight": [
            "model.layers.3.self_attn.q_norm.weight"
        ],
        "decoder.layers.3.self_attention.k_layernorm.weight": [
            "model.layers.3.self_attn.k_norm.weight"
        ],
        "decoder.layers.3.self_attention.post_layernorm.weight": [
            "model.layers.3.post_attention_layernorm.weight"
        ],
        "decoder.layers.3.mlp.linear_fc1.weight": [
            "model.layers.3.mlp.gate_proj.weight",
            "model.layers.3.mlp.up_proj.weight",
        ],
        "decoder.layers.3.mlp.linear_fc2.weight": ["model.layers.3.mlp.down_proj.weight"],
        "decoder.layers.3.mlp.post_layernorm.weight": [
            "model.layers.3.post_feedforward_layernorm.weight"
        ],
    }


def test_each_rank_norms_the_heads_that_it_projects(tmp_path: Path):
    shape = OLMO2.shape(config_from_disk(tmp_path, ON_DISK))
    hf, ours = "model.layers.0.self_attn", "decoder.layers.0.self_attention"
    query, key = torch.arange(64.0), torch.arange(100.0, 132.0)  # each row and weight its number
    tensors = {f"{hf}.q_norm.weight": query, f"{hf}.k_norm.weight": key}
    for name, numbers in (("q", query), ("k", key), ("v", key + 100)):
        tensors[f"{hf}.{name}_proj.weight"] = numbers[:, None].expand(-1, 64)
    table, source = OLMO2.weights(shape), MemorySource(tensors)
    for rank in range(2):
        qkv, query_norm, key_norm = (
            table[f"{ours}.{name}.weight"].local(source, tensor_rank=rank, tensor_size=2)
            for name in ("linear_qkv", "q_layernorm", "k_layernorm")
        )
        assert torch.equal(qkv[:, 0], torch.cat([query_norm, key_norm, key_norm + 100]))


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"attention_bias": True}, "attention_bias true"),
        ({"clip_qkv": 8.0}, r"clip_qkv 8\.0"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"attention_dropout": 0.1}, r"attention_dropout 0\.1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type linear"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    config = config_from_disk(tmp_path, {**ON_DISK, **written})
    with pytest.raises(ConfigError, match=named):
        OLMO2.shape(config)


def test_a_clip_that_is_null_is_none(tmp_path: Path):
    OLMO2.shape(config_from_disk(tmp_path, {**ON_DISK, "clip_qkv": None}))
