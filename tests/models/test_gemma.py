"""Gemma 2 and 3: norms, windows, bases and scales, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.gemma import GEMMA2, GEMMA3
from tests.models.helpers import SIZES, config_from_disk

GEMMA2_ON_DISK = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **SIZES}
GEMMA3_ON_DISK = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **SIZES}


def test_norms_stand_before_and_behind_attention_and_mlp(tmp_path: Path):
    shape = GEMMA3.shape(config_from_disk(tmp_path, GEMMA3_ON_DISK))
    assert (shape.qk_norm, shape.norm_placement) == ("head", "both")
    table = GEMMA3.weights(shape)
    prefixes = "decoder.layers.3.", "model.layers.3."
    found = {
        name.removeprefix(prefixes[0]): [hf.removeprefix(prefixes[1]) for hf in word.hf_shapes]
        for name, word in table.items()
        if "norm" in name and name.startswith(prefixes[0])
    }
    assert found == {
        "input_layernorm.weight": ["input_layernorm.weight"],
        "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
        "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
        "self_attention.post_layernorm.weight": ["post_attention_layernorm.weight"],
        "pre_mlp_layernorm.weight": ["pre_feedforward_layernorm.weight"],
        "mlp.post_layernorm.weight": ["post_feedforward_layernorm.weight"],
    }


def test_gemma_2_alternates_and_caps_attention_and_logits(tmp_path: Path):
    written = {"sliding_window": 512, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 40.0}
    shape = GEMMA2.shape(config_from_disk(tmp_path, {**GEMMA2_ON_DISK, **written}))
    variation = shape.variation
    assert variation is not None
    assert [layer.window for layer in variation.layers] == [512, None, 512, None]
    assert {(layer.start, layer.stop) for layer in variation.layers} == {
        (0, 128)
    }  # of heads of 256
    assert (variation.attention_softcap, variation.logits_softcap) == (40.0, 30.0)
    assert (variation.softmax_scale, variation.embedding_multiplier) == (0.125, 8.0)
    assert (variation.norm_adds_one, variation.activation) == (True, "gelu_tanh")


def test_gemma_3_has_two_bases_and_scales_that_of_layers_without_window(tmp_path: Path):
    written = {
        "sliding_window": 512,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "head_dim": 16,
    }
    shape = GEMMA3.shape(config_from_disk(tmp_path, {**GEMMA3_ON_DISK, **written}))
    assert shape.variation is not None
    places = [(layer.start, layer.stop, layer.window) for layer in shape.variation.layers]
    assert places == [(8, 16, 512), (0, 8, None)] * 2
    wanted = [1e6 ** (-i / 8) / 8 for i in range(8)] + [1e4 ** (-i / 8) for i in range(8)]
    assert shape.rotary_inv_freq == pytest.approx(wanted)
    assert (shape.variation.attention_softcap, shape.variation.logits_softcap) == (None, None)


REFUSED = [
    ({"attention_bias": True}, "attention_bias true"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention true"),
    ({"hidden_activation": "gelu"}, "hidden_activation gelu"),
    ({"layer_types": ["chunked_attention"] * 4}, "layer_types .*chunked_attention"),
]


@pytest.mark.parametrize(
    ("written", "named"),
    [*REFUSED, ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type yarn")],
)
def test_what_gemma_2_does_not_build_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    with pytest.raises(ConfigError, match=named):
        GEMMA2.shape(config_from_disk(tmp_path, {**GEMMA2_ON_DISK, **written}))


@pytest.mark.parametrize(
    ("written", "named"),
    [
        *REFUSED,
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0"),
        (
            {
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
                "sliding_window_pattern": 2,
            },
            r"rope_parameters\.full_attention: rope_type dynamic",
        ),
    ],
)
def test_what_gemma_3_does_not_build_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    with pytest.raises(ConfigError, match=named):
        GEMMA3.shape(config_from_disk(tmp_path, {**GEMMA3_ON_DISK, **written}))


def test_a_soft_cap_that_is_not_positive_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="final_logit_softcapping 0 must be a number above 0"):
        config_from_disk(tmp_path, {**GEMMA2_ON_DISK, "final_logit_softcapping": 0})
