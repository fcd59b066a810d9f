"""DeepSeek-V3: what its heads are, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.deepseek_v3 import DEEPSEEK_V3
from tests.models.helpers import SIZES, config_from_disk

ON_DISK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    **SIZES,
    "num_key_value_heads": SIZES["num_attention_heads"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "rope_theta": 1e6,
}


def test_a_head_has_rotated_columns_and_others_and_a_narrower_value(tmp_path: Path) -> None:
    shape = DEEPSEEK_V3.shape(config_from_disk(tmp_path, ON_DISK))
    assert shape.head_dim == 24
    assert len(shape.rotary_inv_freq) == 4
    assert shape.variation is not None
    assert shape.variation.is_interleaved
    assert shape.variation.softmax_scale == 24**-0.5
    assert shape.num_expert_layers == shape.num_layers - 1
    sizes = DEEPSEEK_V3.hf_shapes(shape)
    heads = shape.num_attention_heads
    assert sizes["model.layers.0.self_attn.kv_b_proj.weight"] == (heads * 28, 20)
    assert sizes["model.layers.0.self_attn.q_b_proj.weight"] == (heads * 24, 28)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"attention_bias": True}, r"attention_bias true \(only false\)"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 .*must be num_attention_heads"),
        ({"kv_lora_rank": 0}, "kv_lora_rank 0 .*from 1 to"),
        ({"q_lora_rank": 0}, "q_lora_rank 0 .*must be null, or from 1"),
        ({"qk_rope_head_dim": 7}, "an even rotary dimension"),
        ({"v_head_dim": 25}, "v_head_dim 25 .*at most the 24 columns"),
        ({"n_group": None}, "n_group null"),
        ({"n_group": 3}, r"n_group 3 \(must divide the 8 experts\)"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type linear"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        DEEPSEEK_V3.shape(config_from_disk(tmp_path, {**ON_DISK, **written}))
