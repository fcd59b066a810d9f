"""Adds the names of transformers 4 to the JSON files of an export.

transformers 5 renamed keys of config.json and tokenizer_config.json. transformers 4, and servers
that read these files, know the earlier names alone: they refuse such a tokenizer, and silently use
a rotary base of 10,000. transformers 5 reads the earlier names too, so an export has both.
"""

import logging
from pathlib import Path
from typing import Any

from roll_sft.models.files.assets import TEMPLATE, TEMPLATES, TOKENIZER_CONFIG
from roll_sft.models.files.json_files import read_json, write_json

LOG = logging.getLogger(__name__)
# transformers 4 has none of these classes; tokenizer.json has the whole tokenizer.
_CLASSES_OF_5 = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend")
_PLAIN_CLASS = "PreTrainedTokenizerFast"


def widen(folder: Path) -> None:
    """Add the earlier names to the files of the model in `folder`.

    Files that need none stay as they are. References to code are removed: an export has no code.
    """
    config = read_json(folder / "config.json")
    _write_if_changed(folder / "config.json", config, _wide_config(config))
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        tokenizer = read_json(path)
        _write_if_changed(path, tokenizer, _wide_tokenizer(tokenizer, folder))


def _wide_config(config: dict[str, Any]) -> dict[str, Any]:
    config = _without_code(config, "config.json")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    return config


def _wide_tokenizer(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = _without_code(config, TOKENIZER_CONFIG)
    for name in ("backend", "is_local"):
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):  # in transformers 4 it is an object
        extra = config.pop("extra_special_tokens")
        config.setdefault("additional_special_tokens", extra)
    if config.get("tokenizer_class") in _CLASSES_OF_5 and (folder / "tokenizer.json").is_file():
        config["tokenizer_class"] = _PLAIN_CLASS
    if "chat_template" not in config:
        templates = _templates(folder)
        if [*templates] == ["default"]:
            config["chat_template"] = templates["default"]
        elif templates:
            config["chat_template"] = [
                {"name": name, "template": text} for name, text in templates.items()
            ]
    return config


def _templates(folder: Path) -> dict[str, str]:
    """Every chat template that has a file of its own, by name."""
    files = {"default": folder / TEMPLATE}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    return {name: path.read_text("utf-8") for name, path in files.items() if path.is_file()}


def _without_code(config: dict[str, Any], name: str) -> dict[str, Any]:
    config = dict(config)
    if config.pop("auto_map", None) is not None:
        LOG.warning("%s refers to code of its author (auto_map); the export has neither", name)
    return config


def _write_if_changed(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    if after != before:
        write_json(path, after)
