"""The files of an export beside the weights: tokenizer, configuration, template, licence.

Other programs and versions serve the model, so files of the source are copied byte for byte. Two
are changed: the chat template, if the user gave one, and the tokens that end generation.
transformers makes files that the source lacks. Code is never copied.
"""

import fnmatch
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_sft.base.errors import ConfigError
from roll_sft.base.text import shown
from roll_sft.models.files.config_file import token_problem
from roll_sft.models.files.json_files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
_BACKEND = "tokenizer.json"
_TEMPLATE_FILES = (TEMPLATE, "chat_template.json", f"{TEMPLATES}/*.jinja")
TOKENIZER_FILES = (
    _BACKEND, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "tekken.json", "*.tiktoken", *_TEMPLATE_FILES,
)  # fmt: skip
# Licences must be passed on; the card describes the base model.
TEXT_FILES = (
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt",
    "NOTICE.md", "USE_POLICY.md",
)  # fmt: skip
GENERATION_CONFIG = "generation_config.json"
MODEL_FILES = ("config.json", GENERATION_CONFIG)
# Text that tokenizers split differently: digits, spaces, contractions, other scripts, bytes.
_PROBE = (
    "It's 12345.67 - they'LL pay\r\n\n\n  for  3 x\ttabs;  \u00e9tude na\u00efve, \ufb01 "
    "\u654f\u6377\u7684\u68d5\u8272\u72d0\u72f8 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\U0001f98a def f(x):\n    return x**2 "
)


@dataclass(frozen=True, slots=True)
class TrainedTokenizer:
    """The tokenizer that a model was trained with, and the `folder` that its files are in.

    `chat_template` is what was used in place of the tokenizer's own; None where that was.
    """

    tokenizer: "PreTrainedTokenizerBase"
    folder: Path
    end_of_turn_id: int
    chat_template: str | None = None


def asset_files(folder: Path) -> Iterator[str]:
    """Names, relative to `folder`, of its files that belong beside the weights of a model.

    Raises `ConfigError` for a link that leads out of the folder, as any file of this machine would
    be copied into an export. The hub's cache keeps its files in a folder of their own, `blobs`.
    """
    for path in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")]):
        name = str(path.relative_to(folder))
        if _matches(name, (*MODEL_FILES, *TOKENIZER_FILES, *TEXT_FILES)) and path.is_file():
            _check_inside(path, folder)
            yield name


def _check_inside(path: Path, folder: Path) -> None:
    real, home = path.resolve(), folder.resolve()
    is_of_hub = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    if not (real.is_relative_to(home) or is_of_hub):
        raise ConfigError(
            f"{path}: is a link that leads out of the model's folder, and its content would be"
            " copied into exports; put a copy of the file in its place, if you trust it"
        )


def check_links(folder: Path) -> None:
    """Raise what `asset_files` raises."""
    for _ in asset_files(folder):
        pass


def check_assets(folder: Path) -> None:
    """Raise `ConfigError` for a file of `folder` that belongs beside weights and cannot be read."""
    generation_of(folder)
    for name in asset_files(folder):
        if name.endswith(".json"):
            read_json(folder / name)
        elif name.endswith(".jinja"):
            try:
                (folder / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{folder / name} cannot be read as UTF-8 ({error}); correct the file"
                ) from error


def save_assets(model: Path, *, trained: TrainedTokenizer, output: Path) -> None:
    """Collect in `output` the files that an export of `model` needs beside the weights.

    generation_config.json stops at the end of a turn, at the tokenizer's eos and where the source
    stopped, or the served model never ends its turn. Raises what `check_assets` raises.
    """
    output.mkdir(parents=True, exist_ok=True)
    for folder, patterns in ((model, TEXT_FILES), (trained.folder, TOKENIZER_FILES)):
        for name in asset_files(folder):
            if _matches(name, patterns):
                copy_file(folder / name, output / name)
    write_json(output / "config.json", config_of(model))
    _complete_tokenizer(trained.tokenizer, output)
    if trained.chat_template is not None:
        _set_template(output, trained.chat_template)
    write_json(output / GENERATION_CONFIG, _generation(model, trained))
    check_assets(output)  # now, and not after the training


