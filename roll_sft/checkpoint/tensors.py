"""Rectangles of tensors in files: written by each rank alone, read back by any layout.

A stored tensor is cut into `Piece`s, each a rectangle of it and contiguous in a rank's memory. A
rank writes its pieces into one file in torch's `distcp` form (so that `.metadata`, which
`checkpoint/publish.py` makes, lets PyTorch and Megatron-Core read it) and the plain bytes of every
piece can be found by offset, so that `fill` reads the numbers that it needs and no others, without
a pickle. Imports torch alone; nothing here is collective.
"""

import hashlib
import itertools
import json
import math
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch

from roll_sft.base.errors import CheckpointError, first_line

Shape = tuple[int, ...]
INDEX = "index.json"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle at `offset` of the stored tensor `key`, of shape `shape`.

    `tensor` has as many dimensions as `shape`, is contiguous and shares memory with what it was
    cut from. With `is_padded` the stored tensor may be smaller or larger than `shape`: rows beyond
    it are left as they are.
    """

    key: str
    shape: Shape
    offset: Shape
    tensor: torch.Tensor
    is_padded: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a piece lies in a file: its torch.save record, and its first number within the file."""

    key: str
    dtype: str
    shape: Shape
    offset: Shape
    sizes: Shape
    file: str
    start: int
    length: int
    data_start: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """What one rank of `num_ranks` wrote; `optimizer_step` is Adam's count, None without one."""

    num_ranks: int
    name: str
    size: int
    sha256: str
    optimizer_step: int | None
    chunks: tuple[Chunk, ...]
    objects: dict[str, tuple[int, int]]  # stored object -> (start, length) in the file


def part_name(rank: int) -> str:
    """The file in which `rank` says what it wrote, until the checkpoint is published."""
    return f"__{rank}_0.part.json"


@dataclass(frozen=True, slots=True)
class Writer:
    """Which rank writes, of how many, and what it says of itself."""

    rank: int
    num_ranks: int
    optimizer_step: int | None


def write(
    folder: Path, pieces: Iterable[Piece], *, objects: Mapping[str, bytes], writer: Writer
) -> None:
    """Write `pieces` and `objects` into `folder`, on disk when this returns; the part file last.

    Each byte is hashed as it is written, in a thread beside, so no file is read again for it.
    Raises `CheckpointError` where it cannot be written (a full disk, say).
    """
    try:
        shard = _write_file(folder, pieces, objects=objects, writer=writer)
        text = json.dumps(asdict(shard))
        (folder / part_name(writer.rank)).write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:
        # Out of a failed write torch.save makes an error of its own, with the cause behind it.
        causes = [each for each in (error, error.__context__) if isinstance(each, OSError)]
        if not causes:
            raise
        free_gib = (shutil.disk_usage(folder).free if folder.is_dir() else 0) / 2**30
        raise CheckpointError(
            f"{folder}: cannot be written: {first_line(causes[0])} ({free_gib:.3g} GiB are free);"
            " make room or choose another output_dir, and run the same command again"
        ) from error


def _write_file(
    folder: Path, pieces: Iterable[Piece], *, objects: Mapping[str, bytes], writer: Writer
) -> ShardFile:
    name, chunks, places = f"__{writer.rank}_0.distcp", [], {}
    with (folder / name).open("wb", buffering=0) as file, _Tee(file) as tee:
        # The zip records' own checksums would cost as much as the write; the manifest has SHA-256.
        torch.serialization.set_crc32_options(False)  # of this process, for good
        for piece in pieces:
            alone = _alone(piece.tensor)
            start = tee.position
            tee.expect(alone)
            torch.save(alone, cast(IO[bytes], tee))
            assert tee.data_start is not None, f"torch.save copied {piece.key} before writing it"
            dtype = str(alone.dtype).removeprefix("torch.")
            assert dtype in DTYPES, f"{piece.key}: {alone.dtype} is not one of {list(DTYPES)}"
            sizes, length = tuple(alone.shape), tee.position - start
            place = (name, start, length, tee.data_start)
            chunks.append(Chunk(piece.key, dtype, piece.shape, piece.offset, sizes, *place))
        for key, content in objects.items():
            places[key] = (tee.position, len(content))
            tee.write(memoryview(content))
        os.fsync(file.fileno())
    return ShardFile(
        num_ranks=writer.num_ranks,
        name=name,
        size=tee.position,
        sha256=tee.sha256(),
        optimizer_step=writer.optimizer_step,
        chunks=tuple(chunks),
        objects=places,
    )


def take_parts(folder: Path) -> list[ShardFile]:
    """What each rank wrote into `folder`, rank by rank; their part files are gone afterwards.

    Raises `CheckpointError` where a rank did not finish.
    """
    parts: list[ShardFile] = []
    while not parts or len(parts) < parts[0].num_ranks:
        path = folder / part_name(len(parts))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: rank {len(parts)} did not finish its part ({error})"
            ) from error
        values["chunks"] = tuple(_chunk_of(item) for item in values["chunks"])
        parts.append(ShardFile(**values))
    for rank in range(len(parts)):
        (folder / part_name(rank)).unlink()
    return parts


