"""Reads single parameters of a checkpoint, without Megatron and process groups.

The parameters of equal layers lie in one stored tensor with the layer as its first dim. `Reader`
reads one layer without the others, so memory follows the parameter, not the model. Where a run
froze a part of the model, each layer that was trained has stored tensors of its own. The reader
counts the numbers that it has read: `check_all_read` finds a tensor that was left out.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.index import read_index
from roll_sft.checkpoint.tensors import Piece, Shape

LAYERS = "decoder.layers."
_EXPERTS, _STORED_EXPERTS = "experts.local_experts.", "experts.experts."
_OPTIMIZER = "optimizer."
_MASTERS = "optimizer.state.param."
# The local layer spec stores its norms under the names they have when fused into the next linear
# layer, so that checkpoints do not depend on the spec.
_STORED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True, slots=True)
class _Stored:
    """The stored tensor `key` of a parameter, which is it or holds it at `index`."""

    key: str
    index: tuple[int, ...]
    dtype: torch.dtype
    shape: Shape

    @property
    def shape_of_one(self) -> Shape:
        """The parameter's own shape."""
        return self.shape[len(self.index) :]


class Reader:
    """One checkpoint's parameters, by Megatron's names with global layer indices.

    With `dtype`, a parameter that is stored rounded to another dtype is read from the optimizer's
    fp32 copy, if there is one, so that it is rounded once.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        self.folder = folder
        self._index = read_index(folder)
        self._dtype = dtype
        self._num_read: Counter[str] = Counter()

    def has(self, name: str) -> bool:
        """Whether parameter `name` is stored."""
        return self._place(name)[0] in self._index.keys

    def kept(self, prefix: str) -> dict[str, Shape]:
        """What follows `prefix` in the names of stored tensors that begin with it, and shapes."""
        names = sorted(key for key in self._index.keys if key.startswith(prefix))
        return {name.removeprefix(prefix): self._index.stored(name)[1] for name in names}

    def shape(self, name: str) -> Shape:
        """Shape of parameter `name`."""
        return self._stored(name).shape_of_one

    def num_bytes(self, name: str) -> int:
        """Bytes of parameter `name`, in the dtype that `read` returns."""
        stored = self._stored(name)
        return math.prod(stored.shape_of_one) * stored.dtype.itemsize

    def read(
        self, name: str, *, rows: slice | None = None, scratch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Parameter `name`, or `rows` of it, all tensor shards merged, as it was saved, on the CPU.

        Returns fresh memory, or a view of the beginning of `scratch`: uint8, as long as what is
        read, and aligned as torch allocates. Raises `CheckpointError` where the parameter is
        missing, not whole, or its file is damaged.
        """
        stored = self._stored(name)
        first, size = 0, stored.shape_of_one[0]
        if rows is not None:
            first, size = rows.start, rows.stop - rows.start
        sizes = (size, *stored.shape_of_one[1:])
        if scratch is None:
            tensor = torch.empty(sizes, dtype=stored.dtype)
        else:
            num_bytes = math.prod(sizes) * stored.dtype.itemsize
            tensor = scratch[:num_bytes].view(stored.dtype).view(sizes)
        self._num_read[self._place(name)[0]] += tensor.numel()
        corner = (first, *(0 for _ in sizes[1:]))
        place, piece = (*stored.index, *corner), tensor[(None,) * len(stored.index)]
        self._index.fill(Piece(stored.key, stored.shape, place, piece))
        return tensor

    def _stored(self, name: str) -> "_Stored":
        key, index = self._place(name)
        dtype, shape = self._index.stored(key)
        if any(number >= size for number, size in zip(index, shape, strict=False)):
            raise CheckpointError(f"{self.folder}: {name} is not in this checkpoint")
        if dtype != self._dtype and self._dtype is not None and _MASTERS + key in self._index.keys:
            key = _MASTERS + key
            dtype, shape = self._index.stored(key)
        return _Stored(key, index, dtype, shape)

    def _place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The stored tensor of `name`, and its place in the first dims of that."""
        key, index = stored_name(name)
        of_layer = key.replace(LAYERS, f"{LAYERS}{index[0]}.") if index else key
        return (of_layer, index[1:]) if of_layer in self._index.keys else (key, index)

    def check_all_read(self) -> None:
        """Raise `CheckpointError` for a tensor of the model that was not read, or not all of it."""
        for key in sorted(self._index.keys):
            if key.startswith(_OPTIMIZER):
                continue
            num_stored, num_read = math.prod(self._index.stored(key)[1]), self._num_read[key]
            if num_read != num_stored:
                raise CheckpointError(
                    f"{self.folder}: {key} has {num_stored} numbers, and the model that"
                    f" config.json describes takes {num_read} of them; the checkpoint belongs to"
                    " another model"
                )


def stored_name(name: str) -> tuple[str, tuple[int, ...]]:
    """The name that parameter `name` is stored under, and its place in that tensor's first dims.

    That is its layer, and its expert behind it, if it has them.
    """
    prefix, dot, rest = name.partition(LAYERS)
    if not dot:
        return name, ()
    layer, _, tail = rest.partition(".")
    for ours, stored in _STORED_NAMES.items():
        tail = tail.replace(ours, stored)
    before, of_expert, rest = tail.partition(_EXPERTS)
    if not of_expert:
        return f"{prefix}{dot}{tail}", (int(layer),)
    expert, _, tail = rest.partition(".")
    return f"{prefix}{dot}{before}{_STORED_EXPERTS}{tail}", (int(layer), int(expert))