def config_of(model: Path) -> dict[str, Any]:
    """The config.json of an export of `model`: that of its folder, unless weights are in MXFP4."""
    config = read_json(model / "config.json")
    if "quantization_config" in config:
        from roll_sft.models.moe.mxfp4 import plain_config

        config = plain_config(config)
    return config


def generation_of(folder: Path) -> dict[str, Any] | None:
    """The object in the generation_config.json of `folder`; None without the file.

    Raises `ConfigError` for a file that is no JSON object, or names tokens by anything but ids.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return None
    generation = read_json(path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if problem := token_problem(generation.get(key)):
            raise ConfigError(f"{path}: {key} {shown(generation[key])} {problem}; correct the file")
    return generation


def copy_file(source: Path, copy: Path) -> None:
    """Copy the content alone: a private file's mode would hide the copy from other users."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, copy)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def _complete_tokenizer(tokenizer: "PreTrainedTokenizerBase", output: Path) -> None:
    """Make the files that the source lacks, and tokenizer.json if training used other rules.

    transformers builds some tokenizers by its own rules, whatever tokenizer.json says; others that
    serve the model follow the file.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a slow tokenizer has none
    missing = [name for name in (TOKENIZER_CONFIG, _BACKEND) if not (output / name).is_file()]
    if backend is not None and _BACKEND not in missing and not _encodes_alike(tokenizer, output):
        LOG.warning(
            "%s of the source splits text differently from transformers' rules for %s, with which"
            " the model was trained; the export gets the latter",
            _BACKEND,
            type(tokenizer).__name__,
        )
        missing.append(_BACKEND)
    if not missing:
        return
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        made = {path.name for path in Path(scratch).iterdir()}
        if TOKENIZER_CONFIG in missing and not (output / TEMPLATE).is_file():
            missing.append(TEMPLATE)
        for name in made.intersection(missing):
            copy_file(Path(scratch) / name, output / name)


def _encodes_alike(tokenizer: Any, folder: Path) -> bool:
    """Whether tokenizer.json in `folder` gives a text the ids that `tokenizer` gives it."""
    from tokenizers import Tokenizer

    special = "x".join(map(str, tokenizer.all_special_tokens))  # text after these may differ too
    backends = (tokenizer.backend_tokenizer, Tokenizer.from_file(str(folder / _BACKEND)))
    text = f"{_PROBE}{special} {_PROBE}"
    ids = [each.encode(text, add_special_tokens=False).ids for each in backends]
    return bool(ids[0] == ids[1])


def _set_template(folder: Path, template: str) -> None:
    """Make `template` the only one that the tokenizer in `folder` has."""
    for name in list(asset_files(folder)):
        if _matches(name, _TEMPLATE_FILES):
            (folder / name).unlink()
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    config = read_json(folder / TOKENIZER_CONFIG)
    write_json(folder / TOKENIZER_CONFIG, {**config, "chat_template": template})


def _generation(model: Path, trained: TrainedTokenizer) -> dict[str, Any]:
    from transformers import GenerationConfig  # slow to import

    generation = generation_of(model)
    if generation is None:
        config = read_json(model / "config.json")
        generation = GenerationConfig.from_model_config(config).to_diff_dict()
    # Left in, transformers would compute the file anew from config.json, without our stop tokens.
    generation.pop("_from_model_config", None)
    earlier = generation.get("eos_token_id")
    stops = [trained.end_of_turn_id, trained.tokenizer.eos_token_id]
    stops += earlier if isinstance(earlier, list) else [earlier]
    generation["eos_token_id"] = list(dict.fromkeys(stop for stop in stops if stop is not None))
    if trained.tokenizer.pad_token_id is not None:
        generation["pad_token_id"] = trained.tokenizer.pad_token_id
    return generation
