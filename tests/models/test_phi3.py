"""Phi-3: fused projections, partial and scaled rotation, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.phi3 import PHI3
from tests.families import LONG, SHORT
from tests.models.helpers import SIZES, MemorySource, config_from_disk

ON_DISK = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **SIZES, "pad_token_id": 0}
LONGROPE = {
    "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 1024,
}


def test_query_key_and_value_are_cut_out_of_one_tensor(tmp_path: Path):
    shape = PHI3.shape(config_from_disk(tmp_path, ON_DISK))
    table = PHI3.weights(shape)
    names = [list(word.hf_shapes) for name, word in table.items() if ".3." in name]
    assert [name.removeprefix("model.layers.3.") for (name,) in names] == [
        "input_layernorm.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    ]
    mapping = table["decoder.layers.0.self_attention.linear_qkv.weight"]
    rows = torch.arange(128.0)[:, None].expand(-1, 64)  # 64 of queries, 32 of keys and of values
    source = MemorySource({"model.layers.0.self_attn.qkv_proj.weight": rows})
    second = mapping.local(source, tensor_rank=1, tensor_size=2)[:, 0]
    assert torch.equal(second, torch.tensor([*range(32, 64), *range(80, 96), *range(112, 128)]))


def test_longrope_rotates_samples_up_to_the_original_length(tmp_path: Path):
    shape = PHI3.shape(config_from_disk(tmp_path, {**ON_DISK, **LONGROPE}))
    assert shape.variation is not None
    (layer,) = set(shape.variation.layers)
    assert (layer.start, layer.stop, len(shape.rotary_inv_freq)) == (0, 6, 6)
    assert layer.rotary_scaling == pytest.approx((1 + 2 / 10) ** 0.5)  # log(4096 / 1024) of 1024
    assert list(shape.variation.problems(1024)) == []
    (problem,) = shape.variation.problems(1025)
    assert "data.sequence_length: 1025" in problem
    assert "original_max_position_embeddings 1024" in problem


@pytest.mark.parametrize(("written", "expected"), [(None, {}), (2047, {2047: 4}), (4096, {})])
def test_a_window_is_stated_where_a_sample_could_outgrow_it(
    tmp_path: Path, written: int | None, expected: dict[int, int]
):
    config = config_from_disk(tmp_path, {**ON_DISK, "sliding_window": written})
    variation = PHI3.shape(config).variation
    assert variation is not None
    assert variation.windows == expected


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"resid_pdrop": 0.1}, r"resid_pdrop 0\.1"),
        ({"embd_pdrop": 0.1}, r"embd_pdrop 0\.1"),
        ({"partial_rotary_factor": 0.2}, r"partial_rotary_factor 0\.2"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        (
            {**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], "short_factor": [0.0] * 6}},
            r"short_factor \[0\.0",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    config = config_from_disk(tmp_path, {**ON_DISK, **written})
    with pytest.raises(ConfigError, match=named):
        PHI3.shape(config)
