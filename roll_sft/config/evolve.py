"""Changed copies of a configuration, for Python: as strict as the YAML is."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roll_sft.base.errors import refuse
from roll_sft.config.build import build_config
from roll_sft.config.composed import over
from roll_sft.config.schema import RunConfig
from roll_sft.config.validate import value_problems


def evolved(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with `changes` over it, section by section; a list replaces the earlier one.

    Raises one `ConfigError` with a line for each unknown key, wrong type and broken bound. How keys
    go together is checked when a run starts.
    """
    return checked(over(dataclasses.asdict(config), plain(changes)))


def checked(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of plain `values`, each of which keeps its bounds; `ConfigError` if not."""
    config = build_config(values)
    refuse([*value_problems(config)])
    return config


def plain(value: Any) -> Any:
    """`value` as YAML would give it: a path as text, a tuple as a list, a section as a mapping."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
