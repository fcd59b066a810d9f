"""PEFT's adapter folders: what they say, and whether they fit a model and a configuration.

Read without peft. Only LoRA as this version builds it is taken; anything else that a folder asks
for is refused by the name of its key.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from roll_sft.base.errors import CheckpointError, ConfigError, refuse
from roll_sft.base.text import shown
from roll_sft.config.lora import SAVED_MODULES, LoraConfig
from roll_sft.models.files.json_files import read_json
from roll_sft.models.files.safetensors_in import FLOATS, Shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.json"  # ours: the fingerprint of the base model
PEFT_VERSION = "0.21.0"
# The fields of peft 0.21 with its defaults, but for those that `config_of` fills.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
# They change nothing about weights that were trained; layers show in the names of the tensors.
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
)  # fmt: skip
_READ = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save",
    "init_lora_weights", "peft_type",
)  # fmt: skip


def config_of(lora: LoraConfig, *, targets: list[str], base: str) -> dict[str, Any]:
    """The content of adapter_config.json, with every field of peft 0.21.

    `targets` are names of projections, `base` is the path or hub id of the base model.
    """
    values = {
        **_DEFAULTS,
        "base_model_name_or_path": base,
        "init_lora_weights": True if lora.init == "default" else lora.init,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": lora.modules_to_save or None,
        "r": lora.rank,
        "target_modules": targets,
        "use_rslora": lora.use_rslora,
    }
    return dict(sorted(values.items()))


def read_lora(folder: Path, *, key: str) -> LoraConfig:
    """What the adapter in `folder` is, but for its projections, which its tensors tell.

    `key` names the folder in messages. Raises `ConfigError` that lists all that is not supported.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{key}: '{folder}' has no {CONFIG}; give a folder as PEFT's save_pretrained makes it"
        )
    values = read_json(folder / CONFIG)
    refuse([f"{key}: '{folder}': {problem}" for problem in _unsupported(values)])
    return LoraConfig(
        rank=values["r"],
        alpha=values.get("lora_alpha", 8),
        dropout=float(values.get("lora_dropout") or 0.0),
        use_rslora=bool(values.get("use_rslora")),
        modules_to_save=list(values.get("modules_to_save") or []),
    )


def _unsupported(values: dict[str, Any]) -> Iterator[str]:
    kind = values.get("peft_type")
    if kind != "LORA":
        yield f"peft_type {shown(kind)} is not supported; only LORA is"
        return
    yield from _bad_values(values)
    start = values.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "eva", "orthogonal"):
        yield (
            f"init_lora_weights {shown(start)} changes the weights of the base; convert the adapter"
            " with PEFT's path_initial_model_for_weight_conversion"
        )
    saved = values.get("modules_to_save") or []
    for name in saved if isinstance(saved, list) else [saved]:
        if name not in SAVED_MODULES:
            yield f"modules_to_save {shown(name)} is not one of {', '.join(SAVED_MODULES)}"
    for name, value in values.items():
        if name not in (*_READ, *_WITHOUT_EFFECT) and value and value != _DEFAULTS.get(name):
            yield f"{name} {shown(value)} is not supported; only {shown(_DEFAULTS.get(name))} is"


def _bad_values(values: dict[str, Any]) -> Iterator[str]:
    """Numbers and switches that are none."""
    for name in ("r", "lora_alpha"):
        value = values.get(name, 8)
        if type(value) is not int or value < 1:
            yield f"{name} {shown(value)} is not a whole number from 1"
    dropout = values.get("lora_dropout") or 0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        yield f"lora_dropout {shown(dropout)} is not a number from 0 to below 1"
    if values.get("use_rslora") not in (True, False, None):
        yield f"use_rslora {shown(values['use_rslora'])} is not true or false"


class AdapterSource:
    """The tensors of an adapter folder by PEFT's names. Raises `CheckpointError` where damaged."""

    def __init__(self, folder: str | Path, *, key: str = "lora.adapter_path") -> None:
        self._path, self._key = Path(folder) / WEIGHTS, key
        if not self._path.is_file():
            raise ConfigError(
                f"{key}: '{folder}' has no {WEIGHTS}; save the adapter with PEFT's save_pretrained,"
                " which writes safetensors"
            )
        try:
            self._file: Any = safe_open(self._path, framework="pt")  # it has no types
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{key}: {self._path} is damaged ({error}); take another copy"
            ) from error

    def __str__(self) -> str:
        return str(self._path.parent)

    def shapes(self) -> dict[str, Shape]:
        """Name and shape of every tensor. Raises `ConfigError` for one that holds no floats."""
        found = {}
        for name in self._file.keys():  # noqa: SIM118 -- a file of safetensors is no mapping
            view = self._file.get_slice(name)
            if view.get_dtype() not in FLOATS:
                raise ConfigError(
                    f"{self._key}: '{self}' has {name} in {view.get_dtype()}, and adapters are read"
                    f" in {', '.join(FLOATS)}"
                )
            found[name] = tuple(view.get_shape())
        return found

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in its own dtype; it maps the file."""
        tensor: torch.Tensor = self._file.get_slice(name)[...]
        return tensor
