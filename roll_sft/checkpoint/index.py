"""Reads rectangles of a checkpoint's tensors, written on any layout.

`read_index` reads `index.json`, checked against the files beside it. `Index.fill` finds the plain
bytes by their offset and reads only the numbers that it needs, without a pickle. Imports torch
alone; nothing here is collective.
"""

import itertools
import json
import math
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.checkpoint.tensors import DTYPES, INDEX, Chunk, Piece, Shape
from roll_sft.models.files.json_files import json_text

_MOST_BYTES, _MOST_PARTS = 1 << 30, 50_000_000  # a part of a tensor has three lists


def read_index(folder: Path) -> "Index":
    """Where the tensors of the checkpoint `folder` lie.

    Raises `CheckpointError` where the index is missing or disagrees with the files beside it.
    """
    path = folder / INDEX
    try:
        chunks = list(
            _chunks(
                json.loads(json_text(path, most=_MOST_BYTES, most_parts=_MOST_PARTS))["tensors"]
            )
        )
        _check_chunks(chunks, folder)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: does not describe what lies beside it ({error}); take another checkpoint"
        ) from error
    return Index(folder, chunks)


class Index:
    """The chunks of each stored tensor of a checkpoint."""

    def __init__(self, folder: Path, chunks: Iterable[Chunk]) -> None:
        self._folder = folder
        self._chunks: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            self._chunks.setdefault(chunk.key, []).append(chunk)
        self._room = torch.empty(0, dtype=torch.uint8)
        self.bytes_read = 0

    @property
    def keys(self) -> frozenset[str]:
        """The names of all stored tensors."""
        return frozenset(self._chunks)

    def stored(self, key: str) -> tuple[torch.dtype, Shape]:
        """dtype and shape of the stored tensor `key`. Raises `CheckpointError` if there is none."""
        chunks = self._chunks.get(key)
        if not chunks:
            raise CheckpointError(f"{self._folder}: {key} is not in this checkpoint")
        return DTYPES[chunks[0].dtype], chunks[0].shape

    def fill(self, piece: Piece) -> None:
        """Copy the stored numbers of the rectangle `piece` into its tensor.

        Raises `CheckpointError` where the tensor is missing, has another shape, or is not whole.
        """
        _, stored = self.stored(piece.key)
        if stored != piece.shape and not piece.is_padded:
            raise CheckpointError(
                f"{self._folder}: {piece.key} has shape {stored}, and this model's is {piece.shape}"
            )
        sides = zip(piece.offset, piece.tensor.shape, stored, strict=True)
        wanted = math.prod(max(0, min(size, limit - offset)) for offset, size, limit in sides)
        found = sum(self._copy(chunk, piece) for chunk in self._chunks[piece.key])
        if found != wanted:
            raise CheckpointError(
                f"{self._folder}: {piece.key} at {piece.offset} has {found} of its {wanted} numbers"
            )

    def _copy(self, chunk: Chunk, piece: Piece) -> int:
        """Copy the overlap of `chunk` and `piece`; returns how many numbers it has."""
        low = [max(a, b) for a, b in zip(chunk.offset, piece.offset, strict=True)]
        sizes = [
            min(a + n, b + m) - first
            for a, n, b, m, first in zip(
                chunk.offset, chunk.sizes, piece.offset, piece.tensor.shape, low, strict=True
            )
        ]
        if min(sizes, default=1) <= 0:
            return 0
        target = piece.tensor
        for dim, (first, offset, size) in enumerate(zip(low, piece.offset, sizes, strict=True)):
            target = target.narrow(dim, first - offset, size)
        self._read(chunk, [a - b for a, b in zip(low, chunk.offset, strict=True)], target=target)
        return math.prod(sizes)

    def _read(self, chunk: Chunk, begin: list[int], *, target: torch.Tensor) -> None:
        """Fill `target` with the rectangle of its shape that starts at `begin` in `chunk`."""
        path, dtype, sizes = self._folder / chunk.file, DTYPES[chunk.dtype], list(target.shape)
        try:
            is_direct = target.is_contiguous() and target.dtype == dtype and target.is_cpu
            result = target if is_direct else self._room_for(sizes, dtype)
            memory = memoryview(cast(Any, result.view(-1).view(torch.uint8).numpy()))
            with path.open("rb", buffering=0) as file:
                for start, length in _contiguous_runs(chunk.sizes, begin, sizes):
                    part = memory[: length * dtype.itemsize]
                    _read_exactly(file, part, chunk.data_start + start * dtype.itemsize)
                    self.bytes_read += len(part)
                    memory = memory[len(part) :]
        except (OSError, EOFError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{path}: cannot read {chunk.key}: {reason}") from error
        if not is_direct:
            target.copy_(result)

    def _room_for(self, sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Scratch memory, kept between reads: allocating costs more than reading into it."""
        num_bytes = math.prod(sizes) * dtype.itemsize
        if self._room.numel() < num_bytes:
            self._room = torch.empty(num_bytes, dtype=torch.uint8)
        return self._room[:num_bytes].view(dtype).view(sizes)


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


def _contiguous_runs(
    shape: Sequence[int], offset: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """(start, length), in numbers, of the runs of a rectangle within a flattened tensor.

    A run covers all dims that the rectangle fills, and its part of the dim before these.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    run_dim = max((dim for dim in range(len(shape)) if sizes[dim] != shape[dim]), default=0)
    length = math.prod(sizes[run_dim:])
    start_in_run = sum(map(operator.mul, offset[run_dim:], strides[run_dim:]))
    outer_starts = (
        range(first * stride, (first + size) * stride, stride)
        for first, size, stride in zip(
            offset[:run_dim], sizes[:run_dim], strides[:run_dim], strict=True
        )
    )
    for starts in itertools.product(*outer_starts):
        yield sum(starts) + start_in_run, length


def _read_exactly(file: BinaryIO, memory: memoryview, start: int) -> None:
    while memory:
        count = os.preadv(file.fileno(), [memory], start)
        if count == 0:
            raise EOFError(f"ends {len(memory)} bytes early")
        memory, start = memory[count:], start + count
