"""SmolLM3: its layers without rotation, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.smollm3 import SMOLLM3
from tests.models.helpers import SIZES, config_from_disk

ON_DISK = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    **SIZES,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("written", "rotates"),
    [
        ({}, [1, 1, 1, 0]),
        ({"no_rope_layer_interval": 2}, [1, 0, 1, 0]),
        ({"no_rope_layers": [0, 1, 1, 0]}, [0, 1, 1, 0]),
    ],
)
def test_layers_that_do_not_rotate(tmp_path: Path, written: dict[str, Any], rotates: list[int]):
    variation = SMOLLM3.shape(config_from_disk(tmp_path, {**ON_DISK, **written})).variation
    assert variation is not None
    assert [layer.stop - layer.start for layer in variation.layers] == [
        8 * each for each in rotates
    ]


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window true"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        (
            {"no_rope_layers": [1, 1], "layer_types": ["full_attention"] * 4},
            r"no_rope_layers \[1, 1\]",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    with pytest.raises(ConfigError, match=named):
        SMOLLM3.shape(config_from_disk(tmp_path, {**ON_DISK, **written}))


def test_a_list_of_other_values_is_refused_before_transformers_reads_it(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no_rope_layers \[2, 1\] must be a list of 0 and 1"):
        config_from_disk(tmp_path, {**ON_DISK, "no_rope_layers": [2, 1]})
