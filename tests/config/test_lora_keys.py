"""The section `lora`: what of it can be refused without a model."""

from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.config.build import build_config
from roll_sft.config.validate import check_config


def problems(lora: dict[str, Any], **checkpoint: Any) -> list[str]:
    config = build_config(
        {
            "model": {"path": "m"},
            "data": {"train": [{"path": "a.jsonl"}]},
            "lora": lora,
            "checkpoint": checkpoint,
        }
    )
    try:
        check_config(config)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"rank": -1}, ["lora.rank: -1", "at least 0"]),
        ({"rank": 8, "alpha": 0}, ["lora.alpha: 0", "at least 1"]),
        ({"rank": 8, "dropout": 1.0}, ["lora.dropout: 1.0", "below 1"]),
        ({"rank": 8, "dropout": -0.1}, ["lora.dropout: -0.1", "at least 0"]),
        ({"rank": 8, "modules_to_save": ["norm"]}, ["'norm'", "embed_tokens, lm_head"]),
        ({"rank": 8, "target_modules": []}, ["lora.target_modules", "all-linear"]),
        ({"adapter_path": "adapter"}, ["lora.adapter_path: 'adapter'", "set lora.rank"]),
        ({"target_modules": ["q_proj"]}, ["lora.target_modules", "q_proj", "set lora.rank"]),
        ({"alpha": 32}, ["lora.alpha: 32", "set lora.rank"]),
        ({"quantize_base": "nf4"}, ["lora.quantize_base: nf4", "whole model", "set lora.rank"]),
    ],
)
def test_a_wrong_value_is_answered_with_value_rule_and_remedy(
    lora: dict[str, Any], named: list[str]
) -> None:
    (problem,) = problems(lora)
    assert all(part in problem for part in named), problem


@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_an_export_of_adapters_needs_adapters(export: str) -> None:
    (problem,) = problems({}, hf_export=export)
    assert export in problem
    assert "checkpoint.hf_export=final" in problem
    assert problems({"rank": 8}, hf_export=export) == []


def test_dropout_knows_what_is_recomputed() -> None:
    config = {
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.jsonl"}]},
        "lora": {"rank": 8, "dropout": 0.1},
        "train": {"recompute": ["mlp"]},
    }
    check_config(build_config(config))
    parallel = {"num_workers": 2, "pipeline_model_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"lora\.dropout: 0\.1 on 2 pipeline stages"):
        check_config(build_config({**config, "parallel": parallel}))


def test_one_name_stands_for_a_list_of_one() -> None:
    assert build_config({"lora": {"target_modules": "q_proj"}}).lora.target_modules == ["q_proj"]
