"""Rectangles of tensors in files: written by each rank alone, read back by any layout.

A `Piece` is a rectangle of a stored tensor in a rank's memory; a `Chunk` is where one lies in a
file. A rank writes its pieces into one `.distcp` file as torch.save records, so that PyTorch and
Megatron-Core can load it with the files that `checkpoint/publish.py` adds; `checkpoint/index.py`
reads it. Imports torch alone; nothing here is collective.
"""

import contextlib
import hashlib
import json
import math
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch

from roll_sft.base.errors import CheckpointError, first_line

Shape = tuple[int, ...]
Check = Callable[[torch.Tensor], None]
INDEX = "index.json"
_BLOCK_BYTES = 1 << 20  # small enough for a core's cache, large enough for few calls
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle at `offset` of the stored tensor `key`, of shape `shape`.

    `tensor` has as many dimensions as `shape`, is contiguous and shares memory with what it was
    cut from. With `is_padded` the stored tensor may be smaller or larger than `shape`: rows beyond
    it are left as they are. `check` is called with each block of numbers before it is written.
    """

    key: str
    shape: Shape
    offset: Shape
    tensor: torch.Tensor
    is_padded: bool = False
    check: Check | None = None


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
    """The file that lists what `rank` wrote, until the checkpoint is published."""
    return f"__{rank}_0.part.json"


@dataclass(frozen=True, slots=True)
class Writer:
    """The rank that writes, the number of ranks, and Adam's count (None without an optimizer)."""

    rank: int
    num_ranks: int
    optimizer_step: int | None


def write(
    folder: Path, pieces: Iterable[Piece], *, objects: Mapping[str, bytes], writer: Writer
) -> None:
    """Write `pieces` and `objects` into `folder`; the shard is on disk when this returns.

    The part file comes last. Each block of bytes is checked, hashed by a second thread and written
    while it is in the processor's cache. Raises `CheckpointError` where the disk refuses (it is
    full, for example), and what a `check` raises.
    """
    try:
        shard = _write_file(folder, pieces, objects=objects, writer=writer)
        text = json.dumps(asdict(shard))
        (folder / part_name(writer.rank)).write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:
        # torch.save turns what fails in a write into a RuntimeError, with that as its context.
        if isinstance(error.__context__, CheckpointError):  # of a check
            raise error.__context__ from None
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
    with (folder / name).open("wb", buffering=0) as file, _without_crc32(), _Tee(file) as tee:
        for piece in pieces:
            alone = _alone(piece.tensor)
            start = tee.position
            tee.expect(alone, piece.check)
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


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Let torch.save leave out its checksums, which cost as much as the write.

    The manifest has the SHA-256 of the whole file. torch has one setting for the process.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def take_parts(folder: Path) -> list[ShardFile]:
    """What each rank wrote into `folder`, rank by rank; deletes their part files.

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


def rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[Shape, Shape]]:
    """(offset, sizes) of the rectangles that make up numbers [start, stop) of a flattened tensor.

    In order and each contiguous: at most 2 n - 1 of them for n dimensions.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,), (stop - start,)
        return
    row_size = math.prod(shape[1:])
    first_row, start_in_row = divmod(start, row_size)
    last_row, stop_in_row = divmod(stop, row_size)
    if first_row == last_row:
        yield from _in_row(first_row, start_in_row, stop_in_row, shape)
        return
    if start_in_row > 0:
        yield from _in_row(first_row, start_in_row, row_size, shape)
        first_row += 1
    if first_row < last_row:
        yield (first_row, *(0 for _ in shape[1:])), (last_row - first_row, *shape[1:])
    yield from _in_row(last_row, 0, stop_in_row, shape)


def _in_row(row: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[Shape, Shape]]:
    """The rectangles of numbers [start, stop) of one row."""
    for offset, sizes in rectangles(start, stop, shape[1:]):
        yield (row, *offset), (1, *sizes)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the CPU in a storage of its size, which torch.save writes whole; no copy."""
    detached = tensor.detach().cpu()
    if detached.untyped_storage().nbytes() == detached.nbytes:
        return detached
    memory = detached.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=detached.dtype).reshape(detached.shape)


class _Tee:
    """A file that torch.save writes to: hashes in a second thread, and notes tensors' offsets."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        # (memory, its owner): the owner keeps the memory alive until it is hashed.
        self._waiting: queue.Queue[tuple[memoryview | bytes, object] | None] = queue.Queue(8)
        self._thread = threading.Thread(target=self._work, name="checkpoint-hash", daemon=True)
        self._small = bytearray()
        self._awaited: tuple[torch.Tensor, Check | None] | None = None
        self.position = 0
        self.data_start: int | None = None

    def __enter__(self) -> "_Tee":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put((bytes(self._small), None))
        self._waiting.put(None)
        self._thread.join()

    def expect(self, tensor: torch.Tensor, check: Check | None) -> None:
        """Set `data_start` when the memory of `tensor` is written, each block after `check`."""
        self._awaited, self.data_start = (tensor, check), None

    def write(self, data: memoryview) -> int:
        """Called by torch.save: once with the tensor's own memory, else with a few bytes."""
        view = memoryview(data).cast("B")
        if self._awaited is None or _address(view) != self._awaited[0].data_ptr():
            self._small += view
            return self._put(view)
        self.data_start = self.position
        self._waiting.put((bytes(self._small), None))
        self._small.clear()
        tensor, check = self._awaited
        for block in torch.split(tensor.view(-1), _BLOCK_BYTES // tensor.itemsize):
            if check is not None:
                check(block)
            part, view = view[: block.nbytes], view[block.nbytes :]
            self._waiting.put((part, tensor))
            self._put(part)
        return tensor.nbytes

    def _put(self, view: memoryview) -> int:
        rest = view
        while rest:
            rest = rest[self._file.write(rest) :]
        self.position += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Does nothing: writes are not buffered."""

    def sha256(self) -> str:
        """The hash of all written bytes, after the block."""
        return self._hash.hexdigest()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            self._hash.update(item[0])


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data) if view.nbytes else 0
