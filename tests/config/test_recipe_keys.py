"""The keys of recipes: what of them can be refused without a model."""

from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.config.build import build_config
from roll_sft.config.validate import check_config


def problems(train: dict[str, Any], **sections: Any) -> list[str]:
    values = {"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}
    try:
        check_config(build_config({**values, "train": train, **sections}))
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({"num_layers_unfrozen": -2}, ["train.num_layers_unfrozen: -2", "at least -1"]),
        (
            {"polynomial_power": 0, "lr_scheduler_type": "polynomial"},
            ["train.polynomial_power: 0.0", "above 0"],
        ),
        (
            {"cosine_cycles": 0, "lr_scheduler_type": "cosine_with_restarts"},
            ["train.cosine_cycles: 0", "at least 1"],
        ),
        (
            {"inverse_sqrt_timescale": 0, "lr_scheduler_type": "inverse_sqrt"},
            ["train.inverse_sqrt_timescale: 0", "at least 1"],
        ),
        ({"cosine_cycles": 2}, ["train.cosine_cycles: 2", "set cosine_with_restarts"]),
        (
            {"polynomial_power": 2, "lr_scheduler_type": "linear"},
            ["train.polynomial_power: 2.0", "lr_scheduler_type=linear", "set polynomial"],
        ),
        ({"lr_scheduler_type": "polynom"}, ["'polynom'", "did you mean polynomial?"]),
    ],
)
def test_a_wrong_value_is_answered_with_value_rule_and_remedy(
    train: dict[str, Any], named: list[str]
) -> None:
    (problem,) = problems(train)
    assert all(part in problem for part in named), problem


@pytest.mark.parametrize("keys", [{"freeze": ["mlp"]}, {"num_layers_unfrozen": 1}])
def test_nothing_is_frozen_beside_adapters(keys: dict[str, Any]) -> None:
    (name,) = keys
    (problem,) = problems(keys, lora={"rank": 8})
    assert problem.startswith(f"train.{name}: ")
    assert "lora.target_modules" in problem
    assert problems(keys) == []
