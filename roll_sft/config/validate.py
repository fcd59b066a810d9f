"""Checks of configuration values, each alone and some together, which need neither GPU nor model.

All problems are reported at once, one line each: value, rule, remedy. The bounds of a single value
stand beside its key in `schema`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from roll_sft.base.errors import refuse
from roll_sft.base.text import is_hostile, shown
from roll_sft.config.debug import fault_problems
from roll_sft.config.evaluation import evaluation_problems
from roll_sft.config.export import export_problems
from roll_sft.config.keeping import keeping_problems
from roll_sft.config.layout_checks import backend_problems
from roll_sft.config.lora import lora_problems
from roll_sft.config.recipes import recipe_problems
from roll_sft.config.schema import DataConfig, RunConfig, SourceConfig, source_name

LARGEST_INTEGER = 2**31 - 1  # of every key without a bound of its own
PROSE = "evaluation.prompts"  # whose texts are neither names nor paths; it has checks of its own
LONGEST_NAME = 255  # bytes of one part of a path, on every file system that is in use


def check_config(config: RunConfig) -> None:
    """Raise `ConfigError` with one line per value that cannot run, if there is any.

    `layout_checks` checks combinations of degrees, and `job.model` the limits of the model.
    """
    refuse([*value_problems(config), *_other_problems(config)])


def value_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """One line for each single value that breaks a bound of its key."""
    for item in dataclasses.fields(section):
        value, where = getattr(section, item.name), f"{prefix}{item.name}"
        for index, each in enumerate(value if isinstance(value, list) else [value]):
            place = f"{where}[{index}]" if isinstance(value, list) else where
            if dataclasses.is_dataclass(each):
                yield from value_problems(each, f"{place}.")
            elif isinstance(each, str) and where != PROSE and (problem := _text_problem(each)):
                yield f"{place}: {problem}"
            elif isinstance(each, int | float) and (problem := _bound(each, item.metadata)):
                yield f"{place}: {each} must be {problem}"


def _bound(value: float, about: Mapping[str, Any]) -> str | None:
    """The bound that `value` breaks, if any; see `keys.key`."""
    at_most = about["at_most"]
    if about["above"] is not None and not value > about["above"]:
        return f"above {about['above']:g}"
    if about["at_least"] is not None and not value >= about["at_least"]:
        return f"at least {about['at_least']:g}"
    if not math.isfinite(value):
        return "finite"
    if at_most is None and isinstance(value, int):
        at_most = LARGEST_INTEGER
    if at_most is not None and value > at_most:
        return f"at most {at_most:.10g}"
    return None


def _text_problem(text: str) -> str | None:
    """Why `text` can be neither a name nor a path; None if it can."""
    if any(letter == "\t" or is_hostile(letter) for letter in text):
        return f"{shown(text)} has control characters or bytes that are not UTF-8; rename it"
    if "://" not in text and any(len(part.encode()) > LONGEST_NAME for part in text.split("/")):
        return f"{shown(text)} has a part of more than {LONGEST_NAME} bytes; shorten it"
    return None


def _other_problems(config: RunConfig) -> Iterator[str]:
    train, data = config.train, config.data
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(train, key) >= 1:
            yield f"train.{key}: {getattr(train, key)} must be below 1"
    if train.min_learning_rate > train.learning_rate:
        yield (
            f"train.min_learning_rate: {train.min_learning_rate} exceeds train.learning_rate"
            f" {train.learning_rate}; lower it"
        )
    if config.model.path is None:
        yield "model.path: missing; give a local folder with config.json and a tokenizer"
    if not data.train:
        yield "data.train: empty; give a list such as data.train=[{path: my.jsonl}]"
    if train.micro_batch_tokens is not None and train.micro_batch_tokens < data.sequence_length:
        yield (
            f"train.micro_batch_tokens: {train.micro_batch_tokens} is below data.sequence_length"
            f" {data.sequence_length}, so the longest sample would not fit; raise it"
        )
    if not re.fullmatch(r"[\w][\w.\-]*", config.run_name):
        name = shown(config.run_name)
        yield f"run_name: {name} must be letters, digits, dot, dash and underscore"
    yield from _checkpoint_problems(config)
    yield from backend_problems(config)
    yield from lora_problems(config)
    yield from evaluation_problems(config)
    yield from recipe_problems(config)
    yield from fault_problems(config)
    yield from export_problems(config)
    yield from keeping_problems(config)
    yield from _source_problems(data)


def _checkpoint_problems(config: RunConfig) -> Iterator[str]:
    checkpoint, sets = config.checkpoint, [source_name(each) for each in config.data.validation]
    if checkpoint.keep_best is not None and checkpoint.keep_best not in sets:
        known = ", ".join(sets) or "none is given"
        yield (
            f"checkpoint.keep_best: {shown(checkpoint.keep_best)} is no validation set ({known});"
            " name one of data.validation"
        )
    if checkpoint.keep_best is not None and checkpoint.keep_last is None:
        yield (
            "checkpoint.keep_best: without checkpoint.keep_last every checkpoint is kept; set it,"
            " to 2 or more"
        )


def _source_problems(data: DataConfig) -> Iterator[str]:
    for group in ("train", "validation"):
        names: set[str] = set()
        for index, source in enumerate(getattr(data, group)):
            where = f"data.{group}[{index}]"
            if not source.path:
                yield f"{where}.path: missing; give a file, a folder or a hub dataset"
                continue
            yield from _share_problems(source, where=where, is_trained=group == "train")
            name = source_name(source)
            if name in names:
                yield f"{where}.name: {shown(name)} is used twice; give each source its own name"
            names.add(name)


def _share_problems(source: SourceConfig, *, where: str, is_trained: bool) -> Iterator[str]:
    """Problems of the keys that say how many samples an epoch draws from a source."""
    if source.weight != 1.0 and source.samples is not None:
        yield (
            f"{where}: weight={source.weight} and samples={source.samples} both say how much an"
            " epoch draws of it; set one of them"
        )
    if not is_trained and (source.weight != 1.0 or source.samples is not None):
        key = "weight" if source.weight != 1.0 else "samples"
        yield (
            f"{where}.{key}: {getattr(source, key)} is for data.train; a validation set is always"
            " used whole, so leave it out"
        )
