"""The strict builder of `RunConfig` from plain values.

Every unknown key, at any level, is refused with the nearest real one, and every value gets the type
of its key. All problems are reported at once, in one `ConfigError`. Bounds and combinations of
values are checked in `validate`.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from roll_sft.base.errors import refuse
from roll_sft.base.text import shown
from roll_sft.config.fields import all_names, choices_of, one_or_list, section_of, without_null
from roll_sft.config.schema import RunConfig
from roll_sft.config.validate import value_problems

# Usual short names, too short for a search by likeness -> the key.
ABBREVIATIONS = {
    "lr": "train.learning_rate",
    "gbs": "train.global_batch_size",
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "world_size": "parallel.num_workers",
}
# Names kept for later versions: whole sections, and keys of sections that exist.
RESERVED = frozenset(
    {"moe.dispatcher", "moe.mtp_loss_coef", "parallel.expert_tensor_parallel_size"}
)
# Choices kept for later versions -> what to use today.
RESERVED_CHOICES = {
    ("model.dtype", "fp16"): "bf16, which needs no loss scaling",
    ("lora.init", "pissa"): "default or gaussian",
}
SYNONYMS = {"gpu": "cuda", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}
_TRUTH = {"true": True, "yes": True, "on": True, "1": True}
_TRUTH |= {"false": False, "no": False, "off": False, "0": False}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_PATH = re.compile(r"(path|_dir|chat_template)$")  # ends of the names of keys that hold one
_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """The dataclasses with `values` over their defaults; every value is taken as it stands.

    But for a path: one that begins with ~/ begins with the user's home. Raises one `ConfigError`
    with a line for each unknown key and each wrong type, and with what the bounds of the other
    values refuse.
    """
    problems: list[str] = []
    config: RunConfig = _section(RunConfig, values, name="", problems=problems)
    if problems:
        refuse([*problems, *value_problems(config)])
    return config


def no_such_key(name: str) -> str:
    """The line that refuses the unknown dotted key `name`, with what to write instead."""
    parts = name.split(".")
    if any(".".join(parts[:end]) in RESERVED for end in range(1, len(parts) + 1)):
        return f"{shown_key(name)}: not in this version; leave it out"
    reserved = [each for each in sorted(RESERVED) if each.rpartition(".")[2] == parts[-1]]
    if reserved:
        hint = f"`{reserved[0]}` is not in this version; leave it out"
        return f"{shown_key(name)}: no such key; {hint}"
    nearest = _nearest_key(name) if len(name) <= 200 else None
    hint = f"did you mean `{nearest}`?" if nearest else "`--help` explains every key"
    return f"{shown_key(name)}: no such key; {hint}"


def shown_key(name: str) -> str:
    """`name` for a message: as it is, or cut and quoted where it is no plausible name."""
    return name if re.fullmatch(r"[\w.\-\[\]/@]{1,200}", name) else shown(name)


def _nearest_key(name: str) -> str | None:
    """The real key that the unknown `name` is most like, if any."""
    section, _, leaf = name.rpartition(".")
    if leaf in ABBREVIATIONS:
        return ABBREVIATIONS[leaf]
    real_section = re.sub(r"\[\d+\]", "", section)  # all entries of a list have the same keys
    known = list(all_names(RunConfig))
    siblings = [each for each in known if each.rpartition(".")[0] == real_section]
    if siblings and leaf in (elsewhere := _by_leaf(known)):
        return elsewhere[leaf]
    # In a known section only the last part is wrong, so only that is compared.
    nearby = (leaf, _by_leaf(siblings)) if siblings else (name, {each: each for each in known})
    for word, candidates in (nearby, (leaf, _by_leaf(known))):
        if matches := difflib.get_close_matches(word, candidates, n=1, cutoff=0.5):
            found = candidates[matches[0]]
            is_sibling = found.startswith(f"{real_section}.")
            return f"{section}{found.removeprefix(real_section)}" if is_sibling else found
    return None


def _by_leaf(names: list[str]) -> dict[str, str]:
    """Last part of each dotted name -> the first name that ends with it."""
    return {name.rpartition(".")[2]: name for name in reversed(names)}


def _section(cls: Any, values: Any, *, name: str, problems: list[str]) -> Any:
    """An instance of the section `cls` called `name`; adds what is wrong to `problems`."""
    kinds: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(cls)}
    if not isinstance(values, Mapping):
        keys = ", ".join(kinds)
        problems.append(f"{name}: {shown(values)} is not a mapping; its keys are {keys}")
        return cls()
    built = {}
    for leaf, value in values.items():
        full = f"{name}.{leaf}" if name else str(leaf)
        if leaf not in kinds:
            problems += map(no_such_key, _unknown_names(full, value))
        elif section_of(kinds[leaf]) is not None:
            built[leaf] = _sections(kinds[leaf], value, name=full, problems=problems)
        else:
            try:
                built[leaf] = _value(kinds[leaf], value, name=full)
            except _UnfitError as error:
                problems.append(f"{full}: {error}")
    return cls(**built)


def _unknown_names(full: str, value: Any) -> list[str]:
    """The unknown key `full`; of a reserved section, each of its keys."""
    inside = value if full in RESERVED and isinstance(value, Mapping) else ()
    return [f"{full}.{each}" for each in inside] or [full]


def _sections(kind: Any, value: Any, *, name: str, problems: list[str]) -> Any:
    """A section, or the list of sections that a key of type `kind` holds."""
    cls = section_of(kind)
    if cls is kind:
        return _section(cls, value, name=name, problems=problems)
    if not isinstance(value, list):
        problems.append(f"{name}: {shown(value)} is not a list such as [{{path: my.jsonl}}]")
        return []
    return [
        entry
        if isinstance(entry, str) and cls not in get_args(kind)
        else _section(cls, entry, name=f"{name}[{index}]", problems=problems)
        for index, entry in enumerate(value)
    ]


class _UnfitError(Exception):
    """A value that its key does not take: the value, and what is wanted."""


def _value(kind: Any, value: Any, *, name: str) -> Any:
    """`value` as the type `kind`. Raises `_UnfitError`."""
    inner, is_optional = without_null(kind)
    if value is None and is_optional:
        return None
    if value == "None" and is_optional:
        raise _UnfitError("'None' is a text; write null")
    try:
        return _converted(inner, value, name=name)
    except (ValueError, TypeError, OverflowError) as error:
        wanted = f"{_in_words(inner)} or null" if is_optional else _in_words(inner)
        raise _UnfitError(f"{shown(value)} is not {wanted}") from error


def _converted(kind: Any, value: Any, *, name: str) -> Any:
    """`value` as the type `kind`, which is not optional; raises where it is none."""
    if (either := one_or_list(kind)) is not None:
        kind = either[isinstance(value, list)]
        if value in choices_of(either[1]):
            raise _UnfitError(f"{shown(value)} is one of a list; write [{value}]")
    origin = get_origin(kind) or kind
    if kind == list[str] and isinstance(value, str):  # one text for a list of one
        value = [value]
    if origin in (list, dict) and not isinstance(value, origin):
        raise TypeError(f"{type(value).__name__} is not {origin.__name__}")
    if origin is list:
        return [_converted(get_args(kind)[0], each, name=name) for each in value]
    if origin is dict:
        if not all(isinstance(each, str) for each in value):
            raise TypeError("a name that is not text")
        return dict(value)
    if choices := choices_of(kind):
        return _choice(choices, value, name=name)
    if kind is str and _PATH.search(name) and str(value).startswith("~/"):
        return f"{Path.home()}{value[1:]}"
    convert = {bool: _bool, int: _int, float: _float, str: _text}[kind]
    return convert(value)


def _choice(choices: tuple[str, ...], value: Any, *, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    if value in choices:
        return value
    if (name, value) in RESERVED_CHOICES:
        remedy = RESERVED_CHOICES[name, value]
        raise _UnfitError(f"{value!r} is not available in this version; use {remedy}")
    word = SYNONYMS.get(value, value[:200])
    nearest = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise _UnfitError(f"{shown(value)} is not one of {', '.join(choices)}{hint}")


def _bool(value: Any) -> bool:
    word = str(value).lower()
    if isinstance(value, float) or word not in _TRUTH:
        raise ValueError(word)
    return _TRUTH[word]


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
    """Text; a reference such as ${seed} leads to a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "???":
        raise TypeError(value)
    return str(value)


def _in_words(kind: Any) -> str:
    """What the type `kind` takes, in words that follow "is not"."""
    if (either := one_or_list(kind)) is not None:
        return " or ".join(map(_in_words, either))
    if get_origin(kind) is list:
        return f"a list of {_in_words(get_args(kind)[0])}"
    if choices := choices_of(kind):
        return f"one of {', '.join(choices)}"
    return _TYPE_NAMES.get(kind, "a mapping")
