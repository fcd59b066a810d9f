"""Code that a model's folder brings: run only where it lies before the user, never fetched."""

import json
from pathlib import Path
from typing import Any

from roll_sft.base.errors import ConfigError
from roll_sft.base.text import shown
from roll_sft.models.files.json_files import read_object

_FILES = ("config.json", "tokenizer_config.json")


def check_code_is_here(path: str, *, key: str) -> None:
    """Raise `ConfigError` where `path`, given by `key`, would have code run that is not in it.

    The newest commit of the hub is another one tomorrow; a local folder is what was looked at.
    """
    if not Path(path).is_dir():
        raise ConfigError(
            f"model.trust_remote_code: {key} {shown(path)} is no local folder, so its code would be"
            " what the hub has at that moment; fetch a commit that you have read"
            " (`hf download ID --revision COMMIT --local-dir FOLDER`) and give that folder"
        )
    for file in (Path(path) / name for name in _FILES):
        places: Any = read_object(file).get("auto_map", {}) if file.is_file() else {}
        if "--" in json.dumps(places):
            raise ConfigError(
                f"model.trust_remote_code: {file}: auto_map {shown(places)} names code of another"
                " repository; copy that code into the folder and name it without `--`"
            )
