"""GLM-4: its norms and rotation, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.glm4 import GLM4
from tests.models.helpers import SIZES, config_from_disk

ON_DISK = {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    **SIZES,
    "head_dim": 16,
    "pad_token_id": 0,
}


def test_half_of_each_head_is_rotated_and_norms_surround_attention_and_mlp(tmp_path: Path):
    shape = GLM4.shape(config_from_disk(tmp_path, {**ON_DISK, "attention_bias": False}))
    assert (shape.norm_placement, shape.qkv_bias) == ("both", False)
    assert shape.variation is not None
    assert shape.variation.is_interleaved
    assert {(layer.start, layer.stop) for layer in shape.variation.layers} == {(0, 4)}
    names = [
        hf.removeprefix("model.layers.3.")
        for name, word in GLM4.weights(shape).items()
        for hf in word.hf_shapes
        if ".3." in name
    ]
    assert names == [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "post_self_attn_layernorm.weight",
        "post_mlp_layernorm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    ]


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"partial_rotary_factor": 0.2}, r"partial_rotary_factor 0\.2"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    with pytest.raises(ConfigError, match=named):
        GLM4.shape(config_from_disk(tmp_path, {**ON_DISK, **written}))
