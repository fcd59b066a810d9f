"""Which modules a pattern stands for, and what of a model cannot be frozen."""

import math
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from roll_sft.config.schema import TrainConfig
from roll_sft.models.family import Family
from roll_sft.models.frozen import (
    freeze_problems,
    frozen_modules,
    frozen_parameters,
    num_trained_of,
)
from roll_sft.models.module_names import factor_of, group_problems, matches, modules_of
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_of
from tests import parity

LAYER = "model.layers.10.self_attn.q_proj"


def model(kind: str = "qwen2") -> tuple[Family, ModelShape]:
    config = parity.model_config(kind, num_layers=4)
    config.architectures = [AutoModelForCausalLM.from_config(config).__class__.__name__]
    family = family_of(config)
    return family, family.shape(config)


@pytest.mark.parametrize(
    ("pattern", "is_matched"),
    [
        ("q_proj", True),
        ("self_attn", True),
        ("layers.10", True),
        ("layers.1", False),
        ("layers.1[0-3].self_attn", True),
        ("model.layers.*.self_attn.?_proj", True),
        ("*", True),
        ("layers.self_attn", False),
        ("proj", False),
        ("10.self_attn.q_proj.weight", False),
    ],
)
def test_a_pattern_is_a_run_of_the_parts_of_a_name(pattern: str, is_matched: bool) -> None:
    assert matches(pattern, LAYER) == is_matched


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-tied"])
@pytest.mark.parametrize("num_unfrozen", [-1, 0, 1, 3, 4])
def test_unfrozen_layers_are_those_of_trlx(kind: str, num_unfrozen: int) -> None:
    """Its rule, applied to transformers' own module tree."""
    theirs = AutoModelForCausalLM.from_config(parity.model_config(kind, num_layers=4))
    if num_unfrozen >= 0:
        for layer in list(theirs.model.layers)[: 4 - num_unfrozen]:
            layer.requires_grad_(False)
        theirs.get_input_embeddings().requires_grad_(False)
        if num_unfrozen == 0:
            theirs.get_output_embeddings().requires_grad_(False)
    train, (family, shape) = TrainConfig(num_layers_unfrozen=num_unfrozen), model(kind)
    frozen = set(frozen_modules(family, shape, train))
    found = {
        name.rpartition(".")[0]: each.requires_grad for name, each in theirs.named_parameters()
    }
    assert frozen == {name for name, is_trained in found.items() if not is_trained}
    trained = (each for each in theirs.parameters() if each.requires_grad)
    assert num_trained_of(family, shape, train) == sum(math.prod(each.shape) for each in trained)


def test_a_tied_head_is_frozen_with_its_embedding() -> None:
    frozen = frozen_parameters(*model("qwen2-tied"), TrainConfig(freeze=["embed_tokens"]))
    assert frozen == {"embedding.word_embeddings.weight", "output_layer.weight"}


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        (
            "qwen2",
            {"learning_rate_factors": {"wte": 0.1}},
            ["train.learning_rate_factors: 'wte'", "embed_tokens"],
        ),
        (
            "qwen2",
            {"learning_rate_factors": {"mlp": 2, "up_proj": 3}},
            ["train.learning_rate_factors", "gate_proj, up_proj", "all of them"],
        ),
        ("qwen2", {"weight_decay_exclude": ["k_proj"]}, ["train.weight_decay_exclude", "q_proj"]),
        ("qwen2-tied", {"weight_decay_exclude": ["lm_head"]}, ["'lm_head'", "embed_tokens"]),
    ],
)
def test_groups_that_the_model_does_not_have_are_refused_with_what_it_has(
    kind: str, keys: dict[str, Any], named: list[str]
) -> None:
    (problem,) = group_problems(*model(kind), TrainConfig(**keys))
    assert all(part in problem for part in named), problem


def test_the_last_pattern_that_fits_counts() -> None:
    factors = {"mlp": 2.0, "layers.1": 3.0, "embeddings": 0.5}
    found = {
        module: factor_of(module, factors)
        for module in modules_of(*model())
        if module.endswith(("layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "norm", "lm_head"))
    }
    assert found["model.layers.0.mlp.up_proj"] == 2.0
    assert found["model.layers.1.mlp.up_proj"] == 3.0
    assert found["lm_head"] == 0.5
    assert found["model.norm"] == 1.0


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        ("qwen2", {"freeze": ["attn"]}, ["train.freeze: 'attn'", "Qwen2ForCausalLM", "q_proj"]),
        ("qwen2", {"freeze": ["layers.4"]}, ["train.freeze: 'layers.4'", "model.layers.0"]),
        ("qwen2", {"freeze": ["*"]}, ["train.freeze: ['*']", "nothing to train"]),
        (
            "qwen2",
            {"freeze": ["layers.1.*.q_proj"]},
            ["model.layers.1.self_attn.q_proj", "q_proj, k_proj, v_proj", "all of them or none"],
        ),
        ("qwen2", {"freeze": ["up_proj"]}, ["up_proj", "gate_proj, up_proj", "all of them"]),
        ("qwen2-tied", {"freeze": ["lm_head"]}, ["train.freeze: 'lm_head'", "embed_tokens"]),
        ("qwen2", {"num_layers_unfrozen": 5}, ["train.num_layers_unfrozen: 5", "4 layers", "-1"]),
    ],
)
def test_what_cannot_be_frozen_is_refused_with_what_can(
    kind: str, keys: dict[str, Any], named: list[str]
) -> None:
    (problem,) = freeze_problems(*model(kind), TrainConfig(**keys))
    assert all(part in problem for part in named), problem
