"""The files that describe a checkpoint: for roll_sft, for PyTorch and for Megatron-Core.

roll_sft reads `index.json` alone. `.metadata` is a pickle for PyTorch; `common.pt` and
`metadata.json` are for Megatron-Core, which loads the folder as `torch_dist`. Promise: a pickle of
a checkpoint is written and never loaded, so a folder from elsewhere cannot run code.
"""

import json
import math
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.tensors import DTYPES, INDEX, Chunk, Index, Shape, ShardFile

METADATA = ".metadata"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_descriptions(folder: Path, parts: Sequence[ShardFile]) -> None:
    """Describe what the ranks wrote into `folder` to whoever reads it."""
    tensors: dict[str, dict[str, Any]] = {}
    for chunk in (chunk for part in parts for chunk in part.chunks):
        known = {"dtype": chunk.dtype, "shape": chunk.shape, "chunks": []}
        place = (chunk.file, chunk.start, chunk.length, chunk.data_start)
        entry = tensors.setdefault(chunk.key, known)
        entry["chunks"].append([chunk.offset, chunk.sizes, *place])
    (folder / INDEX).write_text(json.dumps({"tensors": tensors}), encoding="utf-8")
    (folder / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    torch.save({}, folder / "common.pt")
    with (folder / METADATA).open("wb") as file:
        pickle.dump(_metadata(tensors, parts), file)


def read_index(folder: Path) -> Index:
    """Where the tensors of the checkpoint `folder` lie.

    Raises `CheckpointError` where the index is missing or disagrees with the files beside it.
    """
    path = folder / INDEX
    try:
        chunks = list(_chunks(json.loads(path.read_text(encoding="utf-8"))["tensors"]))
        _check_chunks(chunks, folder)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: does not describe what lies beside it ({error}); take another checkpoint"
        ) from error
    return Index(folder, chunks)


def _chunks(tensors: dict[str, dict[str, Any]]) -> Iterable[Chunk]:
    for key, entry in tensors.items():
        for offset, sizes, file, start, length, data_start in entry["chunks"]:
            place = (file, start, length, data_start)
            yield Chunk(
                key, entry["dtype"], tuple(entry["shape"]), tuple(offset), tuple(sizes), *place
            )


def _check_chunks(chunks: Sequence[Chunk], folder: Path) -> None:
    """Raise `ValueError` for a chunk that cannot be where it says, or is more than its file holds.

    Afterwards no read leaves the folder, and no tensor takes more memory than the files have bytes.
    """
    file_sizes: dict[str, int] = {}
    stored: dict[str, tuple[str, Shape]] = {}
    num_stored: Counter[str] = Counter()
    for chunk in chunks:
        if chunk.file not in file_sizes:
            file_sizes[chunk.file] = _file_size(folder, chunk.file)
        _check_chunk(chunk, file_size=file_sizes[chunk.file])
        if stored.setdefault(chunk.key, (chunk.dtype, chunk.shape)) != (chunk.dtype, chunk.shape):
            raise ValueError(f"{chunk.key}: its parts disagree about dtype or shape")
        num_stored[chunk.key] += math.prod(chunk.sizes)
    for key, (_dtype, shape) in stored.items():
        if num_stored[key] < math.prod(shape):
            raise ValueError(f"{key}: has {num_stored[key]} of its {math.prod(shape)} numbers")


def _check_chunk(chunk: Chunk, *, file_size: int) -> None:
    places = (chunk.start, chunk.length, chunk.data_start)
    numbers = (*chunk.shape, *chunk.offset, *chunk.sizes, *places)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{chunk.key}: a place or size is no whole number from 0")
    if chunk.dtype not in DTYPES:
        raise ValueError(f"{chunk.key}: {chunk.dtype!r} is not one of {list(DTYPES)}")
    ends = zip(chunk.offset, chunk.sizes, chunk.shape, strict=True)
    if any(offset + size > limit for offset, size, limit in ends):
        raise ValueError(f"{chunk.key}: a part lies outside of its shape {chunk.shape}")
    num_bytes = math.prod(chunk.sizes) * DTYPES[chunk.dtype].itemsize
    last = max(chunk.data_start + num_bytes, chunk.start + chunk.length)
    if num_bytes > chunk.length or last > file_size:
        raise ValueError(f"{chunk.key}: a part lies outside of {chunk.file}")


def _file_size(folder: Path, name: object) -> int:
    if not isinstance(name, str) or name != Path(name).name or (folder / name).is_symlink():
        raise ValueError(f"{name!r} lies outside of the folder")
    return (folder / name).stat().st_size


def _metadata(tensors: dict[str, dict[str, Any]], parts: Sequence[ShardFile]) -> Metadata:
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places = {}
    for part in parts:
        for key, (start, length) in part.objects.items():
            described[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(part.name, start, length)
    for key, entry in tensors.items():
        chunks = []
        for offset, sizes, file, start, length, _data_start in entry["chunks"]:
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)))
            places[MetadataIndex(key, torch.Size(offset))] = _StorageInfo(file, start, length)
        properties = TensorProperties(DTYPES[entry["dtype"]])
        described[key] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(described, storage_data=places, version=CURRENT_DCP_VERSION)
