"""The section `evaluation`: what of it can be refused without a model."""

from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.config.build import build_config
from roll_sft.config.evaluation import PromptSource
from roll_sft.config.validate import check_config


def problems(evaluation: dict[str, Any]) -> list[str]:
    run = {"model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}
    try:
        check_config(build_config({**run, "evaluation": evaluation}))
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("evaluation", "named"),
    [
        ({"prompts": [" "]}, ["evaluation.prompts[0]: empty"]),
        ({"prompts": ["a", "b\x00"]}, ["evaluation.prompts[1]", "control characters"]),
        ({"prompts": [{"name": "x"}]}, ["evaluation.prompts[0].path: missing"]),
        ({"prompts": [{"path": "p", "weight": 2}]}, ["evaluation.prompts[0].weight: no such key"]),
        ({"prompts": "a"}, ["evaluation.prompts: 'a' is not a list"]),
        ({"prompts": ["a"], "max_new_tokens": 0}, ["evaluation.max_new_tokens: 0", "at least 1"]),
        ({"prompts": ["a"], "temperature": -1}, ["evaluation.temperature: -1", "at least 0"]),
        ({"prompts": ["a"], "temperature": 1, "top_p": 0}, ["evaluation.top_p: 0", "above 0"]),
        ({"prompts": ["a"], "top_p": 0.9}, ["evaluation.top_p: 0.9", "temperature=0"]),
        ({"prompts": ["a"], "top_k": 5}, ["evaluation.top_k: 5", "temperature=0"]),
        ({"prompts": ["a"], "deadline_s": 0}, ["evaluation.deadline_s: 0", "above 0"]),
        ({"temperature": 1}, ["evaluation.temperature: 1", "without evaluation.prompts"]),
        (
            {"prompts": ["a"], "metric_fn": "score"},
            ["evaluation.metric_fn: 'score'", "module.name"],
        ),
        (
            {"prompts": ["a"], "metric_fn": "os.system"},
            ["evaluation.metric_fn: 'os.system'", "(roll_sft_metrics)", "add os there"],
        ),
        (
            {"prompts": ["a"], "metric_fn": "mine_too.f", "metric_modules": ["mine"]},
            ["evaluation.metric_fn: 'mine_too.f'", "(mine)"],
        ),
    ],
)
def test_a_wrong_value_is_answered_with_value_rule_and_remedy(
    evaluation: dict[str, Any], named: list[str]
) -> None:
    (problem,) = problems(evaluation)
    assert all(part in problem for part in named), problem


def test_texts_and_sources_stand_side_by_side() -> None:
    long = "Tell me\n\tabout " + "x" * 400
    prompts = [long, {"path": "p.jsonl", "samples": 3}]
    built = build_config({"evaluation": {"prompts": prompts}}).evaluation
    assert built.prompts == [long, PromptSource(path="p.jsonl", samples=3)]
    allowed = {"metric_fn": "mine.deep.f", "metric_modules": ["mine"]}
    assert problems({"prompts": prompts, **allowed}) == []
