"""A strict build of `RunConfig` from a composed mapping.

Promises that every unknown key, at any level, is refused with the nearest real one, and that every
value has the type of its key; all problems are reported at once. What values may be together is in
`checks.py`.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args, get_origin

from roll_sft.base.errors import ConfigError, refuse
from roll_sft.base.text import shown
from roll_sft.config.keys import all_names, choices_of, section_of, without_null
from roll_sft.config.schema import RunConfig
from roll_sft.config.validate import value_problems

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What people call some keys -> the key; too short for a search by likeness.
ABBREVIATIONS = {
    "lr": "train.learning_rate",
    "gbs": "train.global_batch_size",
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "world_size": "parallel.num_workers",
}
# Names that a later version will give a meaning: sections, and keys of sections that exist.
RESERVED = frozenset(
    {"lora", "evaluation", "moe", "export", "cluster.max_restarts", "cluster.elastic"}
    | {"cluster.grace_s", "parallel.expert_model_parallel_size"}
    | {"parallel.expert_tensor_parallel_size", "train.loss", "train.loss_reduction"}
    | {"train.freeze", "train.num_layers_unfrozen", "train.neftune_noise_alpha"}
    | {"train.label_smoothing", "train.on_nan", "train.max_duration"}
)
# Choices that a later version will have -> what does the job today.
RESERVED_CHOICES = {
    ("model.dtype", "fp16"): "bf16, which needs no loss scaling",
    ("checkpoint.hf_export", "every_save"): "final, and `roll-sft convert` for other checkpoints",
    ("tracking.backends", "tensorboard"): "mlflow",
    ("tracking.backends", "wandb"): "mlflow",
}
SYNONYMS = {"gpu": "cuda", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def schema() -> "DictConfig":
    """Every key with its default, for Hydra to compose on.

    Without types: Hydra would stop at the first wrong one, and forgets where in a list it is.
    """
    from omegaconf import OmegaConf  # here and below: workers and GPU machines live without it

    node: DictConfig = OmegaConf.create(dataclasses.asdict(RunConfig()))
    OmegaConf.set_struct(node.data.template_kwargs, False)  # its keys are the template's
    return node


def build_config(composed: "DictConfig | dict[str, Any]") -> RunConfig:
    """The dataclasses with the values of `composed`, interpolations resolved.

    Raises one `ConfigError` with a line for each unknown key and each wrong type.
    """
    return plain_config(_resolved(composed))


def plain_config(values: dict[str, Any]) -> RunConfig:
    """`build_config` for values without interpolations; needs no OmegaConf."""
    problems: list[str] = []
    config: RunConfig = _section(RunConfig, values, full="", problems=problems)
    if problems:  # with all others that a single value can have
        refuse([*problems, *value_problems(config)])
    return config


def no_such_key(name: str) -> str:
    """The refusal of the unknown dotted key `name`, with what to write instead."""
    parts = name.split(".")
    if any(".".join(parts[:end]) in RESERVED for end in range(1, len(parts) + 1)):
        return f"{shown_key(name)}: not in this version; leave it out"
    later = [each for each in sorted(RESERVED) if each.rpartition(".")[2] == parts[-1]]
    if later:
        return f"{shown_key(name)}: no such key; `{later[0]}` is not in this version; leave it out"
    return f"{shown_key(name)}: no such key{_nearest(name)}"


def shown_key(name: str) -> str:
    """`name` for a message: as it is, or cut and quoted where it is no plausible name."""
    return name if re.fullmatch(r"[\w.\-\[\]/@]{1,200}", name) else shown(name)


def _nearest(name: str) -> str:
    """Which real key the unknown one may mean."""
    if len(name) > 200:
        return "; `--help` explains every key"
    section, _, leaf = name.rpartition(".")
    if leaf in ABBREVIATIONS:
        return f"; did you mean `{ABBREVIATIONS[leaf]}`?"
    within = re.sub(r"\[\d+\]", "", section)  # all entries of a list have the same keys
    known = list(all_names(RunConfig))
    siblings = [each for each in known if each.rpartition(".")[0] == within]
    # Where the section is right, a long one must not outweigh the part that is wrong.
    nearby = (leaf, _by_leaf(siblings)) if siblings else (name, {each: each for each in known})
    for word, candidates in (nearby, (leaf, _by_leaf(known))):
        if matches := difflib.get_close_matches(word, candidates, n=1, cutoff=0.5):
            found = candidates[matches[0]]
            is_sibling = found.startswith(f"{within}.")
            real = f"{section}{found.removeprefix(within)}" if is_sibling else found
            return f"; did you mean `{real}`?"
    return "; `--help` explains every key"


def _by_leaf(names: list[str]) -> dict[str, str]:
    """Last part of each dotted name -> the first name that ends with it."""
    return {name.rpartition(".")[2]: name for name in reversed(names)}


def _resolved(composed: "DictConfig | dict[str, Any]") -> dict[str, Any]:
    """Plain values with interpolations resolved, over all defaults, which they may refer to."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node = composed if isinstance(composed, DictConfig) else OmegaConf.create(composed)
    given: Any = OmegaConf.to_container(node, resolve=False)
    try:
        full = OmegaConf.create(_over(dataclasses.asdict(RunConfig()), given))
        resolved: Any = OmegaConf.to_container(full, resolve=True)
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None) or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name}: {reason}; mend the reference or write the value") from error
    return dict(resolved)


