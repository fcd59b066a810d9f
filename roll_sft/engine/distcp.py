"""The files by which PyTorch and Megatron-Core read what the ranks wrote, and the index of ours.

`.metadata` is PyTorch's, a pickle; `common.pt` and `metadata.json` are Megatron-Core's, which loads
the folder as `torch_dist`. The engine itself reads `index.json` and no pickle, and `.metadata` only
where a checkpoint has no index.
"""

import json
import pickle
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

from roll_sft.engine.safe_load import DAMAGE, METADATA, check_pickles, load_metadata
from roll_sft.engine.shards import DTYPES, INDEX, Chunk, Index, ShardFile
from roll_sft.errors import CheckpointError

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
        if not path.exists():  # written by Megatron-Core, or by an earlier version of ours
            return Index(folder, _chunks_of_metadata(folder))
        tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        return Index(folder, list(_chunks(tensors)))
    except DAMAGE as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); take another checkpoint"
        ) from error


def _chunks(tensors: dict[str, dict[str, Any]]) -> Iterable[Chunk]:
    for key, entry in tensors.items():
        for offset, sizes, file, start, length, data_start in entry["chunks"]:
            if file != Path(file).name:
                raise ValueError(f"{file!r} lies outside of the folder")
            place = (file, start, length, data_start)
            yield Chunk(
                key, entry["dtype"], tuple(entry["shape"]), tuple(offset), tuple(sizes), *place
            )


def _chunks_of_metadata(folder: Path) -> list[Chunk]:
    check_pickles(folder)
    metadata, chunks = load_metadata(folder), []
    for index, place in metadata.storage_data.items():
        stored = metadata.state_dict_metadata[index.fqn]
        if not isinstance(stored, TensorStorageMetadata):
            continue
        sizes = next(each.sizes for each in stored.chunks if each.offsets == index.offset)
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
