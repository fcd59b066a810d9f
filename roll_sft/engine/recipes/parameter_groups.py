"""Groups of parameters with a learning rate or a weight decay of their own, in Megatron's AdamW."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from roll_sft.config.schema import TrainConfig
from roll_sft.engine.build import named_parameters
from roll_sft.models.module_names import factor_of, matches_any, module_of
from roll_sft.models.source import ModelSource
from roll_sft.models.weight_map import hf_names

_OF_ADAPTER = re.compile(r"\.adapter\.lora_[AB]$")


def group_overrides(
    chunks: Sequence[GPTModel], source: ModelSource, train: TrainConfig
) -> dict[ParamKey, Any]:
    """What differs from the optimizer's own settings, by parameters of this rank.

    An adapter is in the group of the weight that it is beside.
    """
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(OptimizerConfig()))
    table, by_value = source.family.weights(source.shape), dict[tuple[str, float], set[int]]()
    for name, parameter in named_parameters(list(chunks)):
        # All modules of a weight are in one group, as `module_names` has checked.
        module = module_of(hf_names(table[_OF_ADAPTER.sub(".weight", name)])[0])
        factor = factor_of(module, train.learning_rate_factors)
        if factor != 1:
            by_value.setdefault(("lr_mult", factor), set()).add(id(parameter))
        if matches_any(train.weight_decay_exclude, module):
            by_value.setdefault(("wd_mult", 0.0), set()).add(id(parameter))
    for (what, value), members in by_value.items():
        overrides[ParamKey(predicate=_one_of(members, name=f"{what} {value}"))] = {what: value}
    return overrides


def _one_of(members: set[int], *, name: str) -> ParamPredicate:
    def is_member(parameter: torch.nn.Parameter) -> bool:
        return id(parameter) in members

    return ParamPredicate(name=name, fn=is_member)
