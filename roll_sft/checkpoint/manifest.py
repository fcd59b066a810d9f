"""`manifest.json` of a step folder: its values, and whether the folder has the files that it lists.

Resume, retention, the engine and the converters all read it here. The folder may come from
anywhere. Promises: the values have the types below; every listed file lies inside the folder, under
its own name and not behind a link; anything else is one `CheckpointError` that names the folder and
the value.
"""

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from roll_sft.base.errors import CheckpointError
from roll_sft.base.layout import ParallelLayout

MANIFEST = "manifest.json"
ASSETS = "hf_assets"
SCHEMA_VERSION = 2
DTYPES = ("fp32", "bf16", "fp16")
_STEP_NAME = re.compile(r"step_(\d+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_STEP = 10**12
_MOST_BYTES = 16 << 20
_NUM_HASHERS = 8
_BLOCK_BYTES = 1 << 20
_REMEDY = "the checkpoint is damaged or was changed, take another"


class NewerCheckpointError(CheckpointError):
    """A checkpoint of a later version: an earlier one beside it is not what the user means."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands at a checkpoint: what a later run needs to go on, or to refuse."""

    step: int
    epoch: int
    samples_seen_in_epoch: int
    seed: int
    global_batch_size: int
    global_batch_tokens: int | None
    sequence_length: int
    sources: dict[str, str]  # source name -> address of its token cache
    layout: ParallelLayout
    dtype: str
    facts: dict[str, object] = field(default_factory=dict)  # what else a later run must agree with
    optimizer_step: int | None = None  # Adam's count; None where no optimizer was saved


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint: `size` in bytes, `sha256` in hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The values of a manifest. `files` are names relative to the step folder."""

    schema: int
    state: RunState
    versions: dict[str, str]  # package -> version of it that wrote the checkpoint
    files: dict[str, StoredFile]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the step folder `folder`.

    Raises `NewerCheckpointError` for a later schema, and `CheckpointError` for any other value that
    this version does not read, or a step that differs from the folder's name.
    """
    values = _values(folder)
    try:
        schema = _integer(values, "schema", least=SCHEMA_VERSION)  # no release wrote an earlier one
    except _BadValueError as problem:
        raise _refusal(folder, problem) from problem
    if schema > SCHEMA_VERSION:
        raise NewerCheckpointError(
            f"{folder}: was written by a later version (schema {schema}, and this one reads"
            f" {SCHEMA_VERSION}); use that version, or move the folder away to go on without it"
        )
    try:
        manifest = _manifest(values, schema)
        _check_name(folder, manifest.state.step)
    except _BadValueError as problem:
        raise _refusal(folder, problem) from problem
    return manifest


def check_complete(folder: Path) -> Manifest:
    """The manifest of `folder`, if every file is there at its size; else `CheckpointError`."""
    manifest = read_manifest(folder)
    for name, facts in manifest.files.items():
        size = _size(folder, name)
        if size != facts.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{folder / name}: {found}, and the manifest says {facts.size} bytes; the"
                " checkpoint is damaged, take another"
            )
    return manifest


