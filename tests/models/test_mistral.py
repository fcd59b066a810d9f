"""Mistral: its sliding window, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.models.families.mistral import MISTRAL
from tests.models.helpers import SIZES, config_from_disk

ON_DISK = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **SIZES}


@pytest.mark.parametrize(
    ("written", "expected"),
    [(None, None), (512, {512: 4}), (4095, {4095: 4}), (4096, None), (131072, None)],
)
def test_a_window_is_stated_where_a_sample_could_outgrow_it(
    tmp_path: Path, written: int | None, expected: dict[int, int] | None
):
    config = config_from_disk(tmp_path, {**ON_DISK, "sliding_window": written})
    variation = MISTRAL.shape(config).variation
    assert (None if variation is None else variation.windows) == expected


def test_an_absent_window_is_the_one_of_the_first_release(tmp_path: Path):
    config = config_from_disk(tmp_path, {**ON_DISK, "max_position_embeddings": 32768})
    variation = MISTRAL.shape(config).variation
    assert variation is not None
    assert variation.windows == {4096: 4}


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "configuration class MinistralConfig"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"attention_dropout": 0.1}, r"attention_dropout 0\.1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, written: dict[str, Any], named: str
):
    config = config_from_disk(tmp_path, {**ON_DISK, **written})
    with pytest.raises(ConfigError, match=named):
        MISTRAL.shape(config)
