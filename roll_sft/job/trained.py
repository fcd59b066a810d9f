"""A run that is no plain full fine-tune: adapters, frozen weights, another loss.

What it is checked for and remembered by before a worker exists, and how much it trains.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roll_sft.base.errors import refuse
from roll_sft.base.layout import ParallelLayout
from roll_sft.config.schema import RunConfig, TrainConfig, layout_of
from roll_sft.data.steps.objective import step_scale
from roll_sft.data.tokens.cache import TokenSet
from roll_sft.job.lora import base_facts, check_lora, lora_facts
from roll_sft.models.adapters.adapter import num_trained_by
from roll_sft.models.family import Family
from roll_sft.models.frozen import (
    freeze_problems,
    frozen_modules,
    frozen_parameters,
    num_trained_of,
)
from roll_sft.models.module_names import EMBEDDING, group_problems, module_of
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import ModelSource, family_named


def check_trained(config: RunConfig, family: Family, shape: ModelShape) -> None:
    """Raise `ConfigError` that lists what the model does not have of what is to be trained."""
    if config.train.has_groups:
        refuse(list(group_problems(family, shape, config.train)))
    if config.lora.rank:
        check_lora(config, family, shape)
    if config.train.freezes:
        refuse(list(freeze_problems(family, shape, config.train)))


def recipe_facts(config: RunConfig, source: ModelSource) -> dict[str, Any]:
    """What a run that resumes must have in common, and an export is made of; plain values."""
    train, facts = config.train, dict[str, Any]()
    if config.lora.rank:
        facts["lora"] = lora_facts(config, source)
    if train.freezes:
        frozen = frozen_modules(source.family, source.shape, train)
        facts["frozen"] = {
            "freeze": train.freeze,
            "num_layers_unfrozen": train.num_layers_unfrozen,
            "modules": hashlib.sha256("\n".join(frozen).encode()).hexdigest()[:16],
            **base_facts(config, source),
        }
    return facts


def scale_of(train: TrainConfig, tokens: TokenSet) -> Callable[[NDArray[np.int32]], float]:
    """The `loss_scale` of a step with given samples of `tokens`."""
    supervised, weights = tokens.supervised, tokens.weights

    def scale(ids: NDArray[np.int32]) -> float:
        return step_scale(train, supervised[ids], None if weights is None else weights[ids])

    return scale


def num_trained(config: RunConfig, shape: ModelShape) -> int:
    """How many numbers the run trains."""
    if config.lora.rank:
        return num_trained_by(config.lora, shape)
    return num_trained_of(family_named(shape.architecture), shape, config.train)


def share_of_flops(config: RunConfig, shape: ModelShape) -> float:
    """Products of a step with weights, over those of a step that trains them all.

    Of the three products of a weight, one that is frozen lacks its gradient's; and that of its
    inputs' where nothing before it is trained.
    """
    if config.lora.rank:
        return 2 / 3
    family = family_named(shape.architecture)
    frozen = frozenset(frozen_modules(family, shape, config.train))
    products, largest, is_needed = 0, 0, False
    for name, sizes in family.hf_shapes(shape).items():
        module, size = module_of(name), math.prod(sizes)
        if module != EMBEDDING and len(sizes) == 2:
            products += size * (1 + (module not in frozen) + is_needed)
            largest += 3 * size
        is_needed = is_needed or module not in frozen
    return products / largest


def stage_parameters(config: RunConfig, shape: ModelShape, *, stage: int) -> tuple[float, float]:
    """Of a rank of pipeline stage `stage`: the numbers that it trains, and those of adapters.

    Layers are taken to be spread evenly, as everywhere in the estimate.
    """
    if config.lora.rank:
        from roll_sft.job.lora_memory import adapter_parameters

        adapters, saved = adapter_parameters(config, shape, stage=stage)
        return adapters + saved, adapters
    layout, family, trained = layout_of(config.parallel), family_named(shape.architecture), 0
    frozen = frozen_parameters(family, shape, config.train)
    for name, mapping in family.weights(shape).items():
        if name not in frozen and _stage_of(name, shape, layout) == stage:
            trained += sum(map(math.prod, mapping.hf_shapes.values()))
    return trained / layout.tensor_size, 0.0


def _stage_of(name: str, shape: ModelShape, layout: ParallelLayout) -> int:
    """The pipeline stage of Megatron's parameter `name`."""
    last = layout.pipeline_size - 1
    prefix, _, rest = name.partition("decoder.layers.")
    if rest:
        chunks = layout.pipeline_size * layout.virtual_size
        return int(rest.partition(".")[0]) * chunks // shape.num_layers % layout.pipeline_size
    return 0 if prefix.startswith("embedding") else last
