"""Hostile values in config.json: refused by key, value and rule, or harmless; never a traceback."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 400,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_theta": 10000.0,
    "rope_scaling": LLAMA3_ROPE,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
HOSTILE = (
    None, True, 0, -1, 0.5, 2**40, 10**30, 1e308, -1e-300, math.nan, math.inf, "x", "__class__", "",
    [], [1], {}, {"a": None},
)  # fmt: skip


def shape_of(folder: Path, content: dict[str, Any]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(content))
    config = load_hf_config(str(folder), trust_remote_code=False)
    return family_of(config).shape(config)


def test_a_plain_model_is_read(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, LLAMA)
    assert (shape.num_layers, shape.head_dim, len(shape.rotary_inv_freq)) == (2, 8, 4)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("num_attention_heads", 0, "an integer from 1 to 4096"),
        ("hidden_size", 2**40, "an integer from 1 to 131072"),
        ("num_hidden_layers", -2, "an integer from 1"),
        ("num_hidden_layers", 2.0, "an integer from 1"),
        ("rms_norm_eps", math.nan, "a number above 0 to 1"),
        ("rope_theta", 0, "a number above 0"),
        ("rope_theta", "x", "a number above 0"),
        ("torch_dtype", "__class__", "must be float32, bfloat16 or float16"),
        ("tie_word_embeddings", "yes", "must be true or false"),
        ("eos_token_id", "</s>", "must be the id of a token"),
        ("rope_scaling", "llama3", "must be an object or null"),
        ("max_window_layers", -math.inf, "-inf must be a finite number"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(
    tmp_path: Path, key: str, value: object, rule: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        shape_of(tmp_path, {**LLAMA, key: value})
    message = str(refused.value)
    assert message.startswith(f"model.path: '{tmp_path}/config.json': {key} ")
    assert rule in message
    assert message.endswith("correct the file, or download it again")


def test_all_values_out_of_range_are_named_at_once(tmp_path: Path) -> None:
    wrong = {"num_attention_heads": 0, "vocab_size": "many", "rms_norm_eps": -1}
    with pytest.raises(ConfigError) as refused:
        shape_of(tmp_path, {**LLAMA, **wrong})
    assert all(key in str(refused.value) for key in wrong)


@pytest.mark.parametrize("key", [*LLAMA, *(f"rope_scaling.{key}" for key in LLAMA3_ROPE)])
def test_a_hostile_value_is_refused_or_gives_a_model_of_finite_size(
    tmp_path: Path, key: str
) -> None:
    for value in HOSTILE:
        section, _, leaf = key.rpartition(".")
        changed = {**LLAMA[section], leaf: value} if section else value
        try:
            shape = shape_of(tmp_path, {**LLAMA, section or key: changed})
        except ConfigError:
            continue
        numbers = (shape.rms_norm_eps, shape.initializer_range, *shape.rotary_inv_freq)
        assert all(math.isfinite(number) and number > 0 for number in numbers), (key, value)
        assert 0 < shape.num_parameters < 10**15, (key, value)


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "[" * 100_000, '{"a":', "9" * 5000, "\x00"])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_hf_config(str(tmp_path), trust_remote_code=False)
