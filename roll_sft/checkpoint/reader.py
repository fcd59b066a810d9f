"""Reads single parameters out of a `torch_dist` checkpoint: torch alone, no Megatron, no processes.

Parameters of equal layers lie in one stored tensor with the layer as its first dimension; `Reader`
hides that and reads one layer without the others, so memory follows the parameter, not the model.
It remembers what it has read, so that nothing in a checkpoint is left out unnoticed.
"""

import math
from collections import Counter
from pathlib import Path

import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.tensors import Piece
from roll_sft.checkpoint.torch_dist import read_index

_LAYERS = "decoder.layers."
_OPTIMIZER = "optimizer."
_MASTERS = "optimizer.state.param."
# The local layer spec stores its norms under the names they have when fused into the next linear
# layer, so that checkpoints do not depend on the spec.
_STORED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class Reader:
    """One checkpoint's parameters, by Megatron's names with global layer indices.

    With `dtype`, a parameter that is stored rounded to another dtype is read from the optimizer's
    fp32 copy, if there is one, so that it is rounded once.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        self._folder = folder
        self._index = read_index(folder)
        self._dtype = dtype
        self._num_read: Counter[str] = Counter()
        self._room = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str) -> torch.Tensor:
        """Parameter `name` with all tensor shards merged, in the dtype it was saved in, on the CPU.

        In memory that the next call takes again. Raises `CheckpointError` where it is missing, not
        whole, or its file is damaged.
        """
        key, layer = stored_name(name)
        dtype, shape = self._index.stored(key)
        if layer is not None and layer >= shape[0]:
            raise CheckpointError(f"{self._folder}: {name} is not in this checkpoint")
        self._num_read[key] += math.prod(shape if layer is None else shape[1:])
        if dtype != self._dtype and self._dtype is not None and _MASTERS + key in self._index.keys:
            key = _MASTERS + key
            dtype, shape = self._index.stored(key)
        sizes = shape if layer is None else (1, *shape[1:])
        num_bytes = math.prod(sizes) * dtype.itemsize
        if self._room.numel() < num_bytes:  # fresh memory costs more than reading into it
            self._room = torch.empty(num_bytes, dtype=torch.uint8)
        tensor = self._room[:num_bytes].view(dtype).view(sizes)
        first = 0 if layer is None else layer
        self._index.fill(Piece(key, shape, (first, *(0 for _ in shape[1:])), tensor))
        return tensor if layer is None else tensor[0]

    def check_all_read(self) -> None:
        """Raise `CheckpointError` for a tensor of the model that was not read, or not all of it."""
        for key in sorted(self._index.keys):
            if key.startswith(_OPTIMIZER):
                continue
            num_stored, num_read = math.prod(self._index.stored(key)[1]), self._num_read[key]
            if num_read != num_stored:
                raise CheckpointError(
                    f"{self._folder}: {key} has {num_stored} numbers, and the model that"
                    f" config.json describes takes {num_read} of them; the checkpoint belongs to"
                    " another model"
                )


def stored_name(name: str) -> tuple[str, int | None]:
    """The name that parameter `name` is stored under, and its layer if it has one."""
    prefix, dot, rest = name.partition(_LAYERS)
    if not dot:
        return name, None
    index, _, tail = rest.partition(".")
    for ours, stored in _STORED_NAMES.items():
        tail = tail.replace(ours, stored)
    return f"{prefix}{dot}{tail}", int(index)
