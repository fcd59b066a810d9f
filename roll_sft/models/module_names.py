"""Patterns of Hugging Face module names, which a recipe gives for parts of a model.

A pattern stands for every module whose name contains it, part by part between the dots: `mlp` for
the MLP of every layer, `layers.1` for layer 1 and not for layer 10, `layers.[0-3].self_attn`. Parts
may have the wildcards of file names. `embeddings` is the embedding and the head. A module is meant
with its weight and its bias.
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from roll_sft.base.text import shown
from roll_sft.config.schema import TrainConfig
from roll_sft.models.family import Family
from roll_sft.models.shape import ModelShape
from roll_sft.models.weight_map import hf_names

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
_BOTH = "embeddings"


def matches(pattern: str, module: str) -> bool:
    """Whether `pattern` is a run of the parts of the name `module`."""
    if pattern == _BOTH:
        return module in (EMBEDDING, HEAD)
    wanted, parts = pattern.split("."), module.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(fnmatchcase, parts[start:], wanted)) for start in starts)


def matches_any(patterns: Iterable[str], module: str) -> bool:
    """Whether `module` is meant by one of `patterns`."""
    return any(matches(pattern, module) for pattern in patterns)


def factor_of(module: str, factors: Mapping[str, float]) -> float:
    """The value of the last pattern of `factors` that means `module`; 1 without one."""
    found = [value for pattern, value in factors.items() if matches(pattern, module)]
    return float(found[-1]) if found else 1.0


def modules_of(family: Family, shape: ModelShape) -> list[str]:
    """Hugging Face names of the modules that have weights, in the order of the model."""
    return list(dict.fromkeys(map(module_of, family.hf_shapes(shape))))


def module_of(tensor: str) -> str:
    """The module of a weight or a bias."""
    return tensor.rpartition(".")[0]


def group_problems(family: Family, shape: ModelShape, train: TrainConfig) -> Iterator[str]:
    """What of the model has no learning rate, or no weight decay, of its own as `train` wants."""
    modules = modules_of(family, shape)
    key, factors = "train.learning_rate_factors", train.learning_rate_factors
    yield from pattern_problems(key, factors, family, shape)
    by_module = {module: factor_of(module, factors) for module in modules}
    for value in dict.fromkeys(by_module.values()):
        chosen = [module for module in modules if by_module[module] == value]
        if problem := next(split_problems(key, chosen, family, shape), None):
            yield problem
            break
    key, excluded = "train.weight_decay_exclude", train.weight_decay_exclude
    yield from pattern_problems(key, excluded, family, shape)
    chosen = [module for module in modules if matches_any(excluded, module)]
    yield from split_problems(key, chosen, family, shape)


def pattern_problems(
    key: str, patterns: Iterable[str], family: Family, shape: ModelShape
) -> Iterator[str]:
    """One line for each of `patterns`, a value of `key`, that means no module."""
    modules = modules_of(family, shape)
    for pattern in patterns:
        if any(matches(pattern, module) for module in modules):
            continue
        if shape.tie_word_embeddings and matches(pattern, HEAD):
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
