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
        ({"label_smoothing": 1.0}, ["train.label_smoothing: 1.0", "below 1"]),
        ({"label_smoothing": -0.1}, ["train.label_smoothing: -0.1", "at least 0"]),
        ({"z_loss_coef": -1}, ["train.z_loss_coef: -1.0", "at least 0"]),
        ({"neftune_noise_alpha": -5}, ["train.neftune_noise_alpha: -5.0", "at least 0"]),
        ({"loss": "mean"}, ["train.loss: 'mean'", "token_mean, sample_mean"]),
        ({"loss_reduction": "none"}, ["train.loss_reduction: 'none'", "mean, sum"]),
        (
            {"loss": "sample_mean", "loss_reduction": "sum"},
            ["train.loss_reduction: sum", "train.loss=sample_mean", "set one of them"],
        ),
        (
            {"learning_rate_factors": {"mlp": 0}},
            ["train.learning_rate_factors: 0 of 'mlp'", "above 0", "train.freeze"],
        ),
        (
            {"learning_rate_factors": {"mlp": "high"}},
            ["train.learning_rate_factors: 'high' of 'mlp'", "must be a number"],
        ),
        (
            {"early_stopping": "held_out", "eval_steps": 5},
            ["train.early_stopping: 'held_out' is no validation set", "none is given"],
        ),
        (
            {"early_stopping_patience": 5},
            ["train.early_stopping_patience: 5", "name a validation set"],
        ),
        ({"lr_scheduler_type": "polynom"}, ["'polynom'", "did you mean polynomial?"]),
    ],
)
def test_a_wrong_value_is_answered_with_value_rule_and_remedy(
    train: dict[str, Any], named: list[str]
) -> None:
    (problem,) = problems(train)
    assert all(part in problem for part in named), problem


def test_early_stopping_needs_evaluations() -> None:
    data = {"train": [{"path": "a.jsonl"}], "validation": [{"path": "b.jsonl", "name": "b"}]}
    (problem,) = problems({"early_stopping": "b"}, data=data)
    assert problem == "train.early_stopping: 'b' is evaluated at the end only; set train.eval_steps"
    assert problems({"early_stopping": "b", "eval_steps": 5}, data=data) == []


@pytest.mark.parametrize("keys", [{"freeze": ["mlp"]}, {"num_layers_unfrozen": 1}])
def test_nothing_is_frozen_beside_adapters(keys: dict[str, Any]) -> None:
    (name,) = keys
    (problem,) = problems(keys, lora={"rank": 8})
    assert problem.startswith(f"train.{name}: ")
    assert "lora.target_modules" in problem
    assert problems(keys) == []