def _over(defaults: Any, values: Any) -> Any:
    """`values` over `defaults`, section by section; anything that is no section replaces."""
    if not (isinstance(defaults, dict) and isinstance(values, dict)):
        return values
    return {**defaults, **{name: _over(defaults.get(name), values[name]) for name in values}}


def _section(cls: Any, values: Any, *, full: str, problems: list[str]) -> Any:
    """An instance of `cls` with `values` over its defaults; adds what is wrong to `problems`."""
    kinds: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        problems.append(
            f"{full}: {shown(values)} is not a mapping; its keys are {', '.join(kinds)}"
        )
        return cls()
    built = {}
    for name, value in values.items():
        where = f"{full}.{name}" if full else str(name)
        if name not in kinds:
            inside = value if where in RESERVED and isinstance(value, dict) else ()
            problems += map(no_such_key, [f"{where}.{each}" for each in inside] or [where])
        elif section_of(kinds[name]) is None:
            try:
                built[name] = _read(kinds[name], value, where=where)
            except _UnfitError as error:
                problems.append(f"{where}: {error}")
        elif get_origin(kinds[name]) is not list:
            built[name] = _section(kinds[name], value, full=where, problems=problems)
        elif isinstance(value, list):
            inner = section_of(kinds[name])
            built[name] = [
                _section(inner, entry, full=f"{where}[{index}]", problems=problems)
                for index, entry in enumerate(value)
            ]
        else:
            wanted = "a list such as [{path: my.jsonl}]"
            problems.append(f"{where}: {shown(value)} is not {wanted}")
    return cls(**built)


class _UnfitError(Exception):
    """A value that its key does not take: the value, and what is wanted."""


def _read(kind: Any, value: Any, *, where: str) -> Any:
    """`value` as the type `kind`. Raises `_UnfitError`."""
    inner, is_optional = without_null(kind)
    if value is None and is_optional:
        return None
    if value == "None" and is_optional:
        raise _UnfitError("'None' is a text; write null")
    try:
        return _reader(inner, where=where)(value)
    except (ValueError, TypeError, OverflowError) as error:
        wanted = f"{_in_words(inner)} or null" if is_optional else _in_words(inner)
        raise _UnfitError(f"{shown(value)} is not {wanted}") from error


def _reader(kind: Any, *, where: str) -> Callable[[Any], Any]:
    """What turns a value into `kind`, or raises."""
    if get_origin(kind) is list:
        read = _reader(get_args(kind)[0], where=where)
        return lambda value: [read(each) for each in _as(list, value)]
    if get_origin(kind) is dict:
        return lambda value: {_as(str, name): each for name, each in _as(dict, value).items()}
    if choices := choices_of(kind):
        return lambda value: _choice(choices, _as(str, value), where=where)
    return {bool: _bool, int: _int, float: _float, str: _text}[kind]


def _choice(choices: tuple[str, ...], value: str, *, where: str) -> str:
    if value in choices:
        return value
    if (where, value) in RESERVED_CHOICES:
        remedy = RESERVED_CHOICES[where, value]
        raise _UnfitError(f"{value!r} is not available in this version; use {remedy}")
    word = SYNONYMS.get(value, value[:200])
    nearest = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise _UnfitError(f"{shown(value)} is not one of {', '.join(choices)}{hint}")


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} is not {kind.__name__}")
    return value


def _bool(value: Any) -> bool:
    word = str(value).lower()
    if isinstance(value, float) or word not in (*_TRUE, *_FALSE):
        raise ValueError(word)
    return word in _TRUE


def _int(value: Any) -> int:
    """A whole number, also one that is written as text or as 1e6."""
    if isinstance(value, str):
        return int(value) if _INTEGER.fullmatch(value) else _int(float(value))
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(value)
    return int(value)


def _float(value: Any) -> float:
    """A number; YAML reads 1e-8 as text."""
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def _text(value: Any) -> str:
    """Text; a number is what a reference such as ${seed} leads to."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "???":
        raise TypeError(value)
    return str(value)


def _in_words(kind: Any) -> str:
    """What `kind` takes, after "is not"."""
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return f"a list of {_in_words(inner)}"
    if choices := choices_of(kind):
        return f"one of {', '.join(choices)}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return names.get(kind, "a mapping")
