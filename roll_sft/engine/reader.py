"""Reads single parameters out of a `torch_dist` checkpoint: torch alone, no Megatron, no processes.

Parameters of equal layers lie in one stored tensor with the layer as its first dimension; `Reader`
hides that and reads one layer without the others, so memory follows the parameter, not the model.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from roll_sft.engine.safe_load import DAMAGE, load_metadata
from roll_sft.errors import CheckpointError

_LAYERS = "decoder.layers."
# The local layer spec stores its norms under the names they have when fused into the next linear
# layer, so that checkpoints do not depend on the spec.
_STORED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class Reader:
    """One checkpoint's parameters, by Megatron's names with global layer indices."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._storage = FileSystemReader(folder)
        self._metadata = load_metadata(folder)
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, name: str) -> torch.Tensor:
        """Parameter `name` with all tensor shards merged, in the dtype it was saved in, on the CPU.

        Raises `CheckpointError` where it is missing, not whole, or its file is damaged.
        """
        key, layer = _stored_name(name)
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{self._folder}: {name} is not in this checkpoint")
        shape = list(stored.size)
        start = [0] * len(shape)
        if layer is not None:
            start[0], shape[0] = layer, 1
        tensor = torch.empty(shape, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        found = sum(math.prod(item.lengths) for item in items)
        if found != tensor.numel():
            raise CheckpointError(
                f"{self._folder}: {name} has {found} of its {tensor.numel()} numbers"
            )
        try:
            self._storage.read_data(LoadPlan(items), _Into(tensor)).wait()
        except (CheckpointException, *DAMAGE) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self._folder}: cannot read {name}: {reason}") from error
        return tensor if layer is None else tensor[0]


class _Into(DefaultLoadPlanner):
    """Tells the storage where the parts of one tensor go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self._tensor
        offsets_and_lengths = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for dim, (offset, length) in enumerate(offsets_and_lengths):
            part = part.narrow(dim, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Any) -> None:
        """Nothing to do: the storage has written into the tensor itself."""


def _stored_name(name: str) -> tuple[str, int | None]:
    """The name that `name` is stored under, and its layer if it has one."""
    prefix, dot, rest = name.partition(_LAYERS)
    if not dot:
        return name, None
    index, _, tail = rest.partition(".")
    for ours, stored in _STORED_NAMES.items():
        tail = tail.replace(ours, stored)
    return f"{prefix}{dot}{tail}", int(index)
