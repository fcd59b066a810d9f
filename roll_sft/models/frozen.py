"""Which parameters of a model are not trained, by the names of Hugging Face and Megatron."""

import math
from collections.abc import Iterator

from roll_sft.base.text import shown
from roll_sft.config.schema import TrainConfig
from roll_sft.models.family import Family
from roll_sft.models.module_names import (
    EMBEDDING,
    HEAD,
    matches_any,
    module_of,
    modules_of,
    pattern_problems,
    split_problems,
)
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import hf_names


def frozen_parameters(family: Family, shape: ModelShape, train: TrainConfig) -> frozenset[str]:
    """Megatron's names of the parameters that `train` freezes. A tied head is the embedding."""
    frozen = set(frozen_modules(family, shape, train))
    return frozenset(
        name
        for name, mapping in family.weights(shape).items()
        if frozen.issuperset(map(module_of, hf_names(mapping)))
    )


def frozen_modules(family: Family, shape: ModelShape, train: TrainConfig) -> list[str]:
    """Hugging Face names of the modules that `train` freezes, in the order of the model.

    `num_layers_unfrozen` freezes what trlX does: all layers but the last ones and the embedding,
    with 0 the head too.
    """
    return [
        module
        for module in modules_of(family, shape)
        if matches_any(train.freeze, module)
        or _is_below(module, shape, num_unfrozen=train.num_layers_unfrozen)
    ]


def num_trained_of(family: Family, shape: ModelShape, train: TrainConfig) -> int:
    """How many numbers are trained."""
    frozen = frozenset(frozen_modules(family, shape, train))
    shapes = family.hf_shapes(shape).items()
    return sum(math.prod(sizes) for name, sizes in shapes if module_of(name) not in frozen)


def freeze_problems(family: Family, shape: ModelShape, train: TrainConfig) -> Iterator[str]:
    """What of the model `train` cannot freeze."""
    if train.num_layers_unfrozen > shape.num_layers:
        yield (
            f"train.num_layers_unfrozen: {train.num_layers_unfrozen} exceeds the model's"
            f" {shape.num_layers} layers; give fewer, or -1 to train all"
        )
    yield from pattern_problems("train.freeze", train.freeze, family, shape)
    frozen = frozen_modules(family, shape, train)
    if len(frozen) == len(modules_of(family, shape)):
        yield f"train.freeze: {shown(train.freeze)} leaves nothing to train; freeze less"
    yield from split_problems("train.freeze", frozen, family, shape)


def _is_below(module: str, shape: ModelShape, *, num_unfrozen: int) -> bool:
    if num_unfrozen < 0:
        return False
    parts = module.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1]) < shape.num_layers - num_unfrozen
    return module == EMBEDDING or (module == HEAD and num_unfrozen == 0)
