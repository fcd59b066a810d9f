"""Samples from Python -> a file of rows, which a run reads as any other.

A text is trained on as a whole. A pair is a prompt and its completion, two texts or two lists of
messages. A list of messages is a conversation. A mapping is a row as files have it. The file is
named by its content, so equal samples are one source, and a later run finds them again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from roll_sft.base.errors import ConfigError, DataError
from roll_sft.base.files import writing
from roll_sft.base.text import shown

FOLDER = "samples"  # of the token cache
_SHAPES = "a text, a (prompt, completion) pair, a list of messages or a mapping of columns"


def source_path(samples: Any, folder: Path, *, name: str) -> str:
    """The path of `samples`: their own if they are one, or of a file written into `folder`.

    `name` is the argument, for messages. Raises `ConfigError` for a value that holds no samples,
    `DataError` for a sample of no known shape, `ResourceError` where the file cannot be written.
    """
    if isinstance(samples, str | Path):
        return os.path.expanduser(samples)
    rows = _rows(samples, name=name)
    digest, staging = hashlib.sha256(), folder / f".{os.getpid()}.{name}.tmp"
    with writing(staging):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with staging.open("wb") as file:
                for row in rows:
                    line = f"{json.dumps(row)}\n".encode()
                    digest.update(line)
                    file.write(line)
            path = folder / f"{digest.hexdigest()[:32]}.jsonl"
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
    return str(path.absolute())


def _rows(samples: Any, *, name: str) -> Iterator[Mapping[str, Any]]:
    """The rows that a file holds. At least one is there."""
    if isinstance(samples, Mapping):
        splits = ", ".join(map(str, list(samples)[:5]))
        raise ConfigError(
            f"{name}: is a {type(samples).__name__} of {splits}; give one of these, or a list"
        )
    if type(samples).__name__ == "DataFrame":
        raise ConfigError(f"{name}: is a DataFrame; give its rows, .to_dict('records')")
    if not isinstance(samples, Iterable):
        raise ConfigError(f"{name}: {shown(samples)} is neither a path nor a list of samples")
    if isinstance(samples, list) and samples and all(map(_is_file, samples)):
        raise ConfigError(
            f"{name}: its texts are names of files; give one path, or several as data.train in"
            " config"
        )
    count = -1
    for count, sample in enumerate(samples):
        row = _row(sample, where=f"{name}[{count}]")
        try:
            json.dumps(row)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{name}[{count}]: {shown(sample)} cannot be written as JSON ({error}); give texts,"
                " numbers, lists and mappings"
            ) from error
        yield row
    if count < 0:
        raise DataError(f"{name}: is empty; give at least one of: {_SHAPES}")


def _is_file(sample: object) -> bool:
    return isinstance(sample, Path) or (
        isinstance(sample, str) and len(sample) < 1000 and os.path.isfile(sample)
    )


def _are(values: Iterable[object], kind: type) -> bool:
    return all(isinstance(each, kind) for each in values)


def _row(sample: Any, *, where: str) -> Mapping[str, Any]:
    if isinstance(sample, str):
        return {"text": sample}
    if isinstance(sample, Mapping):
        return sample
    if isinstance(sample, list | tuple):
        if sample and _are(sample, Mapping):
            return {"messages": list(sample)}
        if len(sample) == 2 and any(_are(sample, kind) for kind in (str, list)):
            return {"prompt": sample[0], "completion": sample[1]}
    raise DataError(f"{where}: {shown(sample)} is not {_SHAPES}; write it as one of these")
