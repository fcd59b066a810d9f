"""Which parameters of a model are not trained, by the names of Hugging Face and Megatron.

A pattern stands for every module whose name contains it, part by part between the dots: `mlp` for
the MLP of every layer, `layers.1` for layer 1 and not for layer 10, `layers.[0-3].self_attn`. Parts
may have the wildcards of file names. A module is frozen with its weight and its bias.
"""

import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from roll_sft.base.text import shown
from roll_sft.config.schema import TrainConfig
from roll_sft.models.family import Family
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import hf_names

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


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
        if any(matches(pattern, module) for pattern in train.freeze)
        or _is_below(module, shape, num_unfrozen=train.num_layers_unfrozen)
    ]


def num_trained_of(family: Family, shape: ModelShape, train: TrainConfig) -> int:
    """How many numbers are trained."""
    frozen = frozenset(frozen_modules(family, shape, train))
    shapes = family.hf_shapes(shape).items()
    return sum(math.prod(sizes) for name, sizes in shapes if module_of(name) not in frozen)


def modules_of(family: Family, shape: ModelShape) -> list[str]:
    """Hugging Face names of the modules that have weights."""
    return list(dict.fromkeys(map(module_of, family.hf_shapes(shape))))


def module_of(tensor: str) -> str:
    """The module of a weight or a bias."""
    return tensor.rpartition(".")[0]


def matches(pattern: str, module: str) -> bool:
    """Whether `pattern` is a run of the parts of the name `module`."""
    wanted, parts = pattern.split("."), module.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[start:], wanted)) for start in starts)


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


def pattern_problems(
    key: str, patterns: Iterable[str], family: Family, shape: ModelShape
) -> Iterator[str]:
    """One line for each of `patterns`, a value of `key`, that stands for no module."""
    modules = modules_of(family, shape)
    for pattern in patterns:
        if any(matches(pattern, module) for module in modules):
            continue
        if shape.tie_word_embeddings and matches(pattern, _HEAD):
            yield (
                f"{key}: {shown(pattern)} is the embedding in this model (tie_word_embeddings);"
                " write embed_tokens"
            )
            continue
        leaves = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in modules))
        yield (
            f"{key}: {shown(pattern)} is part of no module's name in {shape.architecture}; choose"
            f" of {leaves}, mlp and self_attn, or longer names such as {modules[1]}"
        )


def split_problems(
    key: str, chosen: Iterable[str], family: Family, shape: ModelShape
) -> Iterator[str]:
    """Where `key` takes only some of the modules that are one weight of Megatron's; the first."""
    taken = frozenset(chosen)
    for mapping in family.weights(shape).values():
        modules = list(map(module_of, hf_names(mapping)))
        some = [module for module in modules if module in taken]
        if some and len(some) < len(modules):
            names = ", ".join(module.rpartition(".")[2] for module in modules)
            yield (
                f"{key}: {', '.join(some)} without the rest of {names}, which are one weight here;"
                " give all of them or none"
            )
            return


def _is_below(module: str, shape: ModelShape, *, num_unfrozen: int) -> bool:
    if num_unfrozen < 0:
        return False
    parts = module.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1]) < shape.num_layers - num_unfrozen
    return module == _EMBEDDING or (module == _HEAD and num_unfrozen == 0)