def _chunk_of(values: dict[str, Any]) -> Chunk:
    shapes = {key: tuple(values[key]) for key in ("shape", "offset", "sizes")}
    return Chunk(**{**values, **shapes})


class Index:
    """Which chunks each stored tensor of a checkpoint has."""

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
        chunks = self._chunks.get(piece.key)
        if not chunks:
            raise CheckpointError(f"{self._folder}: {piece.key} is not in this checkpoint")
        stored = chunks[0].shape
        if stored != piece.shape and not piece.is_padded:
            raise CheckpointError(
                f"{self._folder}: {piece.key} has shape {stored}, and this model's is {piece.shape}"
            )
        found, wanted = 0, 1
        for offset, size, limit in zip(piece.offset, piece.tensor.shape, stored, strict=True):
            wanted *= max(0, min(offset + size, limit) - offset)
        for chunk in chunks:
            found += self._copy(chunk, piece)
        if found != wanted:
            raise CheckpointError(
                f"{self._folder}: {piece.key} at {piece.offset} has {found} of its {wanted} numbers"
            )

    def _copy(self, chunk: Chunk, piece: Piece) -> int:
        """Copy what `chunk` and `piece` have in common; returns how many numbers that is."""
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
                for start, length in _runs(chunk.sizes, begin, sizes):
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
        """Memory that is used over and over: fresh memory costs more than reading into it."""
        num_bytes = math.prod(sizes) * dtype.itemsize
        if self._room.numel() < num_bytes:
            self._room = torch.empty(num_bytes, dtype=torch.uint8)
        return self._room[:num_bytes].view(dtype).view(sizes)


def rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[Shape, Shape]]:
    """(offset, sizes) of the rectangles that make up numbers [start, stop) of a flattened tensor.

    In order and each contiguous: at most 2 n - 1 of them for n dimensions.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:  # within one row
        last = first
    head, tail = min(stop, first * inner), max(start, last * inner)
    row = start // inner
    for offset, sizes in rectangles(start - row * inner, head - row * inner, shape[1:]):
        yield (row, *offset), (1, *sizes)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if tail >= head:
        for offset, sizes in rectangles(tail - last * inner, stop - last * inner, shape[1:]):
            yield (last, *offset), (1, *sizes)


def _runs(shape: Sequence[int], begin: list[int], sizes: list[int]) -> Iterator[tuple[int, int]]:
    """(first, length) of the contiguous runs of a rectangle within a tensor of `shape`, flat."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    dim = len(shape)  # from here on the rectangle spans whole dimensions
    while dim > 0 and sizes[dim - 1] == shape[dim - 1]:
        dim -= 1
    outer = max(0, dim - 1)
    length = math.prod(sizes[outer:])
    inner_start = sum(b * s for b, s in zip(begin[outer:], strides[outer:], strict=True))
    ranges = (range(b, b + n) for b, n in zip(begin[:outer], sizes[:outer], strict=True))
    for position in itertools.product(*ranges):
        yield sum(p * s for p, s in zip(position, strides, strict=False)) + inner_start, length


def _read_exactly(file: BinaryIO, memory: memoryview, start: int) -> None:
    while memory:
        count = os.preadv(file.fileno(), [memory], start)
        if count == 0:
            raise EOFError(f"ends {len(memory)} bytes early")
        memory, start = memory[count:], start + count


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the CPU in a storage of its own size, which torch.save writes whole; no copy."""
    detached = tensor.detach().cpu()
    if detached.untyped_storage().nbytes() == detached.nbytes:
        return detached
    memory = detached.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=detached.dtype).reshape(detached.shape)


class _Tee:
    """Writes to a file and hashes in a thread beside; notes where the awaited memory was put."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        # With each tensor's memory the tensor itself, so that it lives until it is hashed.
        self._waiting: queue.Queue[tuple[memoryview | bytes, object] | None] = queue.Queue(2)
        self._thread = threading.Thread(target=self._work, name="checkpoint-hash", daemon=True)
        self._small = bytearray()
        self._awaited: torch.Tensor | None = None
        self.position = 0
        self.data_start: int | None = None

    def __enter__(self) -> "_Tee":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._hash_later(bytes(self._small), None)
        self._waiting.put(None)
        self._thread.join()

    def expect(self, tensor: torch.Tensor) -> None:
        """Note where the memory of `tensor` goes."""
        self._awaited, self.data_start = tensor, None

    def write(self, data: memoryview) -> int:
        """What torch.save calls, once with the tensor's own memory and else with a few bytes."""
        view = memoryview(data).cast("B")
        if self._awaited is not None and _address(view) == self._awaited.data_ptr():
            self.data_start = self.position
            self._hash_later(bytes(self._small), None)
            self._hash_later(view, self._awaited)
            self._small.clear()
        else:
            self._small += view
        rest = view
        while rest:
            rest = rest[self._file.write(rest) :]
        self.position += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing waits here."""

    def sha256(self) -> str:
        """Of all that was written, once the block is left."""
        return self._hash.hexdigest()

    def _hash_later(self, data: memoryview | bytes, owner: object) -> None:
        self._waiting.put((data, owner))

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            self._hash.update(item[0])


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data) if view.nbytes else 0