def sha256_of(path: Path, *, stop: threading.Event | None = None) -> str:
    """The SHA-256 of a file in hexadecimal digits; meaningless once `stop` is set."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(block)) and not (stop and stop.is_set()):
            digest.update(block[:count])
    return digest.hexdigest()


def verify_hashes(
    folder: Path, files: Mapping[str, StoredFile], *, stop: threading.Event | None = None
) -> None:
    """Raise `CheckpointError` for the first of `files` in `folder` with another SHA-256.

    Hashing releases the interpreter's lock, so threads read several files at once. `stop` ends
    them early, and then the result means nothing.
    """

    def verify(name: str) -> None:
        try:
            digest = sha256_of(folder / name, stop=stop)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error
        if digest != files[name].sha256:
            raise CheckpointError(
                f"{folder / name}: its SHA-256 is {digest[:12]}..., and the manifest says"
                f" {files[name].sha256[:12]}...; the checkpoint is damaged, take another"
            )

    with ThreadPoolExecutor(_NUM_HASHERS, thread_name_prefix="checkpoint-hash") as pool:
        for _ in pool.map(verify, files):
            pass


class _BadValueError(ValueError):
    """A value of the manifest that breaks a rule; the message has both."""


def _refusal(folder: Path, problem: _BadValueError) -> CheckpointError:
    return CheckpointError(f"{folder / MANIFEST}: {problem}; {_REMEDY}")


def _values(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: no readable {MANIFEST} ({error}), so this is no complete checkpoint of"
            " roll_sft; give a step folder such as checkpoints/step_00000010, or convert a Hugging"
            " Face folder into one"
        ) from error
    return values


def _manifest(values: Mapping[str, Any], schema: int) -> Manifest:
    files = {name: _file(name, facts) for name, facts in _mapping(values, "files").items()}
    shards = [name for name in files if name.endswith(".distcp")]
    if not shards:
        raise _BadValueError(f"files lists no weights (*.distcp) among its {len(files)}")
    if values.get("dtype") not in DTYPES:
        raise _BadValueError(f"dtype {_shown(values.get('dtype'))} is not one of {list(DTYPES)}")
    state = RunState(
        step=_integer(values, "step"),
        epoch=_integer(values, "epoch"),
        samples_seen_in_epoch=_integer(values, "samples_seen_in_epoch"),
        seed=_integer(values, "seed"),
        global_batch_size=_integer(values, "global_batch_size"),
        global_batch_tokens=_integer_or_none(values, "global_batch_tokens"),
        sequence_length=_integer(values, "sequence_length"),
        sources=_texts(values, "sources"),
        layout=_layout(_mapping(values, "layout")),
        dtype=values["dtype"],
        facts=_mapping(values, "facts"),
        optimizer_step=_integer_or_none(values, "optimizer_step"),
    )
    return Manifest(schema, state, versions=_texts(values, "versions"), files=files)


def _check_name(folder: Path, step: int) -> None:
    named = _STEP_NAME.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise _BadValueError(f"step {step} in a folder called {folder.name}")


def _file(name: str, facts: Any) -> StoredFile:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or not name.isprintable():
        raise _BadValueError(f"files lists {_shown(name)}, which is no place inside the folder")
    if not isinstance(facts, dict):
        raise _BadValueError(f"files.{_shown(name)} is {_shown(facts)}, not size and sha256")
    sha256 = facts.get("sha256")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise _BadValueError(f"sha256 of {_shown(name)} is {_shown(sha256)}, not 64 hex digits")
    return StoredFile(_integer(facts, "size", of=f" of {_shown(name)}", most=2**63), sha256)


def _size(folder: Path, name: str) -> int | None:
    """Bytes of a file of `folder`; None if there is none. Raises `CheckpointError` for a link."""
    path, status = folder, None
    for part in PurePosixPath(name).parts:
        path = path / part
        try:
            status = os.lstat(path)
        except OSError:
            return None
        if stat.S_ISLNK(status.st_mode):
            raise CheckpointError(
                f"{path}: is a link, and a checkpoint holds its own files; copy what it points to,"
                " if you trust it, or take another checkpoint"
            )
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None


def _layout(values: Mapping[str, Any]) -> ParallelLayout:
    sizes: dict[str, Any] = {}
    for name in (each.name for each in fields(ParallelLayout)):
        if name == "sequence_parallel":
            if not isinstance(values.get(name, False), bool):
                raise _BadValueError(f"layout.{name} is {_shown(values[name])}, not true or false")
            sizes[name] = values.get(name, False)
        elif name in values or name == "world_size":
            sizes[name] = _integer(values, name, of=" of the layout", least=1)
    degrees = 1
    for name in ("tensor_size", "pipeline_size", "context_size"):
        degrees *= sizes.get(name, 1)
    if sizes["world_size"] % degrees:
        raise _BadValueError(f"layout: {degrees} does not divide world_size {sizes['world_size']}")
    return ParallelLayout(**sizes)


def _integer(
    values: Mapping[str, Any], name: str, *, of: str = "", least: int = 0, most: int = _MAX_STEP
) -> int:
    value = values.get(name)
    if type(value) is not int or not least <= value <= most:  # True would pass isinstance
        raise _BadValueError(f"{name}{of} is {_shown(value)}, not a whole number from {least}")
    return value


def _integer_or_none(values: Mapping[str, Any], name: str) -> int | None:
    return None if values.get(name) is None else _integer(values, name)


def _mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    if not isinstance(value, dict):
        raise _BadValueError(f"{name} is {_shown(value)}, not an object")
    return value


def _texts(values: Mapping[str, Any], name: str) -> dict[str, str]:
    texts = _mapping(values, name)
    for key, value in texts.items():
        if not isinstance(value, str):
            raise _BadValueError(f"{name}.{_shown(key)} is {_shown(value)}, not a text")
    return texts


def _shown(value: object) -> str:
    """`value` for an error message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
