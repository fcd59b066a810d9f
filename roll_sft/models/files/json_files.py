"""The JSON files of a model's folder: objects whose numbers are finite."""

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roll_sft.base.errors import ConfigError

# The largest tokenizer.json has 35 MB and a million lists; a list takes 56 bytes.
MOST_JSON_BYTES, MOST_JSON_PARTS = 256 << 20, 8_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file `path`, every number in it finite, as the JSON of an export must be.

    Raises `ConfigError` for any other file.
    """
    content = read_object(path)
    if problem := not_finite(content):
        raise ConfigError(f"{path}: {problem}; correct the file")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The object in the file `path`; `ConfigError` if there is none."""
    try:
        content = json.loads(json_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); correct the file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not an object; correct it")
    return content


def json_text(path: Path, *, most: int = MOST_JSON_BYTES, most_parts: int = MOST_JSON_PARTS) -> str:
    """The text (UTF-8) of a JSON file of others, which fits in memory once it is parsed.

    Raises `OSError`, or `ValueError` for a file of more than `most` bytes or `most_parts` lists and
    objects, and for what is no file: a pipe would be waited for.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    if (num_parts := content.count(b"[") + content.count(b"{")) > most_parts:
        raise ValueError(f"it has {num_parts:,} lists and objects")
    return content.decode("utf-8")


def not_finite(content: Mapping[str, Any]) -> str | None:
    """The first number in a JSON object that is NaN or infinite: its key, value and rule."""
    todo: list[tuple[str, Any]] = [("", content)]
    while todo:
        place, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{place}.{key}" if place else key, each) for key, each in value.items()]
        elif isinstance(value, list):
            todo += [(f"{place}[{index}]", each) for index, each in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            return f"{place} {value} must be a finite number"
    return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to the file `path`, indented.

    JSON may escape one half of a surrogate pair, which UTF-8 cannot encode: it is escaped again.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))
