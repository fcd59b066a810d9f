"""MODEL_OR_RUN -> the files that answer: a model, an adapter and its base, template variables.

A run's folder gives its `hf/`, or else its `adapter/`. Nothing is loaded here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from roll_sft.base.errors import ConfigError
from roll_sft.base.text import shown
from roll_sft.checkpoint.manifest import MANIFEST
from roll_sft.models.adapters.peft_folder import CONFIG as ADAPTER_CONFIG
from roll_sft.models.files.json_files import read_object
from roll_sft.models.files.model_folder import local_model
from roll_sft.training.run_folder import ADAPTER, CHECKPOINTS, MODEL


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model lies: a whole one in `folder`, or `adapter` on top of the one in `folder`."""

    folder: Path
    adapter: Path | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # that the run trained with


def find_model(given: str, *, base: str | None = None) -> Place:
    """The model that `given` names: a model's folder, a hub id, an adapter's or a run's folder.

    `base` is where the base of an adapter lies now; by default it is where the adapter says.
    Raises `ConfigError` for anything else, and what `hub.fetch` raises.
    """
    folder = Path(given)
    if (folder / MANIFEST).is_file():
        raise ConfigError(
            f"{given}: is a checkpoint; make a model of it first:"
            f" roll-sft convert {given} --output my_model"
        )
    if (folder / "config.json").is_file():
        return Place(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder, base)
    if (folder / CHECKPOINTS).is_dir() or (folder / "steps.jsonl").is_file():
        return _of_run(folder, base)
    if folder.exists():
        raise ConfigError(
            f"{given}: has neither config.json, as a model, nor {ADAPTER_CONFIG}, as an adapter,"
            f" nor {MODEL}/, as a run that is finished; give one of these folders, or a hub id"
        )
    path, hub = local_model(given, with_weights=True)
    if hub is None:
        raise ConfigError(
            f"{given}: there is no such folder, and it is no hub id such as Qwen/Qwen2.5-0.5B; give"
            " the folder of a model, an adapter or a run"
        )
    return Place(Path(path))


def _of_run(folder: Path, base: str | None) -> Place:
    variables = _template_kwargs(folder / "config.yaml")
    if (folder / MODEL / "config.json").is_file():
        return Place(folder / MODEL, template_kwargs=variables)
    if (folder / ADAPTER / ADAPTER_CONFIG).is_file():
        found = _adapter(folder / ADAPTER, base)
        return Place(found.folder, found.adapter, variables)
    steps = sorted((folder / CHECKPOINTS).glob("step_*"))
    remedy = f"roll-sft convert {steps[-1]} --output my_model" if steps else "let the run finish"
    raise ConfigError(f"{folder}: this run has exported no model; first {remedy}")


def _adapter(folder: Path, base: str | None) -> Place:
    named = base or read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{folder / ADAPTER_CONFIG}: names no base model; give it with --base")
    path, _ = local_model(named, with_weights=True)
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"{folder}: its base model {shown(named)} is not there; give its folder or hub id with"
            " --base"
        )
    return Place(Path(path), adapter=folder)


def _template_kwargs(path: Path) -> Mapping[str, Any]:
    """`data.template_kwargs` of a run's config.yaml; nothing where it is not readable."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    data = content.get("data") if isinstance(content, dict) else None
    found = data.get("template_kwargs") if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}
