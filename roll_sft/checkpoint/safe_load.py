"""The pickles of a checkpoint, looked at before anything that would run what they say.

A `torch_dist` folder holds pickles that torch and Megatron-Core load without a guard: `.metadata`
(https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/filesystem.py), and
the objects stored between the tensors. Loading a pickle calls what it names, so a folder from
elsewhere can run any command. `check_pickles` lets through those that name nothing but the classes
which a checkpoint of a model, its optimizer and its random states is made of, and whose parts lie
inside the folder. Assumes that nobody changes the folder between the check and the load.

Nothing is looked at in stored tensors: torch reads them by its own restricted rules
(`weights_only=True`).
"""

import io
import os
import pickle
import pickletools
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from roll_sft.base.errors import CheckpointError

METADATA = ".metadata"
# What a damaged file makes of pickle, of torch's readers and of what walks their results.
DAMAGE = (
    OSError, EOFError, RuntimeError, ValueError, TypeError, AttributeError, LookupError,
    pickle.UnpicklingError,
)  # fmt: skip
_PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle")
_DTYPES = frozenset(
    f"torch.{name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)
)
_PLAN = "torch.distributed.checkpoint"
# Of `.metadata`, as torch 2.7 to 2.13 write it. Paths appear where the folder was given as one.
_METADATA_NAMES = _DTYPES | {
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    f"{_PLAN}.filesystem._StorageInfo",
    *(
        f"{_PLAN}.metadata.{name}"
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        f"{_PLAN}.planner.{name}"
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}  # fmt: skip
# Of stored objects: plain values, tensors, and the numpy arrays of random states.
_OBJECT_NAMES = _DTYPES | {
    "_codecs.encode",
    "_io.BytesIO",
    "collections.OrderedDict",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.Size",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage.UntypedStorage",
    *(
        f"torch.{name}Storage"
        for name in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long",
                     "Short")
    ),
}  # fmt: skip
_REMEDY = "delete this folder, and take checkpoints from those you trust only"


def check_pickles(folder: Path) -> None:
    """Raise `CheckpointError` if a pickle in the checkpoint `folder` names what it has no need of.

    The error names file and class; nothing in the folder has run then. Reads `.metadata`, every
    file that may be a pickle, and the objects between the tensors: kilobytes, not the weights.
    """
    metadata = load_metadata(folder)
    for path in sorted(folder.rglob("*")):
        if path.suffix in _PICKLE_SUFFIXES and path.is_file():
            with path.open("rb") as file:
                _check_archive(file.read(), where=str(path))
    for index, stored in metadata.storage_data.items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            _check_object(folder, stored, where=f"{folder / stored.relative_path}: {index.fqn}")


def load_metadata(folder: Path) -> Metadata:
    """`.metadata` of the checkpoint `folder`, loaded without running anything it may name.

    Raises `CheckpointError` where it cannot be read, names a class it has no need of, or refers to
    a file outside the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file, path).load()
    except DAMAGE as error:
        raise CheckpointError(f"{folder}: its metadata cannot be read: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path}: holds no metadata of a checkpoint; {_REMEDY}")
    for stored in metadata.storage_data.values():
        _check_place(stored, path)
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata, and refuses to look any other up."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        _check_name(f"{module}.{name}", _METADATA_NAMES, where=str(self._path))
        return super().find_class(module, name)


def _check_name(name: str, allowed: frozenset[str], *, where: str) -> None:
    if name not in allowed:
        raise CheckpointError(
            f"{where}: names {name}, which no checkpoint needs and which could run code when it is"
            f" loaded; {_REMEDY}"
        )


def _check_place(stored: Any, path: Path) -> None:
    """Refuse an entry that is no place inside a file of the folder."""
    if not isinstance(stored, _StorageInfo):
        raise CheckpointError(f"{path}: holds no metadata of a checkpoint; {_REMEDY}")
    name = str(stored.relative_path)
    if PurePosixPath(name).name != name or name == "..":
        raise CheckpointError(f"{path}: refers to {name!r}, which is outside its folder; {_REMEDY}")
    numbers = (stored.offset, stored.length)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"{path}: puts a part of {name} at {numbers}; {_REMEDY}")
    if stored.transform_descriptors:
        raise CheckpointError(
            f"{path}: {name} is stored with {stored.transform_descriptors}, and only plain files"
            " are available; save it again without"
        )


def _check_object(folder: Path, stored: _StorageInfo, *, where: str) -> None:
    """Look at one stored object, which torch would load without a guard."""
    try:
        with (folder / stored.relative_path).open("rb") as file:
            file.seek(stored.offset)
            content = file.read(min(stored.length, os.fstat(file.fileno()).st_size))
    except DAMAGE as error:
        raise CheckpointError(f"{where}: cannot be read: {error}") from error
    _check_archive(content, where=where)
    # Transformer Engine unpickles the bytes that it finds in its extra state, once more unguarded.
    if "_extra_state" not in where:
        return
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            value = torch.load(io.BytesIO(content), weights_only=True)
    except DAMAGE as error:
        raise CheckpointError(f"{where}: cannot be read: {error}") from error
    if not _is_empty(value):
        raise CheckpointError(
            f"{where}: is not empty, and extra state is empty in all that this version trains;"
            f" {_REMEDY}"
        )


def _is_empty(value: Any) -> bool:
    """Whether extra state says nothing: None, no bytes, no numbers, or a list of such."""
    if isinstance(value, list):
        return all(map(_is_empty, value))
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    return value is None or (isinstance(value, io.BytesIO) and not value.getbuffer().nbytes)


def _check_archive(content: bytes, *, where: str) -> None:
    """Look at all that `torch.load` would unpickle of `content`, without unpickling it."""
    if not zipfile.is_zipfile(io.BytesIO(content)) or not content.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"{where}: is not in the form that torch.save gives a file, and another one can run"
            f" code; {_REMEDY}"
        )
    try:
        # torch's own reader: another might see other records in a file made to deceive it.
        archive = torch._C.PyTorchFileReader(io.BytesIO(content))
        if "constants.pkl" in archive.get_all_records():  # torch.load would run it as TorchScript
            raise CheckpointError(f"{where}: is a TorchScript program; {_REMEDY}")
        _check_opcodes(archive.get_record("data.pkl"), where=where)
    except DAMAGE as error:
        raise CheckpointError(f"{where}: cannot be read: {error}") from error


def _check_opcodes(pickled: bytes, *, where: str) -> None:
    """Refuse a pickle that names a class which is not allowed, or that hides its names."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            _check_name(str(argument).replace(" ", "."), _OBJECT_NAMES, where=where)
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise CheckpointError(
                f"{where}: names classes in a way that torch.save never uses ({opcode.name});"
                f" {_REMEDY}"
            )
