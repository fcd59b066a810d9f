"""OLMo 3: windows, rotary embeddings by kind of layer, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.olmo3 import OLMO3
from tests.models.helpers import SIZES, config_from_disk

ON_DISK = {
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    **SIZES,
    "sliding_window": 1024,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "attention_factor": 1.25,
}


def test_three_of_four_layers_have_a_window_and_yarn_scales_the_fourth(tmp_path: Path):
    shape = OLMO3.shape(config_from_disk(tmp_path, {**ON_DISK, "rope_scaling": YARN}))
    assert (shape.qk_norm, shape.norm_placement) == ("projection", "post")
    assert shape.variation is not None
    *windowed, last = shape.variation.layers
    assert [(each.start, each.window, each.rotary_scaling) for each in windowed] == [
        (8, 1024, 1)
    ] * 3
    assert (last.start, last.window, last.rotary_scaling) == (0, None, 1.25)
    plain = [5e5 ** (-i / 8) for i in range(8)]
    assert shape.rotary_inv_freq[8:] == pytest.approx(plain)
    assert shape.rotary_inv_freq[7] == pytest.approx(plain[7] / 8)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"attention_bias": True}, "attention_bias true"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types .*linear_attention"),
        ({"sliding_window": None}, "sliding_window null"),
        (
            {"rope_scaling": {**YARN, "beta_fast": -1.0}},
            r"rope_parameters\.full_attention: beta_fast -1\.0",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    with pytest.raises(ConfigError, match=named):
        OLMO3.shape(config_from_disk(tmp_path, {**ON_DISK, **written}))
