"""Granite: its multipliers, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.granite import GRANITE
from tests.models.helpers import SIZES, config_from_disk

ON_DISK = {"architectures": ["GraniteForCausalLM"], "model_type": "granite", **SIZES}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 16,
}


def test_the_four_multipliers_are_read(tmp_path: Path):
    variation = GRANITE.shape(config_from_disk(tmp_path, {**ON_DISK, **MULTIPLIERS})).variation
    assert variation is not None
    found = (variation.embedding_multiplier, variation.residual_multiplier)
    assert found == (12.0, 0.22)
    assert (variation.softmax_scale, variation.logits_divisor) == (0.0078125, 16.0)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    with pytest.raises(ConfigError, match=named):
        GRANITE.shape(config_from_disk(tmp_path, {**ON_DISK, **written}))


def test_a_multiplier_that_is_not_positive_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="logits_scaling 0 must be a number above 0"):
        config_from_disk(tmp_path, {**ON_DISK, "logits_scaling": 0})
