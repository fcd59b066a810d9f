"""The files by which PyTorch and Megatron-Core read what the ranks wrote, and the index of ours.

`.metadata` is PyTorch's, a pickle; `common.pt` and `metadata.json` are Megatron-Core's, which loads
the folder as `torch_dist`. The engine itself reads `index.json` and no pickle, and `.metadata` only
where a checkpoint has no index.
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
from roll_sft.checkpoint.safe_load import DAMAGE, METADATA, check_pickles, load_metadata
from roll_sft.checkpoint.tensors import DTYPES, INDEX, Chunk, Index, Shape, ShardFile

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
    """Where everything lies in `folder`. Raises `CheckpointError` where that cannot be read."""
    path = folder / INDEX
    try:
        if path.exists():
            tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
            chunks = list(_chunks(tensors))
        else:  # written by Megatron-Core, or by an earlier version of ours
            chunks = _chunks_of_metadata(folder)
        _check_chunks(chunks, folder)
    except DAMAGE as error:
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
    first = chunk.start if chunk.data_start is None else chunk.data_start
    numbers = (*chunk.shape, *chunk.offset, *chunk.sizes, chunk.start, chunk.length, first)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{chunk.key}: a place or size is no whole number from 0")
    if chunk.dtype not in DTYPES:
        raise ValueError(f"{chunk.key}: {chunk.dtype!r} is not one of {list(DTYPES)}")
    ends = zip(chunk.offset, chunk.sizes, chunk.shape, strict=True)
    if any(offset + size > limit for offset, size, limit in ends):
        raise ValueError(f"{chunk.key}: a part lies outside of its shape {chunk.shape}")
    num_bytes = math.prod(chunk.sizes) * DTYPES[chunk.dtype].itemsize
    last = max(first + num_bytes, chunk.start + chunk.length)
    if num_bytes > chunk.length or last > file_size:
        raise ValueError(f"{chunk.key}: a part lies outside of {chunk.file}")


def _file_size(folder: Path, name: object) -> int:
    if not isinstance(name, str) or name != Path(name).name or (folder / name).is_symlink():
        raise ValueError(f"{name!r} lies outside of the folder")
    return (folder / name).stat().st_size


def _chunks_of_metadata(folder: Path) -> list[Chunk]:
    check_pickles(folder)
    metadata, chunks = load_metadata(folder), []
    for index, place in metadata.storage_data.items():
        stored = metadata.state_dict_metadata[index.fqn]
        if not isinstance(stored, TensorStorageMetadata):
            continue
        sizes = next((each.sizes for each in stored.chunks if each.offsets == index.offset), None)
        if sizes is None:
            raise ValueError(f"{index.fqn} has no part at {index.offset}")
        chunks.append(
            Chunk(
                key=index.fqn,
                dtype=str(stored.properties.dtype).removeprefix("torch."),
                shape=tuple(stored.size),
                offset=tuple(index.offset),
                sizes=tuple(sizes),
                file=place.relative_path,
                start=place.offset,
                length=place.length,
                data_start=None,
            )
        )
    return chunks


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
